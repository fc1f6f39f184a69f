"""The emulator for programs and tests: in a background thread of this process."""

from __future__ import annotations

import asyncio
import inspect
import os
import shutil
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasphere_emulator.core import Core
from datasphere_emulator.faults import Faults
from datasphere_emulator.journal import Journal
from datasphere_emulator.server import Ports, Servers
from datasphere_emulator.settings import Settings
from datasphere_emulator.tls import Certificates, ensure_certificates

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

    from typing_extensions import Self
    from yandex.cloud.datasphere.v2.jobs import jobs_pb2
    from yandex.cloud.operation import operation_pb2

    from datasphere_emulator.iam import Iam
    from datasphere_emulator.script import Script

_GRACE_SECONDS = 0.2


class Emulator:
    """DataSphere Jobs on localhost.

    As a context manager it starts, and at the end kills what still runs. :meth:`stop` and :meth:`kill` leave programs
    running, and the next :meth:`start` goes on with them, on the same ports.

    :param settings: may be changed while it runs.
    :param tls: with the emulator's own certificate authority; False for plaintext.
    :param state_dir: what survives a restart; None for a temporary folder, removed at the end.
    :param host: address to listen on.
    :param port: of gRPC; 0 for any free one. The same for ``http_port`` and ``metadata_port``.
    :param public_host: name in the addresses that the emulator tells clients, and in its certificate.
    :param certificate_hosts: further names that the certificate is good for, such as ``*.api.cloud.yandex.net`` where
        the real hosts are redirected to the emulator.
    :param keep_programs: let programs outlive this process; the next emulator on ``state_dir`` goes on with them.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        tls: bool = True,
        state_dir: str | os.PathLike[str] | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        http_port: int = 0,
        metadata_port: int = 0,
        public_host: str = "localhost",
        certificate_hosts: Iterable[str] = (),
        keep_programs: bool = False,
    ) -> None:
        self.settings = settings or Settings()
        self.faults = Faults()
        self._temporary = state_dir is None
        self.state_dir = Path(tempfile.mkdtemp(prefix="datasphere-emulator-") if state_dir is None else state_dir)
        self.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.journal = Journal(None if self._temporary else self.state_dir / "journal.jsonl")
        self._host = host
        self._public_host = public_host
        self._ports = Ports(port, http_port, metadata_port)
        self._keep_programs = keep_programs
        self._certificates: Certificates | None = None
        if tls:
            self._certificates = ensure_certificates(self.state_dir / "tls", (public_host, *certificate_hosts))
        self._core: Core | None = None
        self._iam: Iam | None = None
        self._key: dict[str, str] | None = None
        self._servers: Servers | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    # Start and stop

    def start(self) -> Self:
        """Start, or start again, with what was before; returns itself.

        :raises OSError: a port is taken.
        """
        if self._thread is not None:
            raise RuntimeError("The emulator runs already.")
        loop = self._loop = asyncio.new_event_loop()
        # A client's loop in this process makes grpc wake this one for nothing; grpc then logs BlockingIOError.
        loop.set_exception_handler(_ignore_spurious_wakeups)
        self._thread = threading.Thread(target=loop.run_forever, name="datasphere-emulator", daemon=True)
        self._thread.start()
        try:
            self._run(self.serve)
        except BaseException:
            self._end_loop()
            raise
        return self

    def stop(self) -> None:
        """Stop as a service that is shut down: running calls end first. Programs go on."""
        self._stop(grace=_GRACE_SECONDS)

    def kill(self) -> None:
        """Stop abruptly, as if the service's machine were switched off. Programs go on."""
        self._stop(grace=None, abrupt=True)

    def close(self) -> None:
        """Stop for good: kill programs, remove the temporary state."""
        if self._thread is not None:
            self._stop(grace=_GRACE_SECONDS, kill_programs=not self._keep_programs)
        self.journal.close()
        if self._temporary:
            shutil.rmtree(self.state_dir, ignore_errors=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def serve(self) -> None:
        """Start within the running loop, which is this emulator's own from now on."""
        core = Core(
            self.state_dir,
            self.settings,
            self.journal,
            self.faults,
            iam=self._iam,
            url=lambda: self.url,
            endpoint=lambda: self.endpoint,
            owner=None if self._keep_programs else os.getpid(),
        )
        self._core, self._iam = core, core.iam
        self._servers = Servers(self._host, self._ports, self._certificates)
        try:
            await self._servers.start(core)
        except BaseException:
            await self.end(grace=None)
            raise
        core.start()

    async def end(self, *, grace: float | None, abrupt: bool = False, kill_programs: bool = False) -> None:
        """Stop within the loop of :meth:`serve`. :param grace: seconds that running calls get to end."""
        core, servers = self._core, self._servers
        assert core is not None
        assert servers is not None
        await servers.stop(grace)
        await core.stop(kill_programs=kill_programs, abrupt=abrupt)
        self._core = self._servers = None

    def _stop(self, *, grace: float | None, abrupt: bool = False, kill_programs: bool = False) -> None:
        self._run(self.end, grace=grace, abrupt=abrupt, kill_programs=kill_programs)
        self._end_loop()

    def _end_loop(self) -> None:
        loop, thread = self._loop, self._thread
        assert loop is not None
        assert thread is not None

        async def finish() -> None:
            rest = asyncio.all_tasks() - {asyncio.current_task()}
            for task in rest:
                task.cancel()
            await asyncio.gather(*rest, return_exceptions=True)
            await loop.shutdown_asyncgens()
            await loop.shutdown_default_executor()

        asyncio.run_coroutine_threadsafe(finish(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
        self._loop = self._thread = None

    def _run(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call a function in the loop's thread, wait for it, and give back what it returns or raises."""
        if self._loop is None or self._thread is None:
            raise RuntimeError("The emulator doesn't run: use it as a context manager, or call start().")
        if threading.current_thread() is self._thread:
            raise RuntimeError("The emulator's own thread must use its core.")

        async def call() -> Any:
            result = function(*arguments, **options)
            return await result if inspect.isawaitable(result) else result

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result()

    @property
    def keeps_state(self) -> bool:
        """Whether the state stays when the emulator is closed."""
        return not self._temporary

    @property
    def core(self) -> Core:
        """What lives in the emulator's loop, for code that runs there too."""
        if self._core is None:
            raise RuntimeError("The emulator doesn't run: use it as a context manager, or call start().")
        return self._core

    # Where and who

    @property
    def endpoint(self) -> str:
        """``host:port`` of gRPC."""
        return f"{self._public_host}:{self._ports.grpc}"

    @property
    def url(self) -> str:
        """Base address of files, pages and the control API."""
        scheme = "http" if self._certificates is None else "https"
        return f"{scheme}://{self._public_host}:{self._ports.http}"

    @property
    def metadata_address(self) -> str:
        """``host:port`` of the metadata service, for ``YC_METADATA_ADDR``. Always plaintext."""
        host = "127.0.0.1" if self._public_host == "localhost" else self._public_host
        return f"{host}:{self._ports.metadata}"

    @property
    def root_certificates(self) -> Path | None:
        """PEM file of the certificate authority, None without TLS."""
        return None if self._certificates is None else self._certificates.authority

    @property
    def iam(self) -> Iam:
        """Accounts, tokens and roles."""
        if self._iam is None:
            raise RuntimeError("The emulator hasn't been started yet.")
        return self._iam

    @property
    def project_id(self) -> str:
        """The default project."""
        return self.core.project_id

    @property
    def community_id(self) -> str:
        """The community of all projects."""
        return self.core.community_id

    @property
    def service_account_id(self) -> str:
        """The default service account, a Developer in the default project."""
        return self.core.service_account_id

    @property
    def iam_token(self) -> str:
        """A valid token of the default service account."""
        return str(self._run(lambda: self.core.iam_token))

    def service_account_key(self) -> dict[str, str]:
        """An authorized key of the default service account, as ``yc iam key create`` writes it; the same each time."""
        if self._key is None:
            self._key = self.iam.create_key(self.service_account_id)
        return dict(self._key)

    def connection_extra(self, **overrides: Any) -> dict[str, Any]:
        """Extras of an Airflow connection of type ``datasphere`` to this emulator.

        :param overrides: further extras; None takes one away.
        """
        extra: dict[str, Any] = {
            "iam_token": self.iam_token,
            "project_id": self.project_id,
            "endpoint": self.endpoint,
            "ui_endpoint": self.url,
        }
        if self.root_certificates is None:
            extra["insecure"] = True
        else:
            extra["root_certificates"] = str(self.root_certificates)
        extra.update(overrides)
        return {name: value for name, value in extra.items() if value is not None}

    # What tests do

    def add_project(self, name: str = "") -> str:
        """Make another project; nobody has a role in it yet. Returns its id."""
        return str(self._run(self.core.add_project, name))

    def create_job(self, cmd: str = "python main.py", *, execute: bool = False, **fields: Any) -> str:
        """A job ready to be executed or forked; returns its id.

        :param execute: run it as well.
        :param fields: see :class:`~datasphere_emulator.building.JobDraft`: ``files``, ``inputs``, ``args``…
        """
        return str(self._run(self.core.create_job, cmd, execute=execute, **fields))

    def create_scripted_job(self, script: Script | list[Script], *, execute: bool = False, **fields: Any) -> str:
        """A job that acts a script, and so do its forks; returns its id.

        :param script: one, or a list: each execution of the job or a fork takes the next, the last one repeats.
        :param execute: run it as well.
        :param fields: as for :meth:`create_job`.
        """
        return str(self._run(self.core.create_scripted_job, script, execute=execute, **fields))

    def job(self, job_id: str) -> jobs_pb2.Job:
        """A copy of the job as it is now."""
        job: jobs_pb2.Job = self._run(self.core.job, job_id)
        return job

    def jobs(self, parent: str | None = None) -> list[jobs_pb2.Job]:
        """Copies of all jobs, oldest first. :param parent: only forks of this job."""
        jobs: list[jobs_pb2.Job] = self._run(self.core.jobs, parent)
        return jobs

    def operation(self, operation_id: str) -> operation_pb2.Operation:
        """An operation as it is now, forgotten or not."""
        operation: operation_pb2.Operation = self._run(self.core.operation, operation_id)
        return operation

    def operation_of(self, job_id: str) -> str:
        """Id of the operation of a job's execution, "" if it has none."""
        return str(self._run(self.core.operation_of, job_id))

    def executions(self, job_id: str) -> int:
        """How often a job was really started."""
        return int(self._run(self.core.executions, job_id))

    def log_text(self, job_id: str, limit: int = 200_000) -> list[tuple[str, float, bytes]]:
        """The end of a job's log: source, time in seconds since the epoch, content. :param limit: bytes."""
        text: list[tuple[str, float, bytes]] = self._run(self.core.log_text, job_id, limit)
        return text

    def wait_job(self, job_id: str, status: str | None = "SUCCESS", timeout: float = 30.0) -> jobs_pb2.Job:
        """Wait for a job and return a copy of it.

        :param status: name of the status to wait for; None for any end.
        :param timeout: seconds.
        :raises TimeoutError: it took longer.
        :raises RuntimeError: it ended with another status.
        """
        job: jobs_pb2.Job = self._run(self.core.wait_job, job_id, status, timeout)
        return job

    def cancel_job(self, job_id: str, *, graceful: bool = False, reason: str = "") -> None:
        """Cancel a job as another person would."""
        self._run(self.core.cancel_job, job_id, graceful=graceful, reason=reason)

    def delete_job(self, job_id: str) -> None:
        """Delete a job as another person would."""
        self._run(self.core.delete_job, job_id)

    def clear_data(self, job_id: str) -> None:
        """Clear a job's data as another person would."""
        self._run(self.core.clear_data, job_id)

    def forget_operation(self, operation_id: str) -> None:
        """Let OperationService no longer know an operation; its job goes on."""
        self._run(self.core.forget_operation, operation_id)


def _ignore_spurious_wakeups(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    if not isinstance(context.get("exception"), BlockingIOError):
        loop.default_exception_handler(context)
