"""The operator that cancels a job."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from airflow_provider_datasphere.arguments import check_common, check_literal_job_id
from airflow_provider_datasphere.client import cancellation
from airflow_provider_datasphere.client.cancel_reason import CANCEL_OPERATOR
from airflow_provider_datasphere.client.errors import DataSphereError, JobRequestError
from airflow_provider_datasphere.client.validation import NONE_TEXT, check_job_id
from airflow_provider_datasphere.compat import BaseOperator
from airflow_provider_datasphere.exceptions import airflow_exceptions
from airflow_provider_datasphere.hooks.datasphere import DataSphereHook
from airflow_provider_datasphere.templates import TextTemplates

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.sync_client import DataSphereClient
    from airflow_provider_datasphere.compat import Context


#: How long to retry after transient errors, for all jobs together, seconds.
CANCEL_RETRY_SECONDS = 180.0
_HINT = "give the id of the DataSphere job to cancel, such as fork.output"


class CancelJobOperator(TextTemplates, BaseOperator):
    """Cancel a DataSphere job; made to be a teardown: ``fork >> sensor >> cancel.as_teardown(setups=fork)``.

    An ended or unknown job is a success, and so is an empty job id (the fork created no job). A job that was created
    and never started is deleted.

    .. seealso:: ``docs/fork.md``; RPC ``ProjectJobService.Cancel``.

    :param job_id: the job, or several: the output of a mapped fork is a sequence of ids. (templated)
    :param graceful: send the job's own shutdown signal and let the service kill it after the job's own timeout, where
        its configuration has a ``graceful-shutdown`` section with a timeout; else it is cancelled at once.
    :param datasphere_conn_id: the connection. (templated)
    :raises JobRequestError: no role in the project. Of several jobs the others are cancelled first.
    """

    template_fields: Sequence[str] = ("job_id", "datasphere_conn_id")
    text_fields = ("datasphere_conn_id",)
    text_containers = ("job_id",)
    ui_color = "#f3d9d9"

    def __init__(
        self,
        *,
        job_id: str | Sequence[str],
        graceful: bool = False,
        datasphere_conn_id: str = DataSphereHook.default_conn_name,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.job_id = job_id
        self.graceful = graceful
        self.datasphere_conn_id = datasphere_conn_id
        check_common(self)
        if not hasattr(job_id, "resolve"):
            for one in _ids(job_id):
                check_literal_job_id(self, one, _HINT)

    def execute(self, context: Context) -> None:
        job_ids = _ids(self.job_id)
        if not job_ids:
            self.log.info("No job to cancel.")
            return
        client = DataSphereHook(self.datasphere_conn_id).get_conn()
        deadline = time.monotonic() + CANCEL_RETRY_SECONDS
        failed: dict[object, DataSphereError] = {}
        with airflow_exceptions():
            for job_id in job_ids:
                if failed and time.monotonic() >= deadline:
                    failed[job_id] = DataSphereError("not tried: the service didn't answer in time")
                    continue
                try:
                    self._cancel(client, job_id, max(0.0, deadline - time.monotonic()))
                except DataSphereError as error:
                    if len(job_ids) == 1:
                        raise
                    failed[job_id] = error
            if failed:
                raise _summary(failed, len(job_ids))

    def _cancel(self, client: DataSphereClient, job_id: Any, seconds: float) -> None:
        check_job_id("job_id", job_id, _HINT)
        request = cancellation.JobCancellation(
            job_id,
            "graceful" if self.graceful else "cancel",
            CANCEL_OPERATOR,
            self.log,
            known_running=False,
        )
        cancellation.cancel_job(client, request, seconds)


def _ids(job_id: Any) -> list[Any]:
    """Return the ids in the order given, each once; empty ones, of forks that created no job, are left out."""
    several = isinstance(job_id, Iterable) and not isinstance(job_id, (str, Mapping))
    ids = list(job_id) if several else [job_id]
    return [one for index, one in enumerate(ids) if one not in (None, "", NONE_TEXT) and ids.index(one) == index]


def _summary(failed: Mapping[object, DataSphereError], total: int) -> DataSphereError:
    non_retryable = all(isinstance(error, JobRequestError) for error in failed.values())
    text = "; ".join(f"{job_id}: {error}" for job_id, error in failed.items())
    return (JobRequestError if non_retryable else DataSphereError)(
        f"{len(failed)} of {total} jobs couldn't be cancelled and may still be running and costing money: {text}"
    )
