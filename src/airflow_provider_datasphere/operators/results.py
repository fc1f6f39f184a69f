"""Bringing a job's files to a folder or an object store."""

from __future__ import annotations

import os
import re
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_provider_datasphere.arguments import is_literal, path_as_text
from airflow_provider_datasphere.compat import BaseOperator
from airflow_provider_datasphere.exceptions import JobRequestError, airflow_side, translated

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import PurePosixPath

    from airflow_provider_datasphere.client.destinations import Destination
    from airflow_provider_datasphere.client.jobs import DataSphereClient
    from airflow_provider_datasphere.compat import Context, ObjectStoragePath

_URI = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")


class DownloadJobResultsOperator(BaseOperator):
    """Download the output files of an ended DataSphere job to a folder or an object store.

    Files stream through bounded memory, several at once, resume where a connection breaks, and are checked against
    the size and sha256 that the job recorded before they get their final names. Relative paths are kept below
    ``destination``, directories are unpacked. Running it again fetches only what isn't right yet. A failed or
    cancelled job's outputs are downloaded as far as they exist.

    .. seealso:: ``docs/results.md``; RPCs ``Get`` and ``DownloadJobFiles`` of ``ProjectJobService``.

    :param job_id: the job. (templated)
    :param destination: a folder on the worker's own disk, or an object-store URI such as
        ``s3://my_connection@bucket/prefix`` (anything ``ObjectStoragePath`` takes). (templated)
    :param files: glob patterns over the paths and vars of outputs; None for all outputs. (templated)
    :param with_logs: download the job's log files too.
    :param with_diagnostics: download its diagnostic files too.
    :param max_parallel: how many files at once, and how many connections for all of them; to an object store at most 3,
        which bounds the memory.
    :param datasphere_conn_id: the connection. (templated)
    :return: the manifest, one mapping per file: ``path``, ``var``, ``kind`` (``output``, ``log``, ``diagnostic``),
        ``size_bytes``, ``sha256``, and ``uri`` where it is now (of an unpacked directory, ending with a slash).
    :raises ResultsError: the job still runs, or files are incomplete or don't match what it recorded; names each.
        Not retried where the job's data are gone.
    :raises JobRequestError: no such job, nothing fits ``files``; not retried.
    """

    template_fields: Sequence[str] = ("job_id", "destination", "files", "datasphere_conn_id")
    template_fields_renderers = {"files": "json"}  # noqa: RUF012 -- Airflow's own idiom
    ui_color = "#dbe9ff"

    def __init__(
        self,
        *,
        job_id: str,
        destination: str | Path | ObjectStoragePath,
        files: Sequence[str] | None = None,
        with_logs: bool = False,
        with_diagnostics: bool = False,
        max_parallel: int = 8,
        datasphere_conn_id: str = "datasphere_default",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.job_id = job_id
        # A path object would be rendered field by field, or not at all; its address is one template.
        self.destination = path_as_text(destination)
        self.files = files
        self.with_logs = with_logs
        self.with_diagnostics = with_diagnostics
        self.max_parallel = max_parallel
        self.datasphere_conn_id = datasphere_conn_id
        self._client: DataSphereClient | None = None
        if is_literal(max_parallel) and (type(max_parallel) is not int or max_parallel < 1):
            raise JobRequestError(f"max_parallel is {max_parallel!r}: give a number of files, 1 or more.")
        if is_literal(files):
            self._check_files()
        if is_literal(self.destination):
            self._check_destination()

    def _check_files(self) -> None:
        files: Any = self.files
        if files is not None and (
            isinstance(files, str) or not all(isinstance(pattern, str) and pattern for pattern in files)
        ):
            raise JobRequestError(
                f"files is {files!r}: give a list of glob patterns such as ['*.csv'], or None for all."
            )

    def _check_destination(self) -> None:
        if not self.destination:
            raise JobRequestError("destination is empty: give a folder or an object-store URI.")
        if str(self.destination).startswith("datasphere://"):
            raise JobRequestError(f"destination is {self.destination!r}: a job's files can't be changed.")

    def execute(self, context: Context) -> list[dict[str, Any]]:
        from airflow_provider_datasphere.client.download import download_job_files
        from airflow_provider_datasphere.client.fork import check_job_id
        from airflow_provider_datasphere.client.results import ResultsGoneError
        from airflow_provider_datasphere.hooks.datasphere import DataSphereHook

        with translated():
            check_job_id("job_id", self.job_id, "give the id of a job, as ForkJobOperator returns it")
        self._check_files()
        self._check_destination()
        self._client = client = DataSphereHook(self.datasphere_conn_id).get_conn()
        self.log.info("Job %s: its files go to %s.", self.job_id, self._where())
        with translated():
            try:
                return download_job_files(
                    client,
                    self.job_id,
                    files=self.files,
                    with_logs=self.with_logs,
                    with_diagnostics=self.with_diagnostics,
                    destination=self._place,
                    max_parallel=self.max_parallel,
                    log=self.log,
                )
            except ResultsGoneError as error:
                raise airflow_side(error, final=True) from error

    def _local(self) -> Path | None:
        """The destination, where it is a folder of this machine."""
        destination = str(self.destination)
        if destination.startswith("file://"):
            return Path(destination.removeprefix("file://"))
        return None if _URI.match(destination) else Path(destination)

    def _where(self) -> str:
        local = self._local()
        if local is None:
            return str(self.destination)
        return f"{local.absolute()} on the disk of this worker ({socket.gethostname()}, process {os.getpid()})"

    def _place(self, name: str, reserved: frozenset[str]) -> Destination:
        from airflow_provider_datasphere.client.destinations import LocalFolder
        from airflow_provider_datasphere.client.errors import ResultsError
        from airflow_provider_datasphere.client.stores import StoreFolder
        from airflow_provider_datasphere.compat import ObjectStoragePath

        local = self._local()
        if local is not None:
            return LocalFolder(local, name, reserved)
        address = str(self.destination).rstrip("/")
        try:
            path = ObjectStoragePath(address)
            fs = path.fs
        except Exception as error:  # providers raise what they like here
            raise ResultsError(f"The destination {address} can't be used: {error}") from error

        def uri(relative: PurePosixPath) -> str:
            return f"{address}/{relative}"

        return StoreFolder(fs, path.path, uri, name)

    def on_kill(self) -> None:
        """Stop what is under way; nothing partial is left under a final name."""
        if self._client is not None:
            # In a thread: the main thread, which this interrupts, may hold the lock that interrupting takes.
            thread = threading.Thread(target=self._client.interrupt, daemon=True)
            thread.start()
            thread.join(1.0)
