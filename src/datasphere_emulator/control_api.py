"""The control API under ``/_control/``: controls the emulator in ways that no client of the service can.

Bodies are JSON. The body of an error is ``{"error": {"type": "ValueError", "message": "…"}}``, with status 400
(invalid field or value), 404 (not found), 408 (timed out) or 409 (invalid in the current state).

Its users can run any command as the emulator's user, so each request must carry the emulator's secret in the header
``Authorization: Bearer …``; without it the status is 401. Requests from web pages are rejected with 403.

===================================== ==================================================================================
``GET info``                          ``endpoint``, ``url``, ``project_id``, ``community_id``, ``service_account_id``,
                                      ``iam_token``
``GET projects``                      ``{"projects": […]}``
``POST projects``                     ``{"name"?, "id"?}`` → ``{"id"}``; no account has a role in it
``GET journal``                       ``{"calls": […]}``; query: ``method job_id operation_id subject code since``
``DELETE journal``                    delete all calls
``GET faults``                        ``{"faults": […]}``
``POST faults``                       fields of ``Fault`` → ``{"id"}``
``DELETE faults``, ``faults/{id}``    remove all, or one
``GET settings``, ``PATCH settings``  all settings; PATCH changes some and returns all
``GET iam``                           ``accounts``, ``roles``, ids of ``keys``
``POST iam/tokens``                   ``{"subject"?, "lifetime"?}`` → ``{"token", "subject", "expires_at"}``
``POST iam/revoke``                   ``{"token"?, "subject"?}`` → ``{"revoked": number}``
``POST iam/service-accounts``         ``{"name"}`` → ``{"id"}``
``POST iam/users``                    ``{"name"}`` → ``{"id"}``
``PUT iam/roles``                     ``{"subject", "project_id"?, "role"}``; role null removes it
``POST iam/keys``                     ``{"service_account_id"?}`` → the authorized key
``DELETE iam/keys/{id}``              delete a key
``POST iam/oauth-tokens``             ``{"user"}`` → ``{"token"}``
``POST iam/impersonations``           ``{"caller"?, "service_account_id"}``: allow it
``POST jobs``                         arguments of ``Emulator.create_job`` → ``{"id"}``; a file's content is a string
                                      or ``{"base64": "…"}``
``POST scripted-jobs``                arguments of ``Emulator.create_scripted_job`` → ``{"id"}``
``POST new-job-scripts``              arguments of ``Emulator.script_new_jobs``
``GET jobs``                          ``{"jobs": […]}``; query: ``parent``
``GET jobs/{id}``                     the job
``DELETE jobs/{id}``                  delete it
``GET jobs/{id}/executions``          ``{"executions": number, "operation_id"}`` of the last one
``GET jobs/{id}/log``                 ``{"log": [{"source", "time", "base64"}]}``: its end; query: ``limit`` in bytes
``POST jobs/{id}/wait``               arguments of ``Emulator.wait_job`` → the job
``POST jobs/{id}/cancel``             arguments of ``Emulator.cancel_job``
``POST jobs/{id}/clear-data``         clear its data
``GET operations/{id}``               the operation
``DELETE operations/{id}``            make OperationService forget it
===================================== ==================================================================================

Jobs and operations are the protos' JSON with their own field names.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import inspect
import json
from typing import TYPE_CHECKING, Any

from aiohttp import web
from google.protobuf import json_format
from google.protobuf.message import Message

from datasphere_emulator.access import NoSecret
from datasphere_emulator.control_fields import call, check_kind, wrong
from datasphere_emulator.errors import StatusError
from datasphere_emulator.faults import Fault
from datasphere_emulator.http_calls import HTTP_STATUS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from datasphere_emulator.access import Access
    from datasphere_emulator.state import EmulatorState

    Handler = Callable[[web.Request], Awaitable[Any]]

PREFIX = "/_control/"

#: HTTP status by exception class; the first match counts.
_STATUSES: tuple[tuple[type[Exception], int], ...] = (
    (KeyError, 404),
    (TimeoutError, 408),
    (asyncio.TimeoutError, 408),
    (RuntimeError, 409),
    (NoSecret, 401),
    (PermissionError, 403),
    (ValueError, 400),
    (TypeError, 400),
    (AttributeError, 400),
)


def _error(error: Exception) -> web.Response:
    if isinstance(error, StatusError):
        status, kind, message = HTTP_STATUS.get(error.code, 500), error.code, error.message
    else:
        status = next((status for kind_, status in _STATUSES if isinstance(error, kind_)), 500)
        kind = type(error).__name__
        # str() of a KeyError is the repr of its text.
        message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
    return web.json_response({"error": {"type": kind, "message": message}}, status=status, headers=headers)


def _plain(value: Any) -> Any:
    """Convert protos and dataclasses to JSON values."""
    if isinstance(value, Message):
        return json_format.MessageToDict(value, preserving_proto_field_name=True)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _answering(handle: Handler, access: Access) -> Callable[[web.Request], Awaitable[web.Response]]:
    """Respond with the handler's result as JSON, or with an error document for its exception."""

    async def answering(request: web.Request) -> web.Response:
        try:
            access.check_control(request)
            answer = await handle(request)
        except Exception as error:
            if _error(error).status == 500:
                raise
            return _error(error)
        return web.json_response({} if answer is None else _plain(answer))

    return answering


async def _body(request: web.Request) -> dict[str, Any]:
    if not request.can_read_body:
        return {}
    try:
        body = json.loads(await request.text() or "{}")
    except ValueError as error:
        raise ValueError(f"The body is not valid JSON: {error}.") from None
    if not isinstance(body, dict):
        raise ValueError("The body must be a JSON object.")
    return body


def _number(kind: type[int] | type[float], name: str, text: str) -> float:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{name}={text!r}: must be a number.") from None


def _checked_execute(body: dict[str, Any]) -> dict[str, Any]:
    check_kind("execute", body.get("execute", False), "bool")
    return body


async def _job_body(request: web.Request) -> dict[str, Any]:
    """Return the arguments for a new job, contents of files decoded from base64."""
    body = await _body(request)
    for field in ("files", "local_modules"):
        contents = body.get(field)
        if isinstance(contents, dict):
            body[field] = {
                name: _decoded(f"{field}[{name!r}]", content) if isinstance(content, dict) else content
                for name, content in contents.items()
            }
    return body


def _decoded(name: str, content: dict[str, Any]) -> bytes:
    if list(content) != ["base64"] or not isinstance(content["base64"], str):
        raise wrong(name, content, "text, or {'base64': …}")
    try:
        return base64.b64decode(content["base64"], validate=True)
    except ValueError as error:
        raise ValueError(f"{name}: invalid base64: {error}.") from None


def _with_path(function: Callable[..., Any], key: str = "") -> Handler:
    """Call a function with the ids in the path. :param key: field of the answer that gets the result, "" for none."""

    async def handle(request: web.Request) -> Any:
        result = function(**request.match_info)
        return {key: result} if key else result

    return handle


def _with_body(function: Callable[..., Any], key: str = "", **defaults: Any) -> Handler:
    """Call a function with the fields of the body and the ids in the path.

    :param key: field of the answer that gets the result, "" for none.
    :param defaults: values of fields that the body lacks.
    """

    async def handle(request: web.Request) -> Any:
        result = call(function, {**defaults, **await _body(request), **request.match_info})
        if inspect.isawaitable(result):
            result = await result
        return {key: result} if key else result

    return handle


class ControlHandlers:
    """The routes under ``/_control/``."""

    def __init__(self, state: EmulatorState, access: Access) -> None:
        self._state = state
        self._access = access

    def add_routes(self, app: web.Application) -> None:
        """Add all routes to the application."""
        state, iam, faults = self._state, self._state.iam, self._state.faults
        routes: list[tuple[str, str, Handler]] = [
            ("GET", "info", self._info),
            ("GET", "projects", self._projects),
            ("POST", "projects", _with_body(state.add_project, "id")),
            ("GET", "journal", self._journal),
            ("DELETE", "journal", _with_path(state.journal.clear)),
            ("GET", "faults", _with_path(faults.active, "faults")),
            ("POST", "faults", self._inject),
            ("DELETE", "faults", _with_path(faults.clear)),
            ("DELETE", "faults/{id}", _with_path(faults.remove)),
            ("GET", "settings", _with_path(state.settings.to_json)),
            ("PATCH", "settings", self._change_settings),
            ("GET", "iam", self._iam),
            ("POST", "iam/tokens", self._issue_token),
            ("POST", "iam/revoke", _with_body(iam.revoke, "revoked")),
            ("POST", "iam/service-accounts", _with_body(iam.add_service_account, "id")),
            ("POST", "iam/users", _with_body(iam.add_user, "id")),
            ("PUT", "iam/roles", _with_body(iam.set_role, project_id=state.project_id)),
            ("POST", "iam/keys", self._create_key),
            ("DELETE", "iam/keys/{key_id}", _with_path(iam.delete_key)),
            ("POST", "iam/oauth-tokens", _with_body(iam.add_oauth_token, "token")),
            ("POST", "iam/impersonations", _with_body(iam.allow_impersonation, caller=state.service_account_id)),
            ("POST", "jobs", self._create_job),
            ("POST", "scripted-jobs", self._create_scripted_job),
            ("POST", "new-job-scripts", self._script_new_jobs),
            ("GET", "jobs", self._jobs),
            ("GET", "jobs/{job_id}", _with_path(state.job)),
            ("DELETE", "jobs/{job_id}", _with_path(state.delete_job)),
            ("GET", "jobs/{job_id}/executions", self._executions),
            ("GET", "jobs/{job_id}/log", self._log),
            ("POST", "jobs/{job_id}/wait", _with_body(state.wait_job)),
            ("POST", "jobs/{job_id}/cancel", _with_body(state.cancel_job)),
            ("POST", "jobs/{job_id}/clear-data", _with_path(state.clear_data)),
            ("GET", "operations/{operation_id}", _with_path(state.operation)),
            ("DELETE", "operations/{operation_id}", _with_path(state.forget_operation)),
        ]
        for method, path, handle in routes:
            app.router.add_route(method, PREFIX + path, _answering(handle, self._access))

    async def _info(self, request: web.Request) -> Any:
        names = ("endpoint", "url", "project_id", "community_id", "service_account_id", "iam_token")
        return {name: getattr(self._state, name) for name in names}

    async def _projects(self, request: web.Request) -> Any:
        return {"projects": list(self._state.projects.values())}

    async def _journal(self, request: web.Request) -> Any:
        filters: dict[str, Any] = dict(request.query)
        if "since" in filters:
            filters["since"] = _number(float, "since", filters["since"])
        return {"calls": call(self._state.journal.calls, filters)}

    async def _inject(self, request: web.Request) -> Any:
        return {"id": self._state.faults.add(call(Fault, await _body(request)))}

    async def _change_settings(self, request: web.Request) -> Any:
        self._state.settings.update(await _body(request))
        return self._state.settings.to_json()

    async def _iam(self, request: web.Request) -> Any:
        state = self._state.iam.to_json()
        roles = [{"subject": subject, "project_id": project, "role": role} for subject, project, role in state["roles"]]
        return {"accounts": state["accounts"], "roles": roles, "keys": [key["id"] for key in state["keys"]]}

    async def _issue_token(self, request: web.Request) -> Any:
        body = {"subject": self._state.service_account_id, **await _body(request)}
        token = call(self._state.iam.issue_token, body)
        return {"token": token, "subject": body["subject"], "expires_at": self._state.iam.expires_at(token)}

    async def _create_key(self, request: web.Request) -> Any:
        body = {"service_account_id": self._state.service_account_id, **await _body(request)}
        # In a thread: finding two primes takes a good part of a second at times.
        return await asyncio.to_thread(call, self._state.iam.create_key, body)

    async def _create_job(self, request: web.Request) -> Any:
        body = await _job_body(request)
        if "cmd" not in body:
            raise TypeError("The field 'cmd' is missing: the command that the job runs, such as 'python main.py'.")
        return {"id": self._state.create_job(**_checked_execute(body))}

    async def _create_scripted_job(self, request: web.Request) -> Any:
        body = await _job_body(request)
        if not isinstance(body.get("script"), (dict, list)):
            raise TypeError("The field 'script' is missing: the fields of a Script, or a list of such.")
        return {"id": self._state.create_scripted_job(**_checked_execute(body))}

    async def _script_new_jobs(self, request: web.Request) -> Any:
        call(self._state.script_new_jobs, await _body(request))
        return {}

    async def _jobs(self, request: web.Request) -> Any:
        return {"jobs": call(self._state.jobs, request.query)}

    async def _executions(self, request: web.Request) -> Any:
        job_id = request.match_info["job_id"]
        return {"executions": self._state.executions(job_id), "operation_id": self._state.operation_of(job_id)}

    async def _log(self, request: web.Request) -> Any:
        query: dict[str, Any] = dict(request.query)
        if "limit" in query:
            query["limit"] = _number(int, "limit", query["limit"])
        pieces = call(self._state.log_text, {**query, "job_id": request.match_info["job_id"]})
        log = [
            {"source": source, "time": time, "base64": base64.b64encode(content).decode()}
            for source, time, content in pieces
        ]
        return {"log": log}
