"""The whole emulator inside one event loop: state, rules, and what tests and the control API may do to them.

All methods are called in the loop's thread; :class:`~datasphere_emulator.emulator.Emulator` offers them to others.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from typing import TYPE_CHECKING, Any

from yandex.cloud.datasphere.v2.jobs import jobs_pb2

from datasphere_emulator.building import JobDraft
from datasphere_emulator.errors import not_found
from datasphere_emulator.executions import Executions
from datasphere_emulator.iam import Iam, new_id
from datasphere_emulator.jobs import Jobs
from datasphere_emulator.records import TERMINAL, JobStatus, Project, ScriptSeries
from datasphere_emulator.script import Script
from datasphere_emulator.service import ANYBODY, JobService
from datasphere_emulator.storage import Storage
from datasphere_emulator.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from yandex.cloud.operation import operation_pb2

    from datasphere_emulator.faults import Faults
    from datasphere_emulator.journal import Journal
    from datasphere_emulator.settings import Settings

#: How often credentials are written down if they have changed, seconds.
_IAM_SAVE_SECONDS = 0.2
_WAIT_POLL_SECONDS = 0.01


class Core:
    """One emulated DataSphere.

    :param state_dir: what survives a restart lies here.
    :param iam: accounts and tokens to go on with; None for those in ``state_dir``, or new ones.
    :param url: gives the base address of the web side.
    :param endpoint: gives the address of the gRPC side.
    :param owner: process id without which programs must not live, None if they outlive the emulator.
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
        self.store = Store(state_dir / "state.db")
        self.storage = Storage(state_dir / "storage", url, journal, faults, lambda: self.settings.url_lifetime_seconds)
        saved = self.store.get("meta", "iam")
        self.iam = iam or (Iam.from_json(saved) if saved else Iam())
        self._saved_iam: Any = saved
        self._iam_saver: asyncio.Task[None] | None = None
        self._ids: dict[str, str] = self.store.get("meta", "ids") or self._new_ids()
        self.projects = {id: Project(**value) for id, value in self.store.all("project").items()}
        if self.project_id not in self.projects:
            self.add_project("emulator", id=self.project_id)
            self.iam.set_role(self.service_account_id, self.project_id, "developer")
        self.registry = Jobs(
            state_dir,
            self.store,
            self.storage,
            settings,
            owner=owner,
            service_agent_token=lambda: self.iam.issue_token(self._ids["service_agent"]),
        )
        self._executions = Executions(self.registry)
        self.service = JobService(self.registry, self._executions, self.iam, settings, self.projects)

    def _new_ids(self) -> dict[str, str]:
        ids = {
            "community": new_id("bt1"),
            "project": new_id("bt1"),
            "service_agent": self.iam.add_service_account("service-agent"),
        }
        ids["iam_token"] = self.iam.issue_token(self.iam.default_service_account_id)
        self.store.put("meta", "ids", ids)
        return ids

    # Start and stop

    def start(self) -> None:
        """Go on with jobs that were running."""
        self.iam.audiences = (f"https://iam.{self.endpoint}/iam/v1/tokens",)
        self._save_iam()
        self._iam_saver = asyncio.get_running_loop().create_task(self._keep_saving_iam())
        self._executions.resume()

    async def stop(self, *, kill_programs: bool, abrupt: bool = False) -> None:
        """Let go of everything. :param abrupt: as if the process were killed: nothing more is written down."""
        if self._iam_saver is not None:
            self._iam_saver.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._iam_saver
        await self._executions.stop(kill=kill_programs)
        if not abrupt:
            self._save_iam()
        self.store.close()

    def _save_iam(self) -> None:
        state = self.iam.to_json()
        if state != self._saved_iam:
            self.store.put("meta", "iam", state)
            self._saved_iam = state

    async def _keep_saving_iam(self) -> None:
        while True:
            await asyncio.sleep(_IAM_SAVE_SECONDS)
            self._save_iam()

    # Who and where

    @property
    def url(self) -> str:
        """Base address of the web side."""
        return self._url()

    @property
    def endpoint(self) -> str:
        """Address of the gRPC side, ``host:port``."""
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
        """A valid token of the default service account, the same as long as it is valid."""
        token = self._ids["iam_token"]
        with contextlib.suppress(Exception):
            self.iam.subject_of(token)
            return token
        self._ids["iam_token"] = self.iam.issue_token(self.service_account_id)
        self.store.put("meta", "ids", self._ids)
        return self._ids["iam_token"]

    def add_project(self, name: str = "", *, id: str = "") -> str:
        """Make a project in the community; nobody has a role in it yet. Returns its id."""
        project = Project(id or new_id("bt1"), name, self.community_id, time.time(), self.service_account_id)
        self.projects[project.id] = project
        self.store.put("project", project.id, dataclasses.asdict(project))
        return project.id

    # Jobs

    def create_job(self, cmd: str = "python main.py", *, execute: bool = False, **fields: Any) -> str:
        """A job made by the default service account, its files uploaded; returns its id.

        :param execute: run it as well.
        :param fields: see :class:`~datasphere_emulator.building.JobDraft`.
        """
        return self._create(JobDraft(cmd, **fields), execute, "")

    def create_scripted_job(
        self, script: Script | dict[str, Any] | list[Any], *, execute: bool = False, **fields: Any
    ) -> str:
        """A job that acts a script, and so do its forks; returns its id.

        :param script: one, or a list: each execution of the job or a fork takes the next, the last one repeats.
        :param execute: run it as well.
        :param fields: see :class:`~datasphere_emulator.building.JobDraft`.
        """
        scripts = script if isinstance(script, list) else [script]
        if not scripts:
            raise ValueError("script: the list is empty.")
        series = ScriptSeries([item if isinstance(item, Script) else Script.from_json(item) for item in scripts])
        fields.setdefault("cmd", "scripted")
        return self._create(JobDraft(**fields), execute, self.registry.add_series(series))

    def _create(self, draft: JobDraft, execute: bool, series_id: str) -> str:
        if not draft.project_id:
            draft.project_id = self.project_id
        request, contents = draft.request()
        for content in contents:
            self.storage.put_bytes(draft.project_id, content)
        subject = self.service_account_id if draft.project_id == self.project_id else ANYBODY
        operation = self.service.create(subject, request, None, series_id)
        if draft.data_ttl is None:
            self.service.set_data_ttl(ANYBODY, operation.job_id, None)
        if execute:
            # Whoever asks for this wants the job to run, however slow creation is set to be.
            operation.ready_at = 0.0
            self.service.execute(subject, operation.job_id, None)
        return operation.job_id

    def job(self, job_id: str) -> jobs_pb2.Job:
        """A copy of the job as it is now; raises Refused (NOT_FOUND)."""
        job = jobs_pb2.Job()
        job.CopyFrom(self.registry.find(job_id).job)
        return job

    def jobs(self, parent: str | None = None) -> list[jobs_pb2.Job]:
        """Copies of all jobs, oldest first. :param parent: only forks of this job."""
        self.registry.expire(*self.registry)
        records = [record for record in self.registry if parent is None or record.job.parent_job_id == parent]
        return [self.job(record.id) for record in records]

    def operation(self, operation_id: str) -> operation_pb2.Operation:
        """An operation as it is now, forgotten or not; raises Refused (NOT_FOUND)."""
        operations = self.registry.operations
        return operations.answer(operations.record(operation_id))

    def operation_of(self, job_id: str) -> str:
        """Id of the operation of a job's execution, "" if it has none."""
        return self.registry.find(job_id).operation_id

    def executions(self, job_id: str) -> int:
        """How often a job was really started."""
        return self.registry.find(job_id).executions

    def scratch(self, job_id: str) -> Path:
        """The folder a job's program runs in."""
        return self.registry.folder(job_id)

    def log_text(self, job_id: str, limit: int = 200_000) -> list[tuple[str, float, bytes]]:
        """The end of a job's log: source, time in seconds since the epoch, content.

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

        :param status: name of the status to wait for; None for any end.
        :param timeout: seconds.
        :raises TimeoutError: it took longer.
        :raises RuntimeError: it ended with another status.
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
        """Cancel a job as another person would in the web UI."""
        self.service.cancel(ANYBODY, job_id, reason, graceful)

    def delete_job(self, job_id: str) -> None:
        """Delete a job as another person would."""
        self.service.delete(ANYBODY, job_id)

    def clear_data(self, job_id: str) -> None:
        """Clear a job's data as another person would."""
        self.service.delete_data(ANYBODY, job_id)

    def forget_operation(self, operation_id: str) -> None:
        """Let OperationService no longer know an operation; its job goes on."""
        if not operation_id:
            raise not_found("operation_id: is empty.")
        self.registry.operations.forget(operation_id)
