"""How a function ended in its job: what its proof says, or the job's log where there is none."""

from __future__ import annotations

import tempfile
from collections import deque
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from airflow_provider_datasphere.client import errors
from airflow_provider_datasphere.client.function.program import PROOF, Proof, last_traceback
from airflow_provider_datasphere.client.model import JobRef
from airflow_provider_datasphere.client.monitoring.logs import STDERR
from airflow_provider_datasphere.client.monitoring.watch import watch
from airflow_provider_datasphere.client.transfer.file_download import download_file

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.logger import LoggerLike
    from airflow_provider_datasphere.client.model import JobHandle
    from airflow_provider_datasphere.client.monitoring.outcome import Outcome
    from airflow_provider_datasphere.client.sync_client import DataSphereClient

#: Lines of a failed program's output that are searched for its exception.
_LAST_LINES = 5000
#: 128 + SIGKILL, which a system sends that is out of memory.
_KILLED = 137


class FunctionEnd:
    """The end of one job of a function.

    :param name: the function's.
    :param link: the job's page.
    """

    def __init__(
        self, client: DataSphereClient, handle: JobHandle, name: str, link: str | None, logger: LoggerLike
    ) -> None:
        self._client, self._handle, self._name, self._log = client, handle, name, logger
        self._job = JobRef(handle.job_id, link)

    def examine(self, outcome: Outcome) -> tuple[Outcome, Any]:
        """Return the outcome with what the function says of its end, and what it returned.

        :raises ResultsError: its proof can't be downloaded.
        """
        # The proof is no output of the user's.
        result = replace(
            outcome.result,
            output_files=tuple(file for file in outcome.result.output_files if file.path != PROOF),
            missing_outputs=tuple(path for path in outcome.result.missing_outputs if path != PROOF),
        )
        outcome = replace(outcome, result=result)
        if outcome.skip is not None or isinstance(
            outcome.error, (errors.JobCancelledError, errors.JobInfrastructureError)
        ):
            return outcome, None
        proof = self._read_proof()
        if isinstance(outcome.error, errors.JobFailedError):
            return replace(outcome, error=self._failure(proof, outcome.error, result.return_code)), None
        if proof is None:
            return replace(outcome, error=errors.JobFailedError(self._no_proof()), warnings=()), None
        if proof.skip is not None:
            skip = proof.skip or f"{self._name} asked to skip its task."
            return replace(outcome, error=None, skip=skip), None
        return outcome, proof.value

    def _read_proof(self) -> Proof | None:
        """Return what the function left; ``None``: nothing."""
        job_id = self._handle.job_id
        try:
            job = self._client.get(job_id)
        except errors.JobRequestError:
            return None  # deleted
        file = next((file for file in job.output_files if file.desc.path == PROOF), None)
        if file is None:
            return None
        stop = Event()
        self._client.add_interrupt_callback(stop.set)
        with tempfile.TemporaryDirectory(prefix="datasphere-result-") as folder:
            target = Path(folder, "proof")
            download_file(self._client, job_id, file, target, stop, self._log)
            return Proof.read(target.read_bytes())

    def _failure(
        self, proof: Proof | None, error: errors.DataSphereError, return_code: int | None
    ) -> errors.DataSphereError:
        raised = proof.error if proof is not None else None
        if proof is None and return_code == 1:
            # Whether the service stores outputs of a failed job is not documented.
            raised = last_traceback(self._last_lines())
        if raised is not None:
            text = f"{raised['type']}: {raised['message']}" if raised["message"] else raised["type"]
            return errors.RemoteError(
                f"{self._name} raised {text} (in job {self._job})\n\nTraceback of the job:\n{raised['traceback']}"
            )
        if return_code == _KILLED:
            return errors.JobFailedError(
                f"{self._name} was killed: out of memory? {error} Give it a larger instance type, or have it hold less "
                "at once."
            )
        return error

    def _last_lines(self) -> str:
        """Return the end of what the program wrote to stderr."""
        lines: deque[str] = deque(maxlen=_LAST_LINES)
        try:
            watch(
                self._client,
                self._handle,
                emit=lambda line: lines.append(line.text) if line.stream == STDERR else None,
            )
        except errors.DataSphereError as error:
            self._log.debug("The log of job %s can't be read again: %s", self._handle.job_id, error)
        return "\n".join(lines)

    def _no_proof(self) -> str:
        return (
            f"Job {self._job} ended with SUCCESS but left no proof that {self._name} ended ({PROOF}): did it call "
            "os._exit(), or remove the file?"
        )
