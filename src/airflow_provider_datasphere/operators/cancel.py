"""The operator that cancels a job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from airflow_provider_datasphere import killing
from airflow_provider_datasphere.compat import BaseOperator
from airflow_provider_datasphere.exceptions import translated
from airflow_provider_datasphere.hooks.datasphere import DataSphereHook

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.jobs import DataSphereClient
    from airflow_provider_datasphere.compat import Context


class CancelJobOperator(BaseOperator):
    """Cancel a DataSphere job; made to be a teardown: ``fork >> sensor >> cancel.as_teardown(setups=fork)``.

    An ended or unknown job is a success, so is an empty job id (the fork never got that far).

    .. seealso:: ``docs/fork.md``; RPC ``ProjectJobService.Cancel``.

    :param job_id: the job. (templated)
    :param graceful: send the job's own shutdown signal and let the service kill it after the job's own timeout, where
        its configuration has a ``graceful-shutdown`` section with a timeout; else it is cancelled at once.
    :param datasphere_conn_id: the connection. (templated)
    :raises JobRequestError: no role in the project.
    """

    template_fields: Sequence[str] = ("job_id", "datasphere_conn_id")
    ui_color = "#f3d9d9"

    def __init__(
        self,
        *,
        job_id: str,
        graceful: bool = False,
        datasphere_conn_id: str = DataSphereHook.default_conn_name,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.job_id = job_id
        self.graceful = graceful
        self.datasphere_conn_id = datasphere_conn_id

    def execute(self, context: Context) -> None:
        if not self.job_id or self.job_id == "None":
            self.log.info("There is no job to cancel.")
            return
        from airflow_provider_datasphere.client.errors import JobRequestError
        from airflow_provider_datasphere.client.outcome import TERMINAL, status_name

        client = DataSphereHook(self.datasphere_conn_id).get_conn()
        with translated():
            try:
                job = client.get(self.job_id)
                if job.status in TERMINAL:
                    self.log.info("Job %s is over already: %s.", self.job_id, status_name(job.status))
                    return
                graceful = self.graceful and killing.shuts_down_gracefully(job, self.log)
                client.cancel(self.job_id, graceful=graceful, reason="Airflow: CancelJobOperator")
            except JobRequestError as error:
                if not self._is_over(client, error):
                    raise
                self.log.info("Job %s needs no cancel: %s", self.job_id, error)
            else:
                self.log.info("Cancelled job %s%s.", self.job_id, " gracefully" if graceful else "")

    def _is_over(self, client: DataSphereClient, error: Exception) -> bool:
        """Whether the refusal means that the job is gone, or ended between the look and the call."""
        from airflow_provider_datasphere.client.outcome import TERMINAL
        from airflow_provider_datasphere.client.service import code_name

        code = code_name(error.__cause__)  # type: ignore[arg-type]
        if code == "NOT_FOUND":
            return True
        return code == "FAILED_PRECONDITION" and client.get(self.job_id).status in TERMINAL
