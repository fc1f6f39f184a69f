"""The control API from another process: the methods of :class:`~datasphere_emulator.emulator.Emulator` over HTTP."""

from __future__ import annotations

import base64
import json
import ssl
import urllib.error
import urllib.parse
import urllib.request
from datetime import timedelta
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os

    from google.protobuf.message import Message
    from yandex.cloud.datasphere.v2.jobs import jobs_pb2
    from yandex.cloud.operation import operation_pb2

    from datasphere_emulator.script import Script

#: How much longer than the emulator the client waits, seconds.
_PATIENCE = 30.0

_EXCEPTIONS: dict[str, type[Exception]] = {
    "NOT_FOUND": LookupError,
    "KeyError": LookupError,
    "TimeoutError": TimeoutError,
    "RuntimeError": RuntimeError,
    "ValueError": ValueError,
    "TypeError": TypeError,
    "AttributeError": AttributeError,
    "PermissionError": PermissionError,
    "INVALID_ARGUMENT": ValueError,
}


class ControlClient:
    """Controls an emulator that runs in another process. Needs the standard library, and the stubs for jobs.

    Errors of the emulator come as the exceptions that the same method of ``Emulator`` raises; those that stand for a
    gRPC status as LookupError (NOT_FOUND), ValueError (INVALID_ARGUMENT) or RuntimeError, naming the status.

    :param url: base address of the emulator's web side.
    :param root_certificates: PEM file of its certificate authority; None for plaintext, or to trust the system's.
    """

    def __init__(self, url: str, root_certificates: str | os.PathLike[str] | None = None) -> None:
        self.url = url.rstrip("/")
        self._tls = None
        if self.url.startswith("https:"):
            self._tls = ssl.create_default_context(cafile=root_certificates)
        self.root_certificates = root_certificates
        self.journal = JournalClient(self)
        self.faults = FaultsClient(self)
        self.settings = SettingsClient(self)
        self.iam = IamClient(self)

    def request(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        query: dict[str, Any] | None = None,
        patience: float = 0.0,
    ) -> Any:
        """Call the control API and return its answer.

        :param path: below ``/_control/``.
        :param patience: seconds that the emulator may take by design.
        """
        address = f"{self.url}/_control/{path}"
        given = {name: value for name, value in (query or {}).items() if value is not None}
        if given:
            address += "?" + urllib.parse.urlencode(given)
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            address, data=data, method=method, headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=patience + _PATIENCE, context=self._tls) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            text = error.read().decode("utf-8", "replace")
            try:
                fault = json.loads(text)["error"]
            except (ValueError, KeyError, TypeError):
                raise RuntimeError(f"{method} {address}: HTTP {error.code}: {text[:500]}") from None
            kind = _EXCEPTIONS.get(fault["type"], RuntimeError)
            raise kind(f"{fault['type']}: {fault['message']}") from None

    def info(self) -> dict[str, str]:
        """Where the emulator is: ``endpoint``, ``url``, ``project_id``, ``community_id``, ``service_account_id``."""
        answer: dict[str, str] = self.request("GET", "info")
        return answer

    def __getattr__(self, name: str) -> str:
        if name in ("endpoint", "project_id", "community_id", "service_account_id"):
            return self.info()[name]
        raise AttributeError(name)

    @property
    def iam_token(self) -> str:
        """A new token of the default service account."""
        return str(self.request("POST", "iam/tokens", {})["token"])

    def service_account_key(self) -> dict[str, str]:
        """A new authorized key of the default service account."""
        answer: dict[str, str] = self.request("POST", "iam/keys", {})
        return answer

    def connection_extra(self, **overrides: Any) -> dict[str, Any]:
        """Extras of an Airflow connection of type ``datasphere`` to the emulator; None takes one away."""
        info = self.info()
        extra: dict[str, Any] = {
            "iam_token": self.iam_token,
            "project_id": info["project_id"],
            "endpoint": info["endpoint"],
            "ui_endpoint": info["url"],
        }
        if self._tls is None:
            extra["insecure"] = True
        elif self.root_certificates is not None:
            extra["root_certificates"] = str(self.root_certificates)
        extra.update(overrides)
        return {name: value for name, value in extra.items() if value is not None}

    def add_project(self, name: str = "") -> str:
        """See ``Emulator.add_project``."""
        return str(self.request("POST", "projects", {"name": name})["id"])

    def create_job(self, cmd: str = "python main.py", *, execute: bool = False, **fields: Any) -> str:
        """See ``Emulator.create_job``."""
        body = {"cmd": cmd, "execute": execute, **_plain_fields(fields)}
        return str(self.request("POST", "jobs", body)["id"])

    def create_scripted_job(self, script: Script | list[Script], *, execute: bool = False, **fields: Any) -> str:
        """See ``Emulator.create_scripted_job``."""
        scripts = script if isinstance(script, list) else [script]
        body = {"script": [item.to_json() for item in scripts], "execute": execute, **_plain_fields(fields)}
        return str(self.request("POST", "scripted-jobs", body)["id"])

    def job(self, job_id: str) -> jobs_pb2.Job:
        """The job as it is now."""
        return _job(self.request("GET", f"jobs/{job_id}"))

    def jobs(self, parent: str | None = None) -> list[jobs_pb2.Job]:
        """All jobs, oldest first. :param parent: only forks of this job."""
        return [_job(values) for values in self.request("GET", "jobs", query={"parent": parent})["jobs"]]

    def operation(self, operation_id: str) -> operation_pb2.Operation:
        """An operation as it is now, forgotten or not."""
        from yandex.cloud.operation import operation_pb2

        operation = operation_pb2.Operation()
        _parse(self.request("GET", f"operations/{operation_id}"), operation)
        return operation

    def executions(self, job_id: str) -> int:
        """How often a job was really started."""
        return int(self.request("GET", f"jobs/{job_id}/executions")["executions"])

    def operation_of(self, job_id: str) -> str:
        """Id of the operation of a job's execution, "" if it has none."""
        return str(self.request("GET", f"jobs/{job_id}/executions")["operation_id"])

    def log_text(self, job_id: str, limit: int = 200_000) -> list[tuple[str, float, bytes]]:
        """The end of a job's log: source, time in seconds since the epoch, content. :param limit: bytes."""
        log = self.request("GET", f"jobs/{job_id}/log", query={"limit": limit})["log"]
        return [(piece["source"], piece["time"], base64.b64decode(piece["base64"])) for piece in log]

    def wait_job(self, job_id: str, status: str | None = "SUCCESS", timeout: float = 30.0) -> jobs_pb2.Job:
        """See ``Emulator.wait_job``."""
        body = {"status": status, "timeout": timeout}
        return _job(self.request("POST", f"jobs/{job_id}/wait", body, patience=timeout))

    def cancel_job(self, job_id: str, *, graceful: bool = False, reason: str = "") -> None:
        """Cancel a job as another person would."""
        self.request("POST", f"jobs/{job_id}/cancel", {"graceful": graceful, "reason": reason})

    def delete_job(self, job_id: str) -> None:
        """Delete a job as another person would."""
        self.request("DELETE", f"jobs/{job_id}")

    def clear_data(self, job_id: str) -> None:
        """Clear a job's data as another person would."""
        self.request("POST", f"jobs/{job_id}/clear-data", {})

    def forget_operation(self, operation_id: str) -> None:
        """Let OperationService no longer know an operation; its job goes on."""
        self.request("DELETE", f"operations/{operation_id}")


class JournalClient:
    """The journal of calls."""

    def __init__(self, client: ControlClient) -> None:
        self._client = client

    def calls(self, method: str | None = None, **filters: Any) -> list[SimpleNamespace]:
        """Calls that pass every filter, oldest first, with the attributes of ``journal.Call``."""
        answer = self._client.request("GET", "journal", query={"method": method, **filters})
        return [SimpleNamespace(**values) for values in answer["calls"]]

    def count(self, method: str | None = None, **filters: Any) -> int:
        """Number of those calls."""
        return len(self.calls(method, **filters))

    def clear(self) -> None:
        """Forget all calls."""
        self._client.request("DELETE", "journal")


class FaultsClient:
    """The injected faults."""

    def __init__(self, client: ControlClient) -> None:
        self._client = client

    def inject(self, method: str, **fault: Any) -> str:
        """See ``Faults.inject``; returns the fault's id."""
        return str(self._client.request("POST", "faults", {"method": method, **fault})["id"])

    def active(self) -> list[dict[str, Any]]:
        """See ``Faults.active``."""
        answer: list[dict[str, Any]] = self._client.request("GET", "faults")["faults"]
        return answer

    def remove(self, id: str) -> None:
        """Take a fault away."""
        self._client.request("DELETE", f"faults/{id}")

    def clear(self) -> None:
        """Take all faults away."""
        self._client.request("DELETE", "faults")


class SettingsClient:
    """The settings, read and written one by one as attributes, or several at once."""

    def __init__(self, client: ControlClient) -> None:
        object.__setattr__(self, "_client", client)

    def to_json(self) -> dict[str, Any]:
        """All settings."""
        answer: dict[str, Any] = self._client.request("GET", "settings")
        return answer

    def update(self, values: dict[str, Any]) -> None:
        """Set several at once; nothing is changed if one of them is wrong."""
        self._client.request("PATCH", "settings", dict(values))

    def __getattr__(self, name: str) -> Any:
        try:
            return self.to_json()[name]
        except KeyError:
            raise AttributeError(f"There is no setting {name!r}.") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self.update({name: value})


class IamClient:
    """Accounts, tokens and roles."""

    def __init__(self, client: ControlClient) -> None:
        self._client = client

    def issue_token(self, subject: str | None = None, lifetime: float | None = None) -> str:
        """A new token. :param subject: the default service account if None. :param lifetime: seconds."""
        body = {name: value for name, value in (("subject", subject), ("lifetime", lifetime)) if value is not None}
        return str(self._client.request("POST", "iam/tokens", body)["token"])

    def revoke(self, token: str | None = None, subject: str | None = None) -> int:
        """Revoke one token, all of an account, or all; returns how many."""
        return int(self._client.request("POST", "iam/revoke", {"token": token, "subject": subject})["revoked"])

    def add_service_account(self, name: str) -> str:
        """Make a service account and return its id."""
        return str(self._client.request("POST", "iam/service-accounts", {"name": name})["id"])

    def add_user(self, name: str) -> str:
        """Make a user and return the id."""
        return str(self._client.request("POST", "iam/users", {"name": name})["id"])

    def set_role(self, subject: str, project_id: str, role: str | None) -> None:
        """Give an account a role in a project; None takes it away."""
        self._client.request("PUT", "iam/roles", {"subject": subject, "project_id": project_id, "role": role})

    def create_key(self, service_account_id: str) -> dict[str, str]:
        """Make an authorized key."""
        answer: dict[str, str] = self._client.request("POST", "iam/keys", {"service_account_id": service_account_id})
        return answer

    def delete_key(self, key_id: str) -> None:
        """Delete an authorized key."""
        self._client.request("DELETE", f"iam/keys/{key_id}")

    def add_oauth_token(self, user: str) -> str:
        """A new OAuth token of a user."""
        return str(self._client.request("POST", "iam/oauth-tokens", {"user": user})["token"])

    def allow_impersonation(self, caller: str, service_account_id: str) -> None:
        """Let the caller make tokens of a service account."""
        body = {"caller": caller, "service_account_id": service_account_id}
        self._client.request("POST", "iam/impersonations", body)


def _plain_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of a job draft as JSON values: bytes in base64, durations in seconds."""
    plain = dict(fields)
    for name in ("files", "local_modules"):
        if name in plain:
            plain[name] = {path: _plain_content(content) for path, content in plain[name].items()}
    if isinstance(plain.get("data_ttl"), timedelta):
        plain["data_ttl"] = plain["data_ttl"].total_seconds()
    return plain


def _plain_content(content: bytes | str) -> str | dict[str, str]:
    return content if isinstance(content, str) else {"base64": base64.b64encode(content).decode()}


def _parse(values: dict[str, Any], message: Message) -> None:
    # The Any fields of an operation name messages of the jobs service.
    from google.protobuf import json_format
    from yandex.cloud.datasphere.v2.jobs import project_job_service_pb2  # noqa: F401

    json_format.ParseDict(values, message, ignore_unknown_fields=True)


def _job(values: dict[str, Any]) -> jobs_pb2.Job:
    from yandex.cloud.datasphere.v2.jobs import jobs_pb2

    job = jobs_pb2.Job()
    _parse(values, job)
    return job
