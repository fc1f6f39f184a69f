"""The control API under ``/_control/``: what a test or a person does to the emulator that no client of the service can.

Bodies and answers are JSON. An error is answered as ``{"error": {"type": "ValueError", "message": "…"}}`` with status
400 (a wrong value), 404 (no such thing), 408 (the wait was too long) or 409 (not now). No authentication: the emulator
is for localhost. Requests that a browser sends for a web page are refused with 403: a job runs any command.

===================================== ==================================================================================
``GET info``                          ``endpoint``, ``url``, ``project_id``, ``community_id``, ``service_account_id``,
                                      ``iam_token``
``GET projects``                      ``{"projects": […]}``
``POST projects``                     ``{"name"?, "id"?}`` → ``{"id"}``; nobody has a role in it yet
``GET journal``                       ``{"calls": […]}``; query: ``method job_id operation_id subject code since``
``DELETE journal``                    forget all calls
``GET faults``                        ``{"faults": […]}``
``POST faults``                       arguments of ``Faults.inject`` → ``{"id"}``
``DELETE faults``, ``faults/{id}``    remove all, or one
``GET settings``, ``PATCH settings``  all settings; PATCH takes some and answers all
``GET iam``                           ``accounts``, ``roles``, ids of ``keys``
``POST iam/tokens``                   ``{"subject"?, "lifetime"?}`` → ``{"token", "subject", "expires_at"}``
``POST iam/revoke``                   ``{"token"?, "subject"?}`` → ``{"revoked": number}``
``POST iam/service-accounts``         ``{"name"}`` → ``{"id"}``
``POST iam/users``                    ``{"name"}`` → ``{"id"}``
``PUT iam/roles``                     ``{"subject", "project_id"?, "role"}``; role null takes it away
``POST iam/keys``                     ``{"service_account_id"?}`` → the authorized key
``DELETE iam/keys/{id}``              delete a key
``POST iam/oauth-tokens``             ``{"user"}`` → ``{"token"}``
``POST iam/impersonations``           ``{"caller"?, "service_account_id"}``: allow it
``POST jobs``                         arguments of ``Emulator.create_job`` → ``{"id"}``; a file's content is a string
                                      or ``{"base64": "…"}``
``POST scripted-jobs``                arguments of ``Emulator.create_scripted_job`` → ``{"id"}``
``GET jobs``                          ``{"jobs": […]}``; query: ``parent``
``GET jobs/{id}``                     the job
``DELETE jobs/{id}``                  delete it
``GET jobs/{id}/executions``          ``{"executions": number, "operation_id"}`` of the last one
``GET jobs/{id}/log``                 ``{"log": [{"source", "time", "base64"}]}``: its end; query: ``limit`` in bytes
``POST jobs/{id}/wait``               arguments of ``Emulator.wait_job`` → the job
``POST jobs/{id}/cancel``             arguments of ``Emulator.cancel_job``
``POST jobs/{id}/clear-data``         remove its files
``GET operations/{id}``               the operation
``DELETE operations/{id}``            let OperationService forget it
===================================== ==================================================================================

Jobs and operations are the protos' JSON with their own field names.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
from typing import TYPE_CHECKING, Any

from aiohttp import web
from google.protobuf import json_format
from google.protobuf.message import Message

from datasphere_emulator.errors import Refused
from datasphere_emulator.http_calls import HTTP_STATUS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from datasphere_emulator.core import Core

    Handler = Callable[[web.Request], Awaitable[Any]]

PREFIX = "/_control/"

#: Error answers: status by exception class, the first that fits.
_STATUSES: tuple[tuple[type[Exception], int], ...] = (
    (KeyError, 404),
    (TimeoutError, 408),
    (asyncio.TimeoutError, 408),
    (RuntimeError, 409),
    (PermissionError, 403),
    (ValueError, 400),
    (TypeError, 400),
    (AttributeError, 400),
)


def _error(error: Exception) -> web.Response:
    if isinstance(error, Refused):
        status, kind, message = HTTP_STATUS.get(error.code, 500), error.code, error.message
    else:
        status = next((status for kind_, status in _STATUSES if isinstance(error, kind_)), 500)
        kind = type(error).__name__
        # str() of a KeyError is the repr of its text.
        message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return web.json_response({"error": {"type": kind, "message": message}}, status=status)


def _plain(value: Any) -> Any:
    """Protos and dataclasses as JSON values."""
    if isinstance(value, Message):
        return json_format.MessageToDict(value, preserving_proto_field_name=True)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _answering(handle: Handler) -> Callable[[web.Request], Awaitable[web.Response]]:
    """Answer what the handler returns as JSON, and its exceptions as error documents."""

    async def answering(request: web.Request) -> web.Response:
        try:
            if "Origin" in request.headers:
                raise PermissionError("The control API is not for web pages.")
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
    body = json.loads(await request.text() or "{}")
    if not isinstance(body, dict):
        raise ValueError("The body must be a JSON object.")
    return body


async def _job_body(request: web.Request) -> dict[str, Any]:
    """Arguments for a new job; contents of files may have come as base64."""
    body = await _body(request)
    for field in ("files", "local_modules"):
        contents = body.get(field, {})
        for name, content in contents.items():
            if isinstance(content, dict):
                contents[name] = base64.b64decode(content["base64"])
    return body


class ControlHandlers:
    """The routes under ``/_control/``."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def add_routes(self, app: web.Application) -> None:
        """Add them all."""
        routes: list[tuple[str, str, Handler]] = [
            ("GET", "info", self._info),
            ("GET", "projects", self._projects),
            ("POST", "projects", self._add_project),
            ("GET", "journal", self._journal),
            ("DELETE", "journal", self._clear_journal),
            ("GET", "faults", self._faults),
            ("POST", "faults", self._inject),
            ("DELETE", "faults", self._clear_faults),
            ("DELETE", "faults/{id}", self._remove_fault),
            ("GET", "settings", self._settings),
            ("PATCH", "settings", self._change_settings),
            ("GET", "iam", self._iam),
            ("POST", "iam/tokens", self._issue_token),
            ("POST", "iam/revoke", self._revoke),
            ("POST", "iam/service-accounts", self._add_service_account),
            ("POST", "iam/users", self._add_user),
            ("PUT", "iam/roles", self._set_role),
            ("POST", "iam/keys", self._create_key),
            ("DELETE", "iam/keys/{id}", self._delete_key),
            ("POST", "iam/oauth-tokens", self._add_oauth_token),
            ("POST", "iam/impersonations", self._allow_impersonation),
            ("POST", "jobs", self._create_job),
            ("POST", "scripted-jobs", self._create_scripted_job),
            ("GET", "jobs", self._jobs),
            ("GET", "jobs/{id}", self._job),
            ("DELETE", "jobs/{id}", self._delete_job),
            ("GET", "jobs/{id}/executions", self._executions),
            ("GET", "jobs/{id}/log", self._log),
            ("POST", "jobs/{id}/wait", self._wait_job),
            ("POST", "jobs/{id}/cancel", self._cancel_job),
            ("POST", "jobs/{id}/clear-data", self._clear_data),
            ("GET", "operations/{id}", self._operation),
            ("DELETE", "operations/{id}", self._forget_operation),
        ]
        for method, path, handle in routes:
            app.router.add_route(method, PREFIX + path, _answering(handle))

    # The emulator

    async def _info(self, request: web.Request) -> Any:
        names = ("endpoint", "url", "project_id", "community_id", "service_account_id", "iam_token")
        return {name: getattr(self._core, name) for name in names}

    async def _projects(self, request: web.Request) -> Any:
        return {"projects": list(self._core.projects.values())}

    async def _add_project(self, request: web.Request) -> Any:
        return {"id": self._core.add_project(**await _body(request))}

    async def _journal(self, request: web.Request) -> Any:
        filters: dict[str, Any] = dict(request.query)
        if "since" in filters:
            filters["since"] = float(filters["since"])
        return {"calls": self._core.journal.calls(**filters)}

    async def _clear_journal(self, request: web.Request) -> None:
        self._core.journal.clear()

    async def _faults(self, request: web.Request) -> Any:
        return {"faults": self._core.faults.active()}

    async def _inject(self, request: web.Request) -> Any:
        return {"id": self._core.faults.inject(**await _body(request))}

    async def _clear_faults(self, request: web.Request) -> None:
        self._core.faults.clear()

    async def _remove_fault(self, request: web.Request) -> None:
        self._core.faults.remove(request.match_info["id"])

    async def _settings(self, request: web.Request) -> Any:
        return self._core.settings.to_json()

    async def _change_settings(self, request: web.Request) -> Any:
        self._core.settings.update(await _body(request))
        return self._core.settings.to_json()

    # Accounts

    async def _iam(self, request: web.Request) -> Any:
        state = self._core.iam.to_json()
        roles = [{"subject": subject, "project_id": project, "role": role} for subject, project, role in state["roles"]]
        return {"accounts": state["accounts"], "roles": roles, "keys": [key["id"] for key in state["keys"]]}

    async def _issue_token(self, request: web.Request) -> Any:
        body = {"subject": self._core.service_account_id, **await _body(request)}
        token = self._core.iam.issue_token(**body)
        return {"token": token, "subject": body["subject"], "expires_at": self._core.iam.expires_at(token)}

    async def _revoke(self, request: web.Request) -> Any:
        return {"revoked": self._core.iam.revoke(**await _body(request))}

    async def _add_service_account(self, request: web.Request) -> Any:
        return {"id": self._core.iam.add_service_account(**await _body(request))}

    async def _add_user(self, request: web.Request) -> Any:
        return {"id": self._core.iam.add_user(**await _body(request))}

    async def _set_role(self, request: web.Request) -> None:
        self._core.iam.set_role(**{"project_id": self._core.project_id, **await _body(request)})

    async def _create_key(self, request: web.Request) -> Any:
        body = {"service_account_id": self._core.service_account_id, **await _body(request)}
        # In a thread: finding two primes takes a good part of a second at times.
        return await asyncio.to_thread(self._core.iam.create_key, **body)

    async def _delete_key(self, request: web.Request) -> None:
        self._core.iam.delete_key(request.match_info["id"])

    async def _add_oauth_token(self, request: web.Request) -> Any:
        return {"token": self._core.iam.add_oauth_token(**await _body(request))}

    async def _allow_impersonation(self, request: web.Request) -> None:
        self._core.iam.allow_impersonation(**{"caller": self._core.service_account_id, **await _body(request)})

    # Jobs

    async def _create_job(self, request: web.Request) -> Any:
        return {"id": self._core.create_job(**await _job_body(request))}

    async def _create_scripted_job(self, request: web.Request) -> Any:
        return {"id": self._core.create_scripted_job(**await _job_body(request))}

    async def _jobs(self, request: web.Request) -> Any:
        return {"jobs": self._core.jobs(**request.query)}

    async def _job(self, request: web.Request) -> Any:
        return self._core.job(request.match_info["id"])

    async def _delete_job(self, request: web.Request) -> None:
        self._core.delete_job(request.match_info["id"])

    async def _executions(self, request: web.Request) -> Any:
        job_id = request.match_info["id"]
        return {"executions": self._core.executions(job_id), "operation_id": self._core.operation_of(job_id)}

    async def _log(self, request: web.Request) -> Any:
        limit = {"limit": int(request.query["limit"])} if "limit" in request.query else {}
        pieces = self._core.log_text(request.match_info["id"], **limit)
        log = [
            {"source": source, "time": time, "base64": base64.b64encode(content).decode()}
            for source, time, content in pieces
        ]
        return {"log": log}

    async def _wait_job(self, request: web.Request) -> Any:
        return await self._core.wait_job(request.match_info["id"], **await _body(request))

    async def _cancel_job(self, request: web.Request) -> None:
        self._core.cancel_job(request.match_info["id"], **await _body(request))

    async def _clear_data(self, request: web.Request) -> None:
        self._core.clear_data(request.match_info["id"])

    async def _operation(self, request: web.Request) -> Any:
        return self._core.operation(request.match_info["id"])

    async def _forget_operation(self, request: web.Request) -> None:
        self._core.forget_operation(request.match_info["id"])
