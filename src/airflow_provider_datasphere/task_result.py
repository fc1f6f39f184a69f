"""The outcome of a job as the end of its task: XCom, log, skip or error."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow_provider_datasphere.compat import AirflowSkipException
from airflow_provider_datasphere.exceptions import to_airflow_exception

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.logger import LoggerLike
    from airflow_provider_datasphere.client.monitoring.outcome import Outcome
    from airflow_provider_datasphere.compat import Context


def report_outcome(context: Context, outcome: Outcome, log: LoggerLike, *, retryable: bool = True) -> dict[str, Any]:
    """Push the XCom ``result``, log the warnings, and raise what the outcome asks for.

    :param retryable: whether Airflow may retry the task after a failed job.
    :return: the ``result`` mapping.
    :raises AirflowSkipException: the return code skips the task.
    :raises DataSphereError: the job failed.
    """
    result = outcome.result.to_dict()
    # Before a failure or skip: whoever handles it finds the result.
    context["ti"].xcom_push(key="result", value=result)
    outcome.log_warnings(log)
    if outcome.skip is not None:
        raise AirflowSkipException(outcome.skip)
    if outcome.error is not None:
        raise to_airflow_exception(outcome.error, retryable=retryable)
    log.info("Job %s succeeded. Output files: %d.", outcome.result.job_id, len(outcome.result.output_files))
    return result
