"""Operators that run and cancel DataSphere jobs; the cancel lives in :mod:`.cancel`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from airflow_provider_datasphere.arguments import check_literals, paths_as_text
from airflow_provider_datasphere.client import fork
from airflow_provider_datasphere.compat import conf
from airflow_provider_datasphere.generation import StateStore, key_of
from airflow_provider_datasphere.hooks.datasphere import DataSphereHook
from airflow_provider_datasphere.operators.base import JobOperator
from airflow_provider_datasphere.operators.cancel import CancelJobOperator

if TYPE_CHECKING:
    from datetime import timedelta
    from pathlib import Path

    from airflow_provider_datasphere import killing
    from airflow_provider_datasphere.client.jobs import DataSphereClient
    from airflow_provider_datasphere.client.outcome import JobHandle
    from airflow_provider_datasphere.client.upload import JobInput
    from airflow_provider_datasphere.compat import Context, ObjectStoragePath


class ForkJobOperator(JobOperator):
    """Clone a DataSphere job with overrides, run the clone, and wait for it.

    The task succeeds when the program ended with return code 0 and made its declared outputs. The job's log goes to
    the task's log. Whatever dies on the way, one generation of the task (all its automatic tries) runs one job.

    .. seealso:: ``docs/fork.md``; RPCs ``Clone``, ``Execute`` of ``ProjectJobService``, ``OperationService.Get``.

    :param source_job_id: the job to clone. (templated)
    :param args: argument name -> value, strings; names must exist in the source job. (templated)
    :param vars: input variable -> local path, object-store URI (or ``ObjectStoragePath``) or
        ``datasphere://[conn@]<job id>/<output>``; output variable -> new path inside the job. (templated)
    :param env_vars: environment variables of the job. (templated)
    :param name: name of the new job. (templated)
    :param desc: description of the new job; the mark by which a later try finds the job is appended. (templated)
    :param docker: resource id or system image name, or
        ``{"image": …, "username": …, "password": {"secret-id": …}}``. (templated)
    :param working_storage: ``{"type": "SSD", "size": "100GB"}``, at least 100 GB. (templated)
    :param cloud_instance_types: in order of preference; replaces the source's list. (templated)
    :param data_ttl: how long the service keeps the new job's data: whole days (timedelta or number), or
        ``"infinity"``; default 14 days. (templated)
    :param source_data_ttl: have the service keep the *source* job's data for so long from now, so that it can still
        be forked; default: left alone, with a warning three days before they expire. (templated)
    :param wait_for_completion: ``False`` ends the task as soon as the job is started.
    :param deferrable: wait in the triggerer, without a worker slot. Default: ``[operators] default_deferrable``.
    :param poll_interval: longest pause between two polls, seconds.
    :param stream_logs: bring the job's log into the task's log.
    :param on_kill_action: what becomes of the job when a person or a timeout ends the task: ``"cancel"``,
        ``"graceful"`` (with the job's own shutdown signal and timeout, where it has them), ``"keep"``.
    :param reattach: have a retry go on with the job that an earlier try started. ``False``: each try forks.
    :param fail_on_missing_outputs: fail when the program didn't make a declared output.
    :param skip_on_exit_code: return code or codes that skip the task.
    :param datasphere_conn_id: the connection. (templated)
    :return: the job id. Further XComs: ``operation_id``, ``job_url`` and, when it waited, ``result``.
    :raises JobRequestError: the request can't be carried out as written; not retried.
    :raises JobFailedError: return code other than 0.
    :raises MissingOutputsError: declared outputs weren't made; not retried.
    :raises JobCancelledError: somebody cancelled the job; not retried.
    :raises JobInfrastructureError: the service failed the job.
    :raises JobLostError: the job is out of sight, and may go on.
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
        poll_interval: float = 10.0,
        stream_logs: bool = True,
        on_kill_action: killing.OnKillAction = "cancel",
        reattach: bool = True,
        fail_on_missing_outputs: bool = True,
        skip_on_exit_code: int | Collection[int] | None = None,
        datasphere_conn_id: str = DataSphereHook.default_conn_name,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.source_job_id = source_job_id
        self.args = args
        # A path object would not be rendered; what it stands for is.
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
        self.poll_interval = poll_interval
        self.stream_logs = stream_logs
        self.on_kill_action = on_kill_action
        self.reattach = reattach
        self.fail_on_missing_outputs = fail_on_missing_outputs
        self.skip_on_exit_code = skip_on_exit_code
        self.datasphere_conn_id = datasphere_conn_id
        check_literals(self)

    def _obtain(self, context: Context, client: DataSphereClient) -> tuple[JobHandle, bool]:
        from airflow_provider_datasphere.client.ledger import obtain
        from airflow_provider_datasphere.client.outcome import JobHandle
        from airflow_provider_datasphere.client.submit import Submission
        from airflow_provider_datasphere.client.watch import watch

        request = fork.ForkRequest(
            source_job_id=self.source_job_id,
            args=self.args or {},
            vars=paths_as_text(self.vars or {}),
            env_vars=self.env_vars or {},
            name=self.name,
            desc=self.desc,
            docker=self.docker,
            working_storage=self.working_storage,
            cloud_instance_types=self.cloud_instance_types or (),
            data_ttl=self.data_ttl,
        )

        def stage(input_vars: Mapping[str, str], source: Any, scratch: Path) -> Sequence[JobInput]:
            from airflow_provider_datasphere.inputs import stage_vars

            return stage_vars(input_vars, source, client, scratch)

        submission = Submission(
            key="",
            stage=stage,
            cloned=lambda job_id: self._has_job(context, job_id),
            source_data_ttl=self.source_data_ttl,
            log=self.log,
        )
        ti: Any = context["ti"]
        key = key_of(context)
        obtained = obtain(
            client,
            request,
            submission,
            key if self.reattach else key.for_try(ti.try_number),
            store=StateStore.of(context) if self.reattach else None,
            look=self.reattach and ti.try_number > 1,
            link=lambda job: client.job_link(job.id, job.project_id),
            wait=lambda job_id: watch(client, JobHandle(job_id), poll_interval=self.poll_interval, logger=self.log),
        )
        return obtained.handle, obtained.found


__all__ = ["CancelJobOperator", "ForkJobOperator"]
