"""Client of the control API: the methods of :class:`~datasphere_emulator.emulator.Emulator` from another process."""

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
    from collections.abc import Mapping

    from google.protobuf.message import Message
    from yandex.cloud.datasphere.v2.jobs import jobs_pb2
    from yandex.cloud.operation import operation_pb2

    from datasphere_emulator.script import Script

#: Time that a request may take besides an intended wait, seconds.
_REQUEST_TIMEOUT = 30.0

_EXCEPTIONS: dict[str, type[Exception]] = {
    "NOT_FOUND": LookupError,
    "KeyError": LookupError,
    "TimeoutError": TimeoutError,
    "RuntimeError": RuntimeError,
    "ValueError": ValueError,
    "TypeError": TypeError,
    "AttributeError": AttributeError,
    "PermissionError": PermissionError,
    "NoSecret": PermissionError,
    "INVALID_ARGUMENT": ValueError,
}


def connection_extra(
    facts: Mapping[str, str], overrides: Mapping[str, Any], *, tls: bool, root_certificates: str | None
) -> dict[str, Any]:
    """Return the extras of an Airflow connection of type ``datasphere`` to an emulator.

    :param facts: ``iam_token``, ``project_id``, ``endpoint`` and ``url`` of the emulator.
    :param root_certificates: PEM file of its certificate authority, None for the system's.
    :param overrides: further extras; None removes one.
    """
    extra: dict[str, Any] = {
        "iam_token": facts["iam_token"],
        "project_id": facts["project_id"],
        "endpoint": facts["endpoint"],
        "ui_endpoint": facts["url"],
        "insecure": None if tls else True,
        "root_certificates": root_certificates if tls else None,
        **overrides,
    }
    return {name: value for name, value in extra.items() if value is not None}


class ControlClient:
    """Controls an emulator in another process. Needs only the standard library, and the stubs for jobs.

    Methods raise the exceptions of the same method of ``Emulator``; a gRPC status is raised as LookupError (NOT_FOUND),
    ValueError (INVALID_ARGUMENT) or RuntimeError, and named in the message.

    :param url: base URL of the emulator's HTTP side.
    :param root_certificates: PEM file of its certificate authority; None for plaintext or the system's authorities.
    :param secret: secret of the control API: ``control_secret`` of the emulator or of its ready file.
    """

    def __init__(self, url: str, root_certificates: str | os.PathLike[str] | None = None, secret: str = "") -> None:
        self.url = url.rstrip("/")
        self._secret = secret
        self._tls = None
        if self.url.startswith("https:"):
            self._tls = ssl.create_default_context(cafile=root_certificates)
        self.root_certificates = root_certificates
        self.journal = JournalClient(self)
        self.faults = FaultsClient(self)
        self.settings = SettingsClient(self)
        self.iam = IamClient(self)

    @classmethod
    def from_ready_file(cls, path: str | os.PathLike[str]) -> ControlClient:
        """Return a client of the emulator that wrote this file (``datasphere-emulator serve --ready-file``)."""
        with open(path, encoding="utf-8") as file:
            facts = json.load(file)
        return cls(facts["url"], facts["root_certificates"], facts["control_secret"])

    def request(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        query: dict[str, Any] | None = None,
        wait: float = 0.0,
    ) -> Any:
        """Send a request to the control API and return its response.

        :param path: below ``/_control/``.
        :param body: JSON object to send.
        :param query: query parameters; None values are left out.
        :param wait: seconds that the emulator may wait before it responds.
        :raises LookupError, ValueError, TypeError, TimeoutError, PermissionError, RuntimeError: see the class.
        """
        address = f"{self.url}/_control/{path}"
        given = {name: value for name, value in (query or {}).items() if value is not None}
        if given:
            address += "?" + urllib.parse.urlencode(given)
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._secret}"}
        request = urllib.request.Request(address, data=data, method=method, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=wait + _REQUEST_TIMEOUT, context=self._tls) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            text = error.read().decode("utf-8", "replace")
            try:
                details = json.loads(text)["error"]
            except (ValueError, KeyError, TypeError):
                raise RuntimeError(f"{method} {address}: HTTP {error.code}: {text[:500]}") from None
            kind = _EXCEPTIONS.get(details["type"], RuntimeError)
            raise kind(f"{details['type']}: {details['message']}") from None

    def info(self) -> dict[str, str]:
        """Return ``endpoint``, ``url``, ``project_id``, ``community_id``, ``service_account_id`` and ``iam_token``."""
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
        """Return a new authorized key of the default service account."""
        answer: dict[str, str] = self.request("POST", "iam/keys", {})
        return answer

    def connection_extra(self, **overrides: Any) -> dict[str, Any]:
        """Return the extras of an Airflow connection of type ``datasphere`` to the emulator.

        :param overrides: further extras; None removes one.
        """
        facts = {**self.info(), "iam_token": self.iam_token}
        certificates = None if self.root_certificates is None else str(self.root_certificates)
        return connection_extra(facts, overrides, tls=self._tls is not None, root_certificates=certificates)

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

    def script_new_jobs(self, name: str, script: Script | list[Script]) -> None:
        """See ``Emulator.script_new_jobs``."""
        scripts = script if isinstance(script, list) else [script]
        self.request("POST", "new-job-scripts", {"name": name, "script": [item.to_json() for item in scripts]})

    def job(self, job_id: str) -> jobs_pb2.Job:
        """See ``Emulator.job``."""
        return _job(self.request("GET", f"jobs/{job_id}"))

    def jobs(self, parent: str | None = None) -> list[jobs_pb2.Job]:
        """See ``Emulator.jobs``."""
        return [_job(values) for values in self.request("GET", "jobs", query={"parent": parent})["jobs"]]

    def operation(self, operation_id: str) -> operation_pb2.Operation:
        """See ``Emulator.operation``."""
        from yandex.cloud.operation import operation_pb2

        operation = operation_pb2.Operation()
        _parse(self.request("GET", f"operations/{operation_id}"), operation)
        return operation

    def executions(self, job_id: str) -> int:
        """See ``Emulator.executions``."""
        return int(self.request("GET", f"jobs/{job_id}/executions")["executions"])

    def operation_of(self, job_id: str) -> str:
        """See ``Emulator.operation_of``."""
        return str(self.request("GET", f"jobs/{job_id}/executions")["operation_id"])

    def log_text(self, job_id: str, limit: int = 200_000) -> list[tuple[str, float, bytes]]:
        """See ``Emulator.log_text``."""
        log = self.request("GET", f"jobs/{job_id}/log", query={"limit": limit})["log"]
        return [(piece["source"], piece["time"], base64.b64decode(piece["base64"])) for piece in log]

    def wait_job(self, job_id: str, status: str | None = "SUCCESS", timeout: float = 30.0) -> jobs_pb2.Job:
        """See ``Emulator.wait_job``."""
        body = {"status": status, "timeout": timeout}
        return _job(self.request("POST", f"jobs/{job_id}/wait", body, wait=timeout))

    def cancel_job(self, job_id: str, *, graceful: bool = False, reason: str = "") -> None:
        """See ``Emulator.cancel_job``."""
        self.request("POST", f"jobs/{job_id}/cancel", {"graceful": graceful, "reason": reason})

    def delete_job(self, job_id: str) -> None:
        """See ``Emulator.delete_job``."""
        self.request("DELETE", f"jobs/{job_id}")

    def clear_data(self, job_id: str) -> None:
        """See ``Emulator.clear_data``."""
        self.request("POST", f"jobs/{job_id}/clear-data", {})

    def forget_operation(self, operation_id: str) -> None:
        """See ``Emulator.forget_operation``."""
        self.request("DELETE", f"operations/{operation_id}")


class JournalClient:
    """The journal of calls."""

    def __init__(self, client: ControlClient) -> None:
        self._client = client

    def calls(self, method: str | None = None, **filters: Any) -> list[SimpleNamespace]:
        """Return the calls that match all filters, oldest first, with the attributes of ``journal.Call``."""
        answer = self._client.request("GET", "journal", query={"method": method, **filters})
        return [SimpleNamespace(**values) for values in answer["calls"]]

    def count(self, method: str | None = None, **filters: Any) -> int:
        """Return the number of calls that match all filters."""
        return len(self.calls(method, **filters))

    def clear(self) -> None:
        """Delete all calls from the journal."""
        self._client.request("DELETE", "journal")


class FaultsClient:
    """The injected faults."""

    def __init__(self, client: ControlClient) -> None:
        self._client = client

    def inject(self, method: str, **fields: Any) -> str:
        """Inject a fault and return its id. :param fields: see ``Fault``; ``code`` by its name."""
        return str(self._client.request("POST", "faults", {"method": method, **fields})["id"])

    def active(self) -> list[dict[str, Any]]:
        """See ``Faults.active``."""
        answer: list[dict[str, Any]] = self._client.request("GET", "faults")["faults"]
        return answer

    def remove(self, id: str) -> None:
        """Remove a fault."""
        self._client.request("DELETE", f"faults/{id}")

    def clear(self) -> None:
        """Remove all faults."""
        self._client.request("DELETE", "faults")


class SettingsClient:
    """The settings: attributes, one request each, or several at once by :meth:`update`."""

    def __init__(self, client: ControlClient) -> None:
        object.__setattr__(self, "_client", client)

    def to_json(self) -> dict[str, Any]:
        """Return all settings."""
        answer: dict[str, Any] = self._client.request("GET", "settings")
        return answer

    def update(self, values: dict[str, Any]) -> None:
        """Set several settings at once, or none if a value is invalid.

        :raises AttributeError: there is no such setting.
        :raises ValueError: a value is invalid.
        """
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
        """Issue an IAM token.

        :param subject: account id; None for the default service account.
        :param lifetime: seconds; None for 12 hours.
        """
        body = {name: value for name, value in (("subject", subject), ("lifetime", lifetime)) if value is not None}
        return str(self._client.request("POST", "iam/tokens", body)["token"])

    def revoke(self, token: str | None = None, subject: str | None = None) -> int:
        """Revoke one token, all tokens of an account, or all; return how many."""
        return int(self._client.request("POST", "iam/revoke", {"token": token, "subject": subject})["revoked"])

    def add_service_account(self, name: str) -> str:
        """Create a service account and return its id."""
        return str(self._client.request("POST", "iam/service-accounts", {"name": name})["id"])

    def add_user(self, name: str) -> str:
        """Create a user and return its id."""
        return str(self._client.request("POST", "iam/users", {"name": name})["id"])

    def set_role(self, subject: str, project_id: str, role: str | None) -> None:
        """Give an account a role in a project; None removes it."""
        self._client.request("PUT", "iam/roles", {"subject": subject, "project_id": project_id, "role": role})

    def create_key(self, service_account_id: str) -> dict[str, str]:
        """Create an authorized key of a service account."""
        answer: dict[str, str] = self._client.request("POST", "iam/keys", {"service_account_id": service_account_id})
        return answer

    def delete_key(self, key_id: str) -> None:
        """Delete an authorized key; JWTs signed with it are rejected from then on."""
        self._client.request("DELETE", f"iam/keys/{key_id}")

    def add_oauth_token(self, user: str) -> str:
        """Create an OAuth token of a user."""
        return str(self._client.request("POST", "iam/oauth-tokens", {"user": user})["token"])

    def allow_impersonation(self, caller: str, service_account_id: str) -> None:
        """Allow an account to create tokens of a service account."""
        body = {"caller": caller, "service_account_id": service_account_id}
        self._client.request("POST", "iam/impersonations", body)


def _plain_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Convert the fields of a job draft to JSON values: bytes to base64, durations to seconds."""
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
