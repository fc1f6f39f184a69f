"""A new job as a :class:`.job_request.JobRequest`: made from a configuration (RPC ``Create``)."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yandex.cloud.datasphere.v2.jobs import jobs_pb2, project_job_service_pb2

from airflow_provider_datasphere.client.api import duration
from airflow_provider_datasphere.client.configuration.faults import Faults
from airflow_provider_datasphere.client.configuration.files import check_files
from airflow_provider_datasphere.client.configuration.overlay import Overlay
from airflow_provider_datasphere.client.configuration.read import ConfigSource, read_config
from airflow_provider_datasphere.client.configuration.section import Reader
from airflow_provider_datasphere.client.errors import DataSphereError, JobRequestError
from airflow_provider_datasphere.client.submission.job_key import without_tag
from airflow_provider_datasphere.client.submission.job_parameters import (
    check_request_size,
    file_message,
    image_of,
    set_docker,
    storage_message,
)
from airflow_provider_datasphere.client.submission.job_request import CreationRpc, PreparedJob
from airflow_provider_datasphere.client.transfer.inputs import InputSource, check_sizes
from airflow_provider_datasphere.client.transfer.local_modules import pack_modules
from airflow_provider_datasphere.client.transfer.upload import stage_local_inputs
from airflow_provider_datasphere.client.uri import is_uri
from airflow_provider_datasphere.client.validation import check_text, parse_ttl

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.api import JobApi
    from airflow_provider_datasphere.client.configuration.job_config import JobConfig, PythonEnvironment
    from airflow_provider_datasphere.client.logger import LoggerLike
    from airflow_provider_datasphere.client.submission.job_key import Key
    from airflow_provider_datasphere.client.submission.job_request import DescriptionTagger, InputStager
    from airflow_provider_datasphere.client.transfer.inputs import JobInput

log = logging.getLogger(__name__)

_NO_OVERLAY = Overlay()


class ProjectOrigin:
    """The project in which jobs are made.

    Implements :class:`.job_request.JobOrigin`.

    :param project_id: its id; nothing: the connection's.
    """

    def __init__(self, client: JobApi, project_id: str | None) -> None:
        self._given = project_id
        self._default = client.settings.project_id

    def project_id(self) -> str:
        """Return the project's id.

        :raises JobRequestError: there is none.
        """
        check_text("project_id", self._given)
        if project_id := (self._given or "").strip() or self._default:
            return project_id
        raise JobRequestError(
            "No project is given for the new job: give project_id, or fill in the project ID of the connection."
        )

    def is_origin_of(self, job: jobs_pb2.Job, key: Key) -> bool:
        # One that somebody forked from the task's own has inherited the token.
        return not job.parent_job_id


class NewJob:
    """A job that is made from a configuration.

    Implements :class:`.job_request.JobRequest`.

    :param project_id: where it is made; nothing: in the connection's project.
    :param source: the configuration.
    :param overlay: comes in the place of the configuration's values.
    :param data_ttl: how long the service keeps the job's data, whole days or ``"infinity"``; ``None``: 14 days.
    :param stage_inputs: makes inputs ready for upload; the default takes local paths only.
    :raises JobRequestError: the configuration has faults; the message has all of them.
    """

    creation = CreationRpc(
        "Create", project_job_service_pb2.CreateProjectJobMetadata, project_job_service_pb2.CreateProjectJobResponse
    )

    def __init__(
        self,
        client: JobApi,
        project_id: str | None,
        source: ConfigSource,
        overlay: Overlay = _NO_OVERLAY,
        *,
        data_ttl: timedelta | int | str | None = None,
        stage_inputs: InputStager = stage_local_inputs,
        logger: LoggerLike = log,
    ) -> None:
        self._ttl = parse_ttl("data_ttl", data_ttl)
        self._source = source
        self._stage_inputs = stage_inputs
        self._log = logger
        self._faults = Faults()
        self.origin = ProjectOrigin(client, project_id)
        self._project_id = self.origin.project_id()
        config = read_config(source, self._faults, overlay=overlay)
        if self._faults.errors:
            # Only then also the files, which an earlier try's job needs no more: all faults are told at once.
            if config is not None:
                self._check_files(config)
            self._faults.raise_errors()
        assert config is not None
        self.config: JobConfig = config

    @property
    def label(self) -> str:
        name = f" {self.config.name!r}" if self.config.name else ""
        return f"Creating the job{name} in project {self._project_id}"

    @property
    def data_ttl(self) -> timedelta | None:
        return self._ttl

    def comparable_arguments(self) -> Mapping[str, Any]:
        values = {"project_id": self._project_id, **self.config.comparable_arguments()}
        if desc := without_tag(self.config.desc):
            values["desc"] = desc
        return {**values, "data_ttl": "infinity" if self._ttl is None else self._ttl.total_seconds()}

    def has_inputs(self, jobs: Sequence[jobs_pb2.Job]) -> bool:
        return bool(self.config.inputs or self._modules)

    def changed_arguments(self, job: jobs_pb2.Job) -> list[str]:
        made = job.job_parameters
        expected = parameters_message(self.config, [], [])
        changed = [name for name in ("cmd", "attach_project_disk") if getattr(made, name) != getattr(expected, name)]
        changed += [
            name
            for name in ("s3_mount_ids", "dataset_ids", "output_datasets", "cloud_instance_types")
            if list(getattr(made, name)) != list(getattr(expected, name))
        ]
        changed += _changed_names("args", *({one.name: one.value for one in of.arguments} for of in (expected, made)))
        changed += _changed_names(
            "outputs", *({one.var or one.path: one.path for one in of.output_files} for of in (expected, made))
        )
        changed += _changed_names("env_vars", dict(self.config.env_vars), dict(made.env.vars))
        if image_of(made.env) != image_of(expected.env):
            changed.append("docker")
        python, expected_python = made.env.python_env, expected.env.python_env
        for name in ("python_version", "requirements"):
            if getattr(python, name) != getattr(expected_python, name):
                changed.append(name)
        if made.extended_working_storage.size_gb != expected.extended_working_storage.size_gb:
            changed.append("working_storage")
        if job.name not in ("", self.config.name):
            changed.append("name")
        return changed

    def changed_inputs(self, job: jobs_pb2.Job, *, compare_remote: bool) -> list[str]:
        made = job.job_parameters
        files = {(file.desc.var or file.desc.path): (file.sha256.lower(), file.size_bytes) for file in made.input_files}
        changed = []
        for source in self._sources:
            if is_uri(source.place) and not compare_remote:
                continue
            changed += self._changed(
                files, source.place, lambda scratch, s=source: self._stage_inputs([s], [], scratch)
            )
        modules = [(file.sha256.lower(), file.size_bytes) for file in made.env.python_env.local_modules]
        by_number = {f"_LOCAL_MODULE_{number}": content for number, content in enumerate(modules)}
        if self._modules:
            changed += self._changed(by_number, "local-paths", self._pack_modules)
        return list(dict.fromkeys(changed))

    def _changed(self, made: Mapping[str, tuple[str, int]], name: str, stage: Any) -> list[str]:
        """Return the names of inputs that aren't what the job has; an unreadable one isn't compared."""
        with tempfile.TemporaryDirectory(prefix="datasphere-inputs-") as scratch:
            try:
                staged: Sequence[JobInput] = stage(Path(scratch))
            except DataSphereError as error:
                self._log.debug("%s can't be compared with the job's: %s", name, error)
                return []
        return [
            f"vars[{one.var!r}]" if one.var and name != "local-paths" else name
            for one in staged
            if made.get(one.var or one.path) != (one.sha256.lower(), one.size_bytes)
        ]

    def prepare(self, scratch: Path, tag: DescriptionTagger | None) -> PreparedJob:
        config = self.config
        self._check_files(config)
        self._faults.raise_errors()
        for warning in self._faults.warnings:
            self._log.warning("%s", warning)
        inputs = list(self._stage_inputs(self._sources, [], scratch))
        modules = self._pack_modules(scratch)
        check_sizes((f"{one.var or one.path} ({one.path})", one.size_bytes) for one in (*inputs, *modules))
        desc = config.desc if tag is None else tag(config.desc)
        message = project_job_service_pb2.CreateProjectJobRequest(
            project_id=self._project_id,
            job_parameters=parameters_message(config, inputs, modules),
            config=self._source.text,
            name=config.name,
            desc=desc,
            data_ttl=duration(self._ttl),
        )
        self._check_size(message)
        return PreparedJob(self._project_id, message, [*inputs, *modules])

    def _check_size(self, message: project_job_service_pb2.CreateProjectJobRequest) -> None:
        config = self.config
        in_message = {"cmd": config.cmd}
        in_message |= {f"args[{name!r}]": value for name, value in config.args.items()}
        in_message |= {f"env_vars[{name!r}]": value for name, value in config.env_vars.items()}
        check_request_size(
            f"The request to create a job in project {self._project_id}",
            message.job_parameters.ByteSize(),
            {"the configuration": message.config, "name": message.name, "desc": message.desc},
            in_message,
        )

    def _check_files(self, config: JobConfig) -> None:
        check_files(config, Reader(self._faults, config.base_dir))

    @property
    def _sources(self) -> list[InputSource]:
        return [InputSource(entry.var, entry.path, self.config.base_dir) for entry in self.config.inputs]

    @property
    def _modules(self) -> list[str]:
        return [] if self.config.python is None else [entry.path for entry in self.config.python.local_paths]

    def _pack_modules(self, scratch: Path) -> list[JobInput]:
        return pack_modules(self._modules, self.config.base_dir, scratch, self._log)


def parameters_message(config: JobConfig, inputs: Sequence[JobInput], modules: Sequence[JobInput]) -> Any:
    """Return the ``job_parameters`` of Create, as the official SDK's ``Config.get_job_params`` makes them.

    :param inputs: the configuration's, described.
    :param modules: its local modules, packed.
    """
    environment = jobs_pb2.Environment(
        vars=dict(config.env_vars),
        python_env=None if config.python is None else _python_message(config.python, modules),
    )
    set_docker(environment, config.docker)
    parameters = jobs_pb2.JobParameters(
        arguments=[jobs_pb2.Argument(name=name, value=value) for name, value in config.args.items()],
        input_files=[file_message(job_input) for job_input in inputs],
        output_files=[jobs_pb2.FileDesc(path=entry.path, var=entry.var) for entry in config.outputs],
        s3_mount_ids=[entry.path for entry in config.s3_mounts],
        dataset_ids=[entry.path for entry in config.datasets],
        cmd=config.cmd,
        env=environment,
        attach_project_disk=config.attach_project_disk,
        cloud_instance_types=[jobs_pb2.CloudInstanceType(name=name) for name in config.cloud_instance_types],
        extended_working_storage=storage_message(config.working_storage_gib),
        output_datasets=[
            jobs_pb2.OutputDatasetDesc(
                name=one.name, description=one.description, labels=dict(one.labels), size_gb=one.size_gib, var=one.var
            )
            for one in config.output_datasets
        ],
    )
    if config.graceful_shutdown is not None:
        shutdown = parameters.graceful_shutdown_parameters
        shutdown.signal = config.graceful_shutdown.signal
        if config.graceful_shutdown.timeout_seconds is not None:
            shutdown.timeout.FromSeconds(config.graceful_shutdown.timeout_seconds)
    if config.spark_connector:
        parameters.spark_parameters.connector_id = config.spark_connector
    return parameters


def _python_message(python: PythonEnvironment, modules: Sequence[JobInput]) -> jobs_pb2.PythonEnv:
    options = None
    if python.pip is not None:
        options = jobs_pb2.PipOptions(
            index_url=python.pip.index_url,
            extra_index_urls=python.pip.extra_index_urls,
            trusted_hosts=python.pip.trusted_hosts,
            no_deps=python.pip.no_deps,
        )
    return jobs_pb2.PythonEnv(
        python_version=python.version,
        local_modules=[file_message(module) for module in modules],
        requirements=python.requirements,
        pip_options=options,
    )


def _changed_names(field: str, expected: Mapping[str, str], made: Mapping[str, str]) -> list[str]:
    names = dict.fromkeys((*expected, *made))
    return [f"{field}[{name!r}]" for name in names if expected.get(name) != made.get(name)]
