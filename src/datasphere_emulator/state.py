"""The state of an emulator in its event loop, with the methods of the control API.

All methods must be called in the loop's thread; :class:`~datasphere_emulator.emulator.Emulator` wraps them for others.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import sqlite3
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from yandex.cloud.datasphere.v2.jobs import jobs_pb2

from datasphere_emulator.control_fields import check_job
from datasphere_emulator.database import Database
from datasphere_emulator.errors import not_found
from datasphere_emulator.iam import Iam, new_id
from datasphere_emulator.job_draft import JobDraft
from datasphere_emulator.job_service import ANYBODY, JobService
from datasphere_emulator.jobs import Jobs
from datasphere_emulator.records import TERMINAL, JobStatus, Project, ScriptSeries
from datasphere_emulator.scheduler import Scheduler
from datasphere_emulator.script import Script
from datasphere_emulator.storage import Storage

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from yandex.cloud.operation import operation_pb2

    from datasphere_emulator.faults import Faults
    from datasphere_emulator.journal import Journal
    from datasphere_emulator.settings import Settings

logger = logging.getLogger(__name__)

#: Interval at which changed credentials are saved, seconds.
_IAM_SAVE_SECONDS = 0.2
_WAIT_POLL_SECONDS = 0.01


class EmulatorState:
    """State of an emulated DataSphere.

    :param state_dir: folder of the state that survives restarts.
    :param iam: accounts and tokens; None for those saved in ``state_dir``, or new ones.
    :param url: returns the base URL of the HTTP side.
    :param endpoint: returns ``host:port`` of gRPC.
    :param owner: id of the process with which programs end; None if they outlive the emulator.
    """

    def __init__(
        self,
        state_dir: Path,
        settings: Settings,
        journal: Journal,
        faults: Faults,
        *,
        iam: Iam | None,
        url: Callable[[], str],
        endpoint: Callable[[], str],
        owner: int | None,
    ) -> None:
        self.state_dir = state_dir
        self.settings = settings
        self.journal = journal
        self.faults = faults
        self._url = url
        self._endpoint = endpoint
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.database = Database(state_dir / "state.db")
        self.storage = Storage(state_dir / "storage", url, journal, faults, lambda: self.settings.url_lifetime_seconds)
        saved = self.database.get("meta", "iam")
        self.iam = iam or (Iam.from_json(saved) if saved else Iam())
        self._saved_iam: Any = saved
        self._iam_saver: asyncio.Task[None] | None = None
        self._ids: dict[str, str] = self.database.get("meta", "ids") or self._new_ids()
        self.projects = {id: Project(**value) for id, value in self.database.all("project").items()}
        if self.project_id not in self.projects:
            self.add_project("emulator", id=self.project_id)
            self.iam.set_role(self.service_account_id, self.project_id, "developer")
        self.registry = Jobs(
            state_dir,
            self.database,
            self.storage,
            settings,
            owner=owner,
            service_agent_token=lambda: self.iam.issue_token(self._ids["service_agent"]),
        )
        self._scheduler = Scheduler(self.registry)
        self.job_service = JobService(self.registry, self._scheduler, self.iam, settings, self.projects)

    def _new_ids(self) -> dict[str, str]:
        ids = {
            "community": new_id("bt1"),
            "project": new_id("bt1"),
            "service_agent": self.iam.add_service_account("service-agent"),
        }
        ids["iam_token"] = self.iam.issue_token(self.iam.default_service_account_id)
        self.database.put("meta", "ids", ids)
        return ids

    # Start and stop

    def start(self) -> None:
        """Start saving credentials and resume jobs that were running."""
        self.iam.audiences = (f"https://iam.{self.endpoint}/iam/v1/tokens",)
        self._save_iam()
        self._iam_saver = asyncio.get_running_loop().create_task(self._keep_saving_iam())
        self._scheduler.resume()

    async def stop(self, *, kill_programs: bool, abrupt: bool = False) -> None:
        """Stop all jobs' runs and close the database.

        :param kill_programs: kill the programs of running jobs.
        :param abrupt: don't save anything, like a crash.
        """
        if self._iam_saver is not None:
            self._iam_saver.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._iam_saver
        await self._scheduler.stop(kill=kill_programs)
        if not abrupt:
            self._save_iam()
        self.database.close()

    def _save_iam(self) -> None:
        state = self.iam.to_json()
        if state != self._saved_iam:
            self.database.put("meta", "iam", state)
            self._saved_iam = state

    async def _keep_saving_iam(self) -> None:
        while True:
            await asyncio.sleep(_IAM_SAVE_SECONDS)
            try:
                self._save_iam()
            except sqlite3.Error as error:
                logger.error("Failed to save new tokens and keys: %s; retrying.", error)

    # Addresses and credentials

    @property
    def url(self) -> str:
        """Base URL of files, pages and the control API."""
        return self._url()

    @property
    def endpoint(self) -> str:
        """``host:port`` of gRPC."""
        return self._endpoint()

    @property
    def project_id(self) -> str:
        """The default project."""
        return self._ids["project"]

    @property
    def community_id(self) -> str:
        """The community of all projects."""
        return self._ids["community"]

    @property
    def service_account_id(self) -> str:
        """The default service account, a Developer in the default project."""
        return self.iam.default_service_account_id

    @property
    def iam_token(self) -> str:
        """A valid token of the default service account; changes only when it has expired."""
        token = self._ids["iam_token"]
        with contextlib.suppress(Exception):
            self.iam.subject_of(token)
            return token
        self._ids["iam_token"] = self.iam.issue_token(self.service_account_id)
        self.database.put("meta", "ids", self._ids)
        return self._ids["iam_token"]

    def add_project(self, name: str = "", *, id: str = "") -> str:
        """Create a project in which no account has a role yet; return its id."""
        project = Project(id or new_id("bt1"), name, self.community_id, time.time(), self.service_account_id)
        self.projects[project.id] = project
        self.database.put("project", project.id, dataclasses.asdict(project))
        return project.id

    # Jobs

    def create_job(self, cmd: str = "python main.py", *, execute: bool = False, **fields: Any) -> str:
        """Create a job of the default service account with its files uploaded; return its id.

        :param execute: also execute the job.
        :param fields: see :class:`~datasphere_emulator.job_draft.JobDraft`.
        """
        return self._create({"cmd": cmd, **fields}, execute, "")

    def create_scripted_job(
        self, script: Script | dict[str, Any] | list[Any], *, execute: bool = False, **fields: Any
    ) -> str:
        """Create a job that is scripted, as are its forks; return its id.

        :param script: one script, or a list: each execution of the job or a fork uses the next, the last one repeats.
        :param execute: also execute the job.
        :param fields: see :class:`~datasphere_emulator.job_draft.JobDraft`.
        """
        fields.setdefault("cmd", "scripted")
        return self._create(fields, execute, self.registry.add_series(_series(script)))

    def script_new_jobs(self, name: str, script: Script | dict[str, Any] | list[Any]) -> None:
        """Have jobs that clients create with this name be scripted, as are their forks.

        :param script: one script, or a list: each execution uses the next, the last one repeats.
        """
        if not name:
            raise ValueError("name is empty: give the name of the jobs to be scripted.")
        self.registry.script_new_jobs(name, _series(script))

    def _create(self, fields: dict[str, Any], execute: bool, series_id: str) -> str:
        fields = {name: list(value) if isinstance(value, Iterator) else value for name, value in fields.items()}
        check_job(fields, [field.name for field in dataclasses.fields(JobDraft)])
        draft = JobDraft(**fields)
        if not draft.project_id:
            draft.project_id = self.project_id
        request, contents = draft.request()
        for content in contents:
            self.storage.put_bytes(draft.project_id, content)
        subject = self.service_account_id if draft.project_id == self.project_id else ANYBODY
        operation = self.job_service.create(subject, request, None, series_id, prepared=True)
        if draft.data_ttl is None:
            self.job_service.set_data_ttl(ANYBODY, operation.job_id, None)
        if execute:
            self.job_service.execute(subject, operation.job_id, None)
        return operation.job_id

    def job(self, job_id: str) -> jobs_pb2.Job:
        """Return a copy of a job. Raises StatusError (NOT_FOUND)."""
        job = jobs_pb2.Job()
        job.CopyFrom(self.registry.find(job_id).job)
        return job

    def jobs(self, parent: str | None = None) -> list[jobs_pb2.Job]:
        """Return copies of all jobs, oldest first. :param parent: id of a job; only its forks are returned."""
        self.registry.refresh(*self.registry)
        records = [record for record in self.registry if parent is None or record.job.parent_job_id == parent]
        return [self.job(record.id) for record in records]

    def operation(self, operation_id: str) -> operation_pb2.Operation:
        """Return an operation, even a forgotten one. Raises StatusError (NOT_FOUND)."""
        operations = self.registry.operations
        return operations.answer(operations.record(operation_id))

    def operation_of(self, job_id: str) -> str:
        """Return the id of the operation that executes a job, "" if it was never executed."""
        return self.registry.find(job_id).operation_id

    def executions(self, job_id: str) -> int:
        """Return how often a job was started."""
        return self.registry.find(job_id).executions

    def scratch(self, job_id: str) -> Path:
        """Return the folder in which a job's program runs."""
        return self.registry.folder(job_id)

    def log_text(self, job_id: str, limit: int = 200_000) -> list[tuple[str, float, bytes]]:
        """Return the end of a job's log as tuples of source, time (seconds since the epoch) and content.

        :param limit: bytes.
        """
        log = self.registry.log(self.registry.find(job_id).id)
        found: list[tuple[str, float, bytes]] = []
        for piece in reversed(log.pieces()):
            if limit <= 0:
                break
            found.append((piece.source, piece.time, log.content(piece, max(0, piece.size - limit))))
            limit -= piece.size
        return found[::-1]

    async def wait_job(self, job_id: str, status: str | None = "SUCCESS", timeout: float = 30.0) -> jobs_pb2.Job:
        """Wait for a job.

        :param status: name of the status to wait for; None waits for the job's end.
        :param timeout: seconds.
        :raises TimeoutError: the job didn't reach the status in time.
        :raises RuntimeError: the job ended with another status.
        """
        wanted = None if status is None else JobStatus.Value(status)
        deadline = time.monotonic() + timeout
        while True:
            record = self.registry.find(job_id)
            current = record.job.status
            if current == wanted and (wanted not in TERMINAL or not record.active):
                return self.job(job_id)
            if self.registry.has_ended(record):
                if wanted is None:
                    return self.job(job_id)
                name = JobStatus.Name(current) if current in JobStatus.values() else str(current)
                raise RuntimeError(f"Job {job_id} ended with {name}, not {status}: {record.job.status_details}")
            if time.monotonic() > deadline:
                name = JobStatus.Name(current) if current in JobStatus.values() else str(current)
                raise TimeoutError(f"Job {job_id} is {name} after {timeout} s, not {status or 'ended'}.")
            await asyncio.sleep(_WAIT_POLL_SECONDS)

    def cancel_job(self, job_id: str, *, graceful: bool = False, reason: str = "") -> None:
        """Cancel a job, as a person does in the web UI."""
        self.job_service.cancel(ANYBODY, job_id, reason, graceful)

    def delete_job(self, job_id: str) -> None:
        """Delete a job, as a person does in the web UI."""
        self.job_service.delete(ANYBODY, job_id)

    def clear_data(self, job_id: str) -> None:
        """Clear the data of a job, as a person does in the web UI."""
        self.job_service.delete_data(ANYBODY, job_id)

    def forget_operation(self, operation_id: str) -> None:
        """Make OperationService forget an operation (NOT_FOUND); its job keeps running."""
        if not operation_id:
            raise not_found("operation_id: is empty.")
        self.registry.operations.forget(operation_id)


def _series(script: Script | dict[str, Any] | list[Any]) -> ScriptSeries:
    scripts = script if isinstance(script, list) else [script]
    if not scripts:
        raise ValueError("script: the list is empty.")
    return ScriptSeries([item if isinstance(item, Script) else Script.from_json(item) for item in scripts])
