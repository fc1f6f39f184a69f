"""The operator that cancels a job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from airflow_provider_datasphere import killing
from airflow_provider_datasphere.client.fork import check_job_id
from airflow_provider_datasphere.compat import BaseOperator
from airflow_provider_datasphere.exceptions import translated
from airflow_provider_datasphere.hooks.datasphere import DataSphereHook

if TYPE_CHECKING:
    from airflow_provider_datasphere.compat import Context


#: How long a service that doesn't answer is asked again, seconds.
PATIENCE = 180.0


class CancelJobOperator(BaseOperator):
    """Cancel a DataSphere job; made to be a teardown: ``fork >> sensor >> cancel.as_teardown(setups=fork)``.

    An ended or unknown job is a success, so is an empty job id (the fork never got that far). A job that was made and
    never started is deleted.

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
        with translated():
            check_job_id("job_id", self.job_id, "give the id of the DataSphere job to cancel, such as fork.output")
        client = DataSphereHook(self.datasphere_conn_id).get_conn()
        ending = killing.Ending(
            self.job_id,
            "graceful" if self.graceful else "cancel",
            "Airflow: CancelJobOperator",
            self.log,
            surely_running=False,
        )
        with translated():
            killing.end_job(client, ending, PATIENCE)
