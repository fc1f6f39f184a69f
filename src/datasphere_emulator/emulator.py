"""The emulator for programs and tests, in a background thread of this process."""

from __future__ import annotations

import asyncio
import inspect
import os
import shutil
import sqlite3
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasphere_emulator.access import LOOPBACK, Access
from datasphere_emulator.control_client import ControlClient, connection_extra
from datasphere_emulator.faults import Faults
from datasphere_emulator.journal import Journal
from datasphere_emulator.listeners import Listeners, Ports
from datasphere_emulator.settings import Settings
from datasphere_emulator.state import EmulatorState
from datasphere_emulator.state_dir import StateError, StateLock, control_secret, prepare
from datasphere_emulator.tls import ensure_certificates

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

    As a context manager it starts on entry, and kills running programs on exit. :meth:`stop` and :meth:`kill` leave
    programs running, and the next :meth:`start` reattaches to them, on the same ports.

    :param settings: behaviour of the service; may be changed while it runs.
    :param tls: serve with a certificate of the emulator's own authority; False for plaintext.
    :param state_dir: folder of the state that survives restarts; None for a temporary folder, removed by :meth:`close`.
    :param host: address to listen on. The metadata service listens on loopback only unless ``metadata_port`` is
        given: it gives tokens to every client that reaches it.
    :param port: TCP port of gRPC; 0 for any free port. Likewise ``http_port`` and ``metadata_port``.
    :param public_host: host name in the addresses given to clients and in the certificate.
    :param certificate_hosts: further host names in the certificate, such as ``*.api.cloud.yandex.net`` where the real
        hosts are redirected to the emulator.
    :param keep_programs: let programs outlive this process; the next emulator on ``state_dir`` reattaches to them.
    :raises OSError: ``state_dir`` can't be used, or another emulator uses it.
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
        # Absolute: programs get paths in it, and run in folders of their own.
        self.state_dir = Path(state_dir or tempfile.mkdtemp(prefix="datasphere-emulator-")).absolute()
        prepare(self.state_dir)
        # The lock is held only while the emulator runs; here it shows that no other emulator uses the folder.
        self._lock = StateLock(self.state_dir)
        self._lock.acquire()
        self._lock.release()
        self.control_secret = control_secret(self.state_dir)
        self.journal = Journal(None if self._temporary else self.state_dir / "journal.jsonl")
        self._host = host
        self._metadata_host = host if metadata_port or host in LOOPBACK else "127.0.0.1"
        self._public_host = public_host
        self._ports = Ports(port, http_port, metadata_port)
        self._keep_programs = keep_programs
        names = (public_host, *certificate_hosts)
        self._access = Access(self.control_secret, (host, *names))
        self._certificates = ensure_certificates(self.state_dir / "tls", names) if tls else None
        self._state: EmulatorState | None = None
        self._iam: Iam | None = None
        self._key: dict[str, str] | None = None
        self._listeners: Listeners | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    # Start and stop

    def start(self) -> Self:
        """Start, or restart with the previous state, and return the emulator.

        :raises OSError: a port is taken, or another emulator uses the state folder.
        :raises RuntimeError: the emulator is running already.
        """
        if self._thread is not None:
            raise RuntimeError("The emulator is already running.")
        loop = self._loop = asyncio.new_event_loop()
        # With a client's loop in the same process grpc wakes this one spuriously and logs BlockingIOError.
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
        """Shut down gracefully: running calls get 0.2 seconds to end. Programs keep running."""
        self._stop(grace=_GRACE_SECONDS)

    def kill(self) -> None:
        """Stop abruptly, like a crash of the service. Programs keep running."""
        self._stop(grace=None, abrupt=True)

    def close(self) -> None:
        """Stop, kill programs unless ``keep_programs``, and remove the temporary state folder."""
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
        """Start in the running event loop, for programs that have their own.

        :raises OSError: a port is taken, or another emulator uses the state folder.
        """
        self._lock.acquire()
        try:
            await self._serve()
        except BaseException:
            self._lock.release()
            raise

    async def _serve(self) -> None:
        try:
            state = EmulatorState(
                self.state_dir,
                self.settings,
                self.journal,
                self.faults,
                iam=self._iam,
                url=lambda: self.url,
                endpoint=lambda: self.endpoint,
                owner=None if self._keep_programs else os.getpid(),
            )
        except (sqlite3.Error, ValueError, TypeError, KeyError) as error:
            raise StateError(
                f"Failed to read the state folder {self.state_dir} ({error!r}): it may be damaged, or written by "
                "another version. Use another folder."
            ) from error
        self._state, self._iam = state, state.iam
        self._listeners = Listeners(self._host, self._metadata_host, self._ports, self._certificates, self._access)
        try:
            await self._listeners.start(state)
        except BaseException:
            await self.end(grace=None)
            raise
        state.start()

    async def end(self, *, grace: float | None, abrupt: bool = False, kill_programs: bool = False) -> None:
        """Stop in the event loop of :meth:`serve`.

        :param grace: seconds that running calls get to end; None cancels them at once.
        :param abrupt: don't save anything, like a crash.
        :param kill_programs: kill the programs of running jobs.
        """
        state, listeners = self._state, self._listeners
        assert state is not None
        assert listeners is not None
        await listeners.stop(grace)
        await state.stop(kill_programs=kill_programs, abrupt=abrupt)
        self._state = self._listeners = None
        self._lock.release()

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
        """Call a function in the loop's thread and return its result."""
        if self._loop is None or self._thread is None:
            raise RuntimeError("The emulator is not running: use it as a context manager, or call start().")
        if threading.current_thread() is self._thread:
            raise RuntimeError("In the emulator's own thread use emulator.state instead.")

        async def call() -> Any:
            result = function(*arguments, **options)
            return await result if inspect.isawaitable(result) else result

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result()

    @property
    def keeps_state(self) -> bool:
        """Whether the state folder remains when the emulator is closed."""
        return not self._temporary

    @property
    def state(self) -> EmulatorState:
        """The state in the emulator's event loop, for code that runs in that loop."""
        if self._state is None:
            raise RuntimeError("The emulator is not running: use it as a context manager, or call start().")
        return self._state

    # Addresses and credentials

    def control_client(self) -> ControlClient:
        """Return a client of this emulator's control API, as another process would use it."""
        return ControlClient(self.url, self.root_certificates, self.control_secret)

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
        local = self._public_host == "localhost" or self._metadata_host != self._host
        host = "127.0.0.1" if local else self._public_host
        return f"{host}:{self._ports.metadata}"

    @property
    def root_certificates(self) -> Path | None:
        """PEM file of the certificate authority; None without TLS."""
        return None if self._certificates is None else self._certificates.authority

    @property
    def iam(self) -> Iam:
        """Accounts, tokens and roles."""
        if self._iam is None:
            raise RuntimeError("The emulator has not been started yet.")
        return self._iam

    @property
    def project_id(self) -> str:
        """The default project."""
        return self.state.project_id

    @property
    def community_id(self) -> str:
        """The community of all projects."""
        return self.state.community_id

    @property
    def service_account_id(self) -> str:
        """The default service account, a Developer in the default project."""
        return self.state.service_account_id

    @property
    def iam_token(self) -> str:
        """A valid token of the default service account."""
        return str(self._run(lambda: self.state.iam_token))

    def service_account_key(self) -> dict[str, str]:
        """Return an authorized key of the default service account in the format of ``yc iam key create``.

        Each call returns the same key.
        """
        if self._key is None:
            self._key = self.iam.create_key(self.service_account_id)
        return dict(self._key)

    def connection_extra(self, **overrides: Any) -> dict[str, Any]:
        """Return the extras of an Airflow connection of type ``datasphere`` to this emulator.

        :param overrides: further extras; None removes one.
        """
        facts = {name: getattr(self, name) for name in ("iam_token", "project_id", "endpoint", "url")}
        authority = self.root_certificates
        return connection_extra(facts, overrides, tls=authority is not None, root_certificates=str(authority))

    # Jobs and operations

    def add_project(self, name: str = "") -> str:
        """Create a project in which no account has a role yet; return its id."""
        return str(self._run(self.state.add_project, name))

    def create_job(self, cmd: str = "python main.py", *, execute: bool = False, **fields: Any) -> str:
        """Create a job with its files uploaded, ready to be executed or forked; return its id.

        :param cmd: command of the job, with ``${NAME}`` for variables and arguments.
        :param execute: also execute the job.
        :param fields: see :class:`~datasphere_emulator.job_draft.JobDraft`: ``files``, ``inputs``, ``args``…
        :raises TypeError: a field is unknown or of the wrong type.
        :raises ValueError: a value is invalid.
        """
        return str(self._run(self.state.create_job, cmd, execute=execute, **fields))

    def create_scripted_job(self, script: Script | list[Script], *, execute: bool = False, **fields: Any) -> str:
        """Create a job that is scripted, as are its forks; return its id.

        :param script: one script, or a list: each execution of the job or a fork uses the next, the last one repeats.
        :param execute: also execute the job.
        :param fields: as for :meth:`create_job`.
        :raises TypeError: a field is unknown or of the wrong type.
        :raises ValueError: a value is invalid, or the list of scripts is empty.
        """
        return str(self._run(self.state.create_scripted_job, script, execute=execute, **fields))

    def script_new_jobs(self, name: str, script: Script | list[Script]) -> None:
        """Have jobs that clients create with this name be scripted, as are their forks.

        :param script: one script, or a list: each execution uses the next, the last one repeats.
        :raises ValueError: the name, or the list of scripts, is empty.
        """
        self._run(self.state.script_new_jobs, name, script)

    def job(self, job_id: str) -> jobs_pb2.Job:
        """Return a copy of a job.

        :raises StatusError: NOT_FOUND.
        """
        job: jobs_pb2.Job = self._run(self.state.job, job_id)
        return job

    def jobs(self, parent: str | None = None) -> list[jobs_pb2.Job]:
        """Return copies of all jobs, oldest first.

        :param parent: id of a job; only its forks are returned.
        """
        jobs: list[jobs_pb2.Job] = self._run(self.state.jobs, parent)
        return jobs

    def operation(self, operation_id: str) -> operation_pb2.Operation:
        """Return an operation, even one that OperationService has forgotten.

        :raises StatusError: NOT_FOUND.
        """
        operation: operation_pb2.Operation = self._run(self.state.operation, operation_id)
        return operation

    def operation_of(self, job_id: str) -> str:
        """Return the id of the operation that executes a job, "" if it was never executed."""
        return str(self._run(self.state.operation_of, job_id))

    def executions(self, job_id: str) -> int:
        """Return how often a job was started."""
        return int(self._run(self.state.executions, job_id))

    def log_text(self, job_id: str, limit: int = 200_000) -> list[tuple[str, float, bytes]]:
        """Return the end of a job's log as tuples of source, time (seconds since the epoch) and content.

        :param limit: bytes.
        """
        text: list[tuple[str, float, bytes]] = self._run(self.state.log_text, job_id, limit)
        return text

    def wait_job(self, job_id: str, status: str | None = "SUCCESS", timeout: float = 30.0) -> jobs_pb2.Job:
        """Wait for a job and return a copy of it.

        :param status: name of the status to wait for; None waits for the job's end.
        :param timeout: seconds.
        :raises TimeoutError: the job didn't reach the status in time.
        :raises RuntimeError: the job ended with another status.
        """
        job: jobs_pb2.Job = self._run(self.state.wait_job, job_id, status, timeout)
        return job

    def cancel_job(self, job_id: str, *, graceful: bool = False, reason: str = "") -> None:
        """Cancel a job, as a person does in the web UI.

        :param graceful: send the shutdown signal of the job instead of killing it.
        :param reason: text for the job's status details.
        """
        self._run(self.state.cancel_job, job_id, graceful=graceful, reason=reason)

    def delete_job(self, job_id: str) -> None:
        """Delete a job, as a person does in the web UI.

        :raises StatusError: FAILED_PRECONDITION, the job is running.
        """
        self._run(self.state.delete_job, job_id)

    def clear_data(self, job_id: str) -> None:
        """Clear the data of a job, as a person does in the web UI.

        :raises StatusError: FAILED_PRECONDITION, the job is running.
        """
        self._run(self.state.clear_data, job_id)

    def forget_operation(self, operation_id: str) -> None:
        """Make OperationService forget an operation (NOT_FOUND); its job keeps running."""
        self._run(self.state.forget_operation, operation_id)


def _ignore_spurious_wakeups(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    if not isinstance(context.get("exception"), BlockingIOError):
        loop.default_exception_handler(context)
