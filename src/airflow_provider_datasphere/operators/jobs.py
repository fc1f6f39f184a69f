"""Operators that run and cancel DataSphere jobs; new jobs live in :mod:`.new_job`, the cancel in :mod:`.cancel`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from airflow_provider_datasphere.arguments import FORK_CHECKS, CheckedPartial, check_job_arguments, paths_as_text
from airflow_provider_datasphere.client.monitoring import DEFAULT_POLL_INTERVAL
from airflow_provider_datasphere.client.submission import fork_request as fork
from airflow_provider_datasphere.compat import conf
from airflow_provider_datasphere.hooks.datasphere import DataSphereHook
from airflow_provider_datasphere.operators.base import JobOperator
from airflow_provider_datasphere.operators.cancel import CancelJobOperator
from airflow_provider_datasphere.operators.new_job import ExecuteJobOperator
from airflow_provider_datasphere.templates import TextTemplates

if TYPE_CHECKING:
    from datetime import timedelta
    from pathlib import Path

    from airflow_provider_datasphere.client import cancellation
    from airflow_provider_datasphere.client.submission.fork import Fork, SourceJob
    from airflow_provider_datasphere.client.sync_client import DataSphereClient
    from airflow_provider_datasphere.compat import Context, ObjectStoragePath


class ForkJobOperator(TextTemplates, JobOperator):
    """Clone a DataSphere job with overrides, run the clone, and wait for it.

    The task succeeds when the program ended with return code 0 and made its declared outputs. The job's log goes to
    the task's log. Whatever dies on the way, one generation of the task (all its automatic tries) runs one job.

    .. seealso:: ``docs/fork.md``; RPCs ``Clone``, ``Execute`` of ``ProjectJobService``, ``OperationService.Get``.

    :param source_job_id: the job to clone. (templated)
    :param args: argument name -> value, strings; names must exist in the source job. (templated)
    :param vars: input variable -> local path, object-store URI (or ``ObjectStoragePath``) or
        ``datasphere://[conn@]<job id>/<output>``; output variable -> new path inside the job. (templated)
    :param env_vars: environment variables of the job. No place for secrets: the service stores them with the job, and
        what the program prints of them is masked in the task's log only where Airflow knows them, never in the
        triggerer. Use secrets of the DataSphere project, which every program gets as environment variables. (templated)
    :param name: name of the new job. (templated)
    :param desc: description of the new job; the tag by which a later try finds the job is appended. (templated)
    :param docker: resource id or system image name, or
        ``{"image": …, "username": …, "password": {"secret-id": …}}``. (templated)
    :param working_storage: ``{"type": "SSD", "size": "100GB"}``, at least 100 GB. (templated)
    :param cloud_instance_types: in order of preference; replaces the source's list. (templated)
    :param data_ttl: how long the service keeps the new job's data: whole days (timedelta or number), or
        ``"infinity"``; default 14 days. (templated)
    :param source_data_ttl: have the service keep the *source* job's data for this long from now (whole days, or
        ``"infinity"``), so that it can still be forked; default: unchanged, with a warning three days before they
        expire. (templated)
    :param wait_for_completion: ``False`` ends the task as soon as the job is started.
    :param deferrable: wait in the triggerer, without a worker slot. Default: ``[operators] default_deferrable``.
    :param start_timeout: how long the job may take from its first Execute until it computes (timedelta, or seconds):
        waiting for room, for a machine, for its environment. Then it is cancelled, and the try fails with
        ``JobInfrastructureError``. Default: any time.
    :param poll_interval: longest pause between two polls, seconds.
    :param stream_logs: stream the job's log to the task's log.
    :param on_kill_action: what happens to the job when a person or a timeout ends the task: ``"cancel"``,
        ``"graceful"`` (with the job's own shutdown signal and timeout, where it has them), ``"keep"``.
    :param reattach: have a retry reattach to the job that an earlier try started. ``False``: each try forks.
    :param fail_on_missing_outputs: fail when the program didn't make a declared output.
    :param skip_on_exit_code: return code or codes that skip the task.
    :param datasphere_conn_id: the connection. (templated)
    :return: the job id. Further XComs: ``operation_id``, ``job_url`` and, when it waited, ``result``.
    :raises JobRequestError: the request can't be carried out as written; not retried.
    :raises JobFailedError: return code other than 0.
    :raises MissingOutputsError: declared outputs weren't made; not retried.
    :raises JobCancelledError: somebody cancelled the job; not retried.
    :raises JobInfrastructureError: the service failed the job.
    :raises JobLostError: the job can no longer be monitored, and may still be running.
    """

    template_fields: Sequence[str] = (
        "source_job_id",
        "args",
        "vars",
        "env_vars",
        "name",
        "desc",
        "docker",
        "working_storage",
        "cloud_instance_types",
        "data_ttl",
        "source_data_ttl",
        "datasphere_conn_id",
    )
    text_fields = ("source_job_id", "name", "desc", "datasphere_conn_id")
    text_containers = (
        "args",
        "vars",
        "env_vars",
        "docker",
        "working_storage",
        "cloud_instance_types",
        "data_ttl",
        "source_data_ttl",
    )
    template_fields_renderers = {  # noqa: RUF012 -- Airflow's own idiom
        "args": "json",
        "vars": "json",
        "env_vars": "json",
        "docker": "json",
        "working_storage": "json",
        "cloud_instance_types": "json",
    }

    def __init__(
        self,
        *,
        source_job_id: str,
        args: Mapping[str, str] | None = None,
        vars: Mapping[str, str | Path | ObjectStoragePath] | None = None,
        env_vars: Mapping[str, str] | None = None,
        name: str | None = None,
        desc: str | None = None,
        docker: str | Mapping[str, Any] | None = None,
        working_storage: Mapping[str, Any] | None = None,
        cloud_instance_types: Sequence[str] | None = None,
        data_ttl: timedelta | int | str | None = None,
        source_data_ttl: timedelta | int | str | None = None,
        wait_for_completion: bool = True,
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        start_timeout: timedelta | float | None = None,
        poll_interval: float = DEFAULT_POLL_INTERVAL,
        stream_logs: bool = True,
        on_kill_action: cancellation.OnKillAction = "cancel",
        reattach: bool = True,
        fail_on_missing_outputs: bool = True,
        skip_on_exit_code: int | Collection[int] | None = None,
        datasphere_conn_id: str = DataSphereHook.default_conn_name,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.source_job_id = source_job_id
        self.args = args
        # A path object would not be rendered; its text is.
        self.vars = paths_as_text(vars)
        self.env_vars = env_vars
        self.name = name
        self.desc = desc
        self.docker = docker
        self.working_storage = working_storage
        self.cloud_instance_types = cloud_instance_types
        self.data_ttl = data_ttl
        self.source_data_ttl = source_data_ttl
        self.wait_for_completion = wait_for_completion
        self.deferrable = deferrable
        self.start_timeout = start_timeout
        self.poll_interval = poll_interval
        self.stream_logs = stream_logs
        self.on_kill_action = on_kill_action
        self.reattach = reattach
        self.fail_on_missing_outputs = fail_on_missing_outputs
        self.skip_on_exit_code = skip_on_exit_code
        self.datasphere_conn_id = datasphere_conn_id
        check_job_arguments(self, FORK_CHECKS)

    @classmethod
    def partial(cls, **kwargs: Any) -> Any:
        """Return Airflow's own partial operator, with the known arguments checked."""
        return CheckedPartial(super().partial(**kwargs), kwargs, FORK_CHECKS)

    def _job_request(self, context: Context, client: DataSphereClient) -> Fork:
        from airflow_provider_datasphere.client.submission.fork import Fork

        request = fork.ForkRequest(
            source_job_id=self.source_job_id,
            # Not "or": a template that renders to nothing is no mapping, and an error.
            args={} if self.args is None else self.args,
            vars={} if self.vars is None else paths_as_text(self.vars),
            env_vars={} if self.env_vars is None else self.env_vars,
            name=self.name,
            desc=self.desc,
            docker=self.docker,
            working_storage=self.working_storage,
            cloud_instance_types=() if self.cloud_instance_types is None else self.cloud_instance_types,
            data_ttl=self.data_ttl,
        )
        return Fork(
            client,
            request,
            stage_inputs=self._stage_inputs(client),
            source_data_ttl=self.source_data_ttl,
            logger=self.log,
        )

    def _job_origin(self, context: Context, client: DataSphereClient) -> SourceJob:
        from airflow_provider_datasphere.client.submission.fork import SourceJob

        return SourceJob(client, self.source_job_id)


__all__ = ["CancelJobOperator", "ExecuteJobOperator", "ForkJobOperator"]
