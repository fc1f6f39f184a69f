"""Operator that downloads a job's files to a folder or an object store."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_provider_datasphere.arguments import (
    check_common,
    check_count,
    check_literal_job_id,
    is_literal,
    path_as_text,
    template_marks,
)
from airflow_provider_datasphere.client.uri import local_folder
from airflow_provider_datasphere.client.validation import NONE_TEXT, check_characters, check_job_id, refuse_task
from airflow_provider_datasphere.compat import BaseOperator
from airflow_provider_datasphere.exceptions import (
    JobRequestError,
    NonRetryableResultsError,
    airflow_exceptions,
    to_airflow_exception,
)
from airflow_provider_datasphere.object_store import check_key, missing_bucket, unknown_store
from airflow_provider_datasphere.templates import TextTemplates

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime
    from pathlib import PurePosixPath

    from airflow_provider_datasphere.client.sync_client import DataSphereClient
    from airflow_provider_datasphere.client.transfer.local_destination import Destination
    from airflow_provider_datasphere.compat import Context, ObjectStoragePath

_HINT = "give the id of a job, as ForkJobOperator returns it"


class DownloadJobResultsOperator(TextTemplates, BaseOperator):
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
        Not retried where the job's data are gone, or another job's results of this run would be overwritten.
    :raises JobRequestError: no such job, nothing fits ``files``; not retried.
    """

    template_fields: Sequence[str] = ("job_id", "destination", "files", "datasphere_conn_id")
    text_fields = ("job_id", "destination", "datasphere_conn_id")
    text_containers = ("files",)
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
        check_common(self)
        check_count("max_parallel", max_parallel)
        check_literal_job_id(self, job_id, _HINT)
        marks = template_marks(self.get_dag())
        if is_literal(files, marks):
            self._check_files()
        if is_literal(self.destination, marks):
            self._check_destination()

    def _check_files(self) -> None:
        files: Any = self.files
        if files is None:
            return
        with airflow_exceptions():
            refuse_task("files", files)
            if not isinstance(files, (list, tuple, set, frozenset)) or not all(
                isinstance(pattern, str) and pattern and pattern != NONE_TEXT for pattern in files
            ):
                raise JobRequestError(
                    f"files is {files!r}: give a list of glob patterns such as ['*.csv'], or leave it out for all."
                )
            for pattern in files:
                check_characters(f"The pattern {pattern!r} in files", pattern)

    def _check_destination(self) -> None:
        destination: Any = self.destination
        with airflow_exceptions():
            refuse_task("destination", destination)
            if destination == NONE_TEXT:
                raise JobRequestError(
                    "destination is 'None': a template renders to that when its XCom or param has no value. Give a "
                    "folder or an object-store URI."
                )
            if isinstance(destination, str) and not destination.strip():
                raise JobRequestError("destination is empty: give a folder or an object-store URI.")
            if not isinstance(destination, str):
                raise JobRequestError(
                    f"destination is {destination!r} ({type(destination).__name__}): give a folder or an object-store "
                    "URI, one as text or as a path."
                )
            check_characters("destination", destination)
            if destination.lower().startswith("datasphere://"):
                raise JobRequestError(f"destination is {destination!r}: a job's files can't be changed.")
            # Whose home "~" is, only the worker knows.
            if not destination.startswith("~"):
                local_folder("destination", destination)

    def execute(self, context: Context) -> list[dict[str, Any]]:
        from airflow_provider_datasphere.client.errors import PermanentResultsError
        from airflow_provider_datasphere.client.transfer.download import download_job_files
        from airflow_provider_datasphere.hooks.datasphere import DataSphereHook

        with airflow_exceptions():
            check_job_id("job_id", self.job_id, _HINT)
        self._check_files()
        self._check_destination()
        self._client = client = DataSphereHook(self.datasphere_conn_id).get_conn()
        with airflow_exceptions():
            self.log.info("Job %s: its files go to %s.", self.job_id, self._describe_destination())
            try:
                return download_job_files(
                    client,
                    self.job_id,
                    files=self.files,
                    with_logs=self.with_logs,
                    with_diagnostics=self.with_diagnostics,
                    destination=self._make_destination,
                    max_parallel=self.max_parallel,
                    since=_written_by_others_since(context),
                    logger=self.log,
                )
            except PermanentResultsError as error:
                raise to_airflow_exception(error, retryable=False).with_traceback(
                    error.__traceback__
                ) from error.__cause__

    def _local_path(self) -> Path | None:
        """Return the destination if it is a folder of this machine."""
        folder = local_folder("destination", str(self.destination))
        return Path(folder) if folder is not None else None

    def _describe_destination(self) -> str:
        local = self._local_path()
        if local is None:
            return str(self.destination)
        return f"{local.absolute()} on the disk of this worker ({socket.gethostname()}, process {os.getpid()})"

    def _make_destination(self, name: str, reserved: frozenset[str]) -> Destination:
        from airflow_provider_datasphere.client.errors import ResultsError
        from airflow_provider_datasphere.client.transfer.local_destination import LocalDestination
        from airflow_provider_datasphere.client.transfer.object_store_destination import ObjectStoreDestination
        from airflow_provider_datasphere.compat import ObjectStoragePath

        local = self._local_path()
        if local is not None:
            return LocalDestination(local, name, reserved)
        address = str(self.destination).rstrip("/")
        check_key("destination", address)
        try:
            path = ObjectStoragePath(address)
            fs = path.fs
        except (ValueError, ImportError) as error:
            # Another try can't change that.
            raise NonRetryableResultsError(
                f"The destination {address} can't be used: {unknown_store(address, error)}"
            ) from error
        except Exception as error:  # providers raise what they like here
            raise ResultsError(f"The destination {address} can't be used: {error}") from error

        def uri(relative: PurePosixPath) -> str:
            return f"{address}/{relative}"

        def missing() -> str | None:
            bucket = missing_bucket(fs, path.path)
            return f"Bucket {bucket!r} doesn't exist ({address})" if bucket else None

        return ObjectStoreDestination(fs, path.path, uri, name, missing)

    def on_kill(self) -> None:
        """Stop the transfers; nothing partial is left under a final name."""
        if self._client is not None:
            # In a thread: the main thread, which this interrupts, may hold the lock that interrupting takes.
            thread = threading.Thread(target=self._client.interrupt, daemon=True)
            thread.start()
            thread.join(1.0)


def _written_by_others_since(context: Context) -> datetime | None:
    """Return the run's start: what other tasks wrote to the destination since then must not be overwritten.

    None where it may be: a person who clears the task may have had its job run again too. Automatic retries have the
    same job.
    """
    ti: Any = context.get("ti")
    task: Any = context.get("task")
    if ti is None or task is None or ti.max_tries != (task.retries or 0):
        return None
    return getattr(context.get("dag_run"), "start_date", None)
