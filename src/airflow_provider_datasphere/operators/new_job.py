"""Operator that makes a new DataSphere job from a configuration and runs it."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_provider_datasphere.arguments import (
    NEW_JOB_CHECKS,
    CheckedPartial,
    check_job_arguments,
    path_as_text,
    paths_as_text,
)
from airflow_provider_datasphere.client.monitoring import DEFAULT_POLL_INTERVAL
from airflow_provider_datasphere.compat import conf
from airflow_provider_datasphere.config_template import RenderedConfig, dag_folder, render_config
from airflow_provider_datasphere.exceptions import JobRequestError
from airflow_provider_datasphere.hooks.datasphere import DataSphereHook
from airflow_provider_datasphere.operators.base import JobOperator
from airflow_provider_datasphere.templates import TextTemplates

if TYPE_CHECKING:
    from datetime import timedelta

    import jinja2

    from airflow_provider_datasphere.client import cancellation
    from airflow_provider_datasphere.client.configuration.read import ConfigSource
    from airflow_provider_datasphere.client.submission.new_job import NewJob, ProjectOrigin
    from airflow_provider_datasphere.client.sync_client import DataSphereClient
    from airflow_provider_datasphere.compat import Context, ObjectStoragePath


class ExecuteJobOperator(TextTemplates, JobOperator):
    """Make a DataSphere job from a config.yaml (or a mapping), run it, and wait for it.

    The configuration is checked as a whole before anything is sent; an error has all its faults, each with file and
    line. The task succeeds when the program ended with return code 0 and made its declared outputs. The job's log goes
    to the task's log. Whatever dies on the way, one generation of the task (all its automatic tries) runs one job.

    .. seealso:: ``docs/new_jobs.md``; RPCs ``Create``, ``Execute`` of ``ProjectJobService``, ``OperationService.Get``.

    :param config: a mapping with the keys of config.yaml, or the path of a ``.yaml`` or ``.yml`` file: absolute,
        beside the DAG file, or in the DAG's ``template_searchpath``. The file's text is a template too. Relative paths
        in it are relative to the file's folder, in a mapping to the DAG file's folder. (templated)
    :param project_id: the project in which the job is made; default: the connection's. (templated)
    :param base_dir: what relative paths of the configuration are relative to, in place of the folders above; itself
        relative to the DAG file's folder. (templated)
    :param args: argument name -> value, strings, in the place of the configuration's; names must exist there.
        (templated)
    :param vars: input variable -> local path, object-store URI (or ``ObjectStoragePath``) or
        ``datasphere://[conn@]<job id>/<output>``; output variable -> path inside the job; names must exist in the
        configuration. (templated)
    :param env_vars: environment variables of the job, beside and in the place of the configuration's. No place for
        secrets: the service stores them with the job. Use secrets of the DataSphere project. (templated)
    :param name: name of the job, in the place of the configuration's, as all below. (templated)
    :param desc: description of the job; the tag by which a later try finds the job is appended. (templated)
    :param docker: resource id or system image name, or
        ``{"image": …, "username": …, "password": {"secret-id": …}}``. (templated)
    :param working_storage: ``{"type": "SSD", "size": "100GB"}``, at least 100 GB. (templated)
    :param cloud_instance_types: in order of preference. (templated)
    :param data_ttl: how long the service keeps the job's data: whole days (timedelta or number), or ``"infinity"``;
        default 14 days. (templated)
    :param wait_for_completion: ``False`` ends the task as soon as the job is started.
    :param deferrable: wait in the triggerer, without a worker slot. Default: ``[operators] default_deferrable``.
    :param start_timeout: how long the job may take from its first Execute until it computes (timedelta, or seconds):
        waiting for room, for a machine, for its environment. Then it is cancelled, and the try fails with
        ``JobInfrastructureError``. Default: any time.
    :param poll_interval: longest pause between two polls, seconds.
    :param stream_logs: stream the job's log to the task's log.
    :param on_kill_action: what happens to the job when a person or a timeout ends the task: ``"cancel"``,
        ``"graceful"`` (with the job's own shutdown signal and timeout, where it has them), ``"keep"``.
    :param reattach: have a retry reattach to the job that an earlier try started. ``False``: each try makes a job.
    :param fail_on_missing_outputs: fail when the program didn't make a declared output.
    :param skip_on_exit_code: return code or codes that skip the task.
    :param datasphere_conn_id: the connection. (templated)
    :return: the job id. Further XComs: ``operation_id``, ``job_url`` and, when it waited, ``result``.
    :raises JobRequestError: the configuration or an argument has faults; not retried.
    :raises JobFailedError: return code other than 0.
    :raises MissingOutputsError: declared outputs weren't made; not retried.
    :raises JobCancelledError: somebody cancelled the job; not retried.
    :raises JobInfrastructureError: the service failed the job.
    :raises JobLostError: the job can no longer be monitored, and may still be running.
    """

    template_fields: Sequence[str] = (
        "config",
        "project_id",
        "base_dir",
        "args",
        "vars",
        "env_vars",
        "name",
        "desc",
        "docker",
        "working_storage",
        "cloud_instance_types",
        "data_ttl",
        "datasphere_conn_id",
    )
    text_fields = ("project_id", "base_dir", "name", "desc", "datasphere_conn_id")
    text_containers = ("args", "vars", "env_vars", "docker", "working_storage", "cloud_instance_types", "data_ttl")
    template_fields_renderers = {  # noqa: RUF012 -- Airflow's own idiom
        "config": "yaml",
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
        config: Mapping[str, Any] | str | Path,
        project_id: str | None = None,
        base_dir: str | Path | None = None,
        args: Mapping[str, str] | None = None,
        vars: Mapping[str, str | Path | ObjectStoragePath] | None = None,
        env_vars: Mapping[str, str] | None = None,
        name: str | None = None,
        desc: str | None = None,
        docker: str | Mapping[str, Any] | None = None,
        working_storage: Mapping[str, Any] | None = None,
        cloud_instance_types: Sequence[str] | None = None,
        data_ttl: timedelta | int | str | None = None,
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
        self.config = path_as_text(config)
        self._rendered_config: RenderedConfig | None = None
        self.project_id = project_id
        self.base_dir = path_as_text(base_dir)
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
        check_job_arguments(self, NEW_JOB_CHECKS)

    @classmethod
    def partial(cls, **kwargs: Any) -> Any:
        """Return Airflow's own partial operator, with the known arguments checked."""
        return CheckedPartial(super().partial(**kwargs), kwargs, NEW_JOB_CHECKS)

    def render_template(
        self,
        content: Any,
        context: Context,
        jinja_env: jinja2.Environment | None = None,
        seen_oids: set[int] | None = None,
    ) -> Any:
        if self._field == "config":
            self._rendered_config = self._render_config(content, context, jinja_env)
            return self._rendered_config.text
        return super().render_template(content, context, jinja_env, seen_oids)

    def _job_request(self, context: Context, client: DataSphereClient) -> NewJob:
        from airflow_provider_datasphere.client.configuration.overlay import Overlay
        from airflow_provider_datasphere.client.submission.new_job import NewJob

        overlay = Overlay(
            # Not "or": a template that renders to nothing is no mapping, and an error.
            args={} if self.args is None else self.args,
            vars={} if self.vars is None else paths_as_text(self.vars),
            env_vars={} if self.env_vars is None else self.env_vars,
            name=self.name,
            desc=self.desc,
            docker=self.docker,
            working_storage=self.working_storage,
            cloud_instance_types=() if self.cloud_instance_types is None else self.cloud_instance_types,
        )
        return NewJob(
            client,
            self.project_id,
            self._config_source(),
            overlay,
            data_ttl=self.data_ttl,
            stage_inputs=self._stage_inputs(client),
            logger=self.log,
        )

    def _job_origin(self, context: Context, client: DataSphereClient) -> ProjectOrigin:
        from airflow_provider_datasphere.client.submission.new_job import ProjectOrigin

        return ProjectOrigin(client, self.project_id)

    def _config_source(self) -> ConfigSource:
        from airflow_provider_datasphere.client.configuration.read import ConfigSource

        # Executed without rendering, as unit tests of DAGs do, the configuration is taken as it is.
        config = self._render_config(self.config, None, None)
        folder = config.folder
        if self.base_dir is not None:
            if not self.base_dir:
                raise JobRequestError(f"base_dir is {self.base_dir!r}: give a folder, or leave it out.")
            folder = Path(os.path.normpath(dag_folder(self) / self.base_dir))
        return ConfigSource(config.content, folder, config.file)

    def _render_config(
        self, config: Any, context: Context | None, jinja_env: jinja2.Environment | None
    ) -> RenderedConfig:
        if self._rendered_config is not None and self._rendered_config.text == config:
            return self._rendered_config
        return render_config(self, config, context, jinja_env or self.get_template_env())
