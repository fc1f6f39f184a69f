"""The operator behind ``@task.datasphere``: a Python function runs as a job, and its return value is the task's."""

from __future__ import annotations

import inspect
import os
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_provider_datasphere.arguments import path_as_text, paths_as_text
from airflow_provider_datasphere.client.monitoring import DEFAULT_POLL_INTERVAL
from airflow_provider_datasphere.compat import conf
from airflow_provider_datasphere.config_template import dag_folder
from airflow_provider_datasphere.exceptions import JobRequestError
from airflow_provider_datasphere.hooks.datasphere import DataSphereHook
from airflow_provider_datasphere.operators.base import JobOperator
from airflow_provider_datasphere.templates import TextTemplates

if TYPE_CHECKING:
    from datetime import timedelta

    from airflow_provider_datasphere.client import cancellation
    from airflow_provider_datasphere.client.function.program import FunctionCall
    from airflow_provider_datasphere.client.model import JobHandle
    from airflow_provider_datasphere.client.monitoring.outcome import Outcome
    from airflow_provider_datasphere.client.submission.new_job import NewJob, ProjectOrigin
    from airflow_provider_datasphere.client.sync_client import DataSphereClient
    from airflow_provider_datasphere.compat import Context


class FunctionJobOperator(TextTemplates, JobOperator):
    """Runs a function as a job; the arguments are those of :func:`.decorators.datasphere.datasphere_task`.

    The function itself, ``op_args`` and ``op_kwargs`` are those of Airflow's decorated operators.
    """

    python_callable: Any
    op_args: Sequence[Any]
    op_kwargs: Mapping[str, Any]

    template_fields: Sequence[str] = (
        "op_args",
        "op_kwargs",
        "project_id",
        "requirements",
        "inputs",
        "outputs",
        "env_vars",
        "name",
        "desc",
        "docker",
        "working_storage",
        "cloud_instance_types",
        "data_ttl",
        "datasphere_conn_id",
    )
    text_fields = ("project_id", "name", "desc", "datasphere_conn_id")
    text_containers = (
        "requirements",
        "inputs",
        "outputs",
        "env_vars",
        "docker",
        "working_storage",
        "cloud_instance_types",
        "data_ttl",
    )
    template_fields_renderers = {  # noqa: RUF012 -- Airflow's own idiom
        "op_args": "py",
        "op_kwargs": "py",
        "requirements": "json",
        "inputs": "json",
        "outputs": "json",
        "env_vars": "json",
        "docker": "json",
        "working_storage": "json",
        "cloud_instance_types": "json",
    }
    returns_job_id = False
    wait_for_completion = True

    def __init__(
        self,
        *,
        project_id: str | None = None,
        requirements: Sequence[str] | str | Path | None = None,
        python_version: str | None = None,
        inputs: Mapping[str, Any] | None = None,
        outputs: Sequence[str] | None = None,
        modules: Sequence[str | Path] | None = None,
        serializer: str = "json",
        env_vars: Mapping[str, str] | None = None,
        name: str | None = None,
        desc: str | None = None,
        docker: str | Mapping[str, Any] | None = None,
        working_storage: Mapping[str, Any] | None = None,
        cloud_instance_types: Sequence[str] | None = None,
        data_ttl: timedelta | int | str | None = None,
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
        self.project_id = project_id
        self.requirements = path_as_text(requirements)
        self.python_version = python_version
        self.inputs = paths_as_text(inputs)
        self.outputs = outputs
        self.modules = modules
        self.serializer = serializer
        self.env_vars = env_vars
        self.name = name
        self.desc = desc
        self.docker = docker
        self.working_storage = working_storage
        self.cloud_instance_types = cloud_instance_types
        self.data_ttl = data_ttl
        self.deferrable = deferrable
        self.start_timeout = start_timeout
        self.poll_interval = poll_interval
        self.stream_logs = stream_logs
        self.on_kill_action = on_kill_action
        self.reattach = reattach
        self.fail_on_missing_outputs = fail_on_missing_outputs
        self.skip_on_exit_code = skip_on_exit_code
        self.datasphere_conn_id = datasphere_conn_id
        self._value: Any = None
        self._staging: tempfile.TemporaryDirectory[str] | None = None

    @property
    def _proof(self) -> str:  # type: ignore[override]
        from airflow_provider_datasphere.client.function.program import PROOF

        return PROOF

    def execute(self, context: Context) -> Any:
        try:
            return super().execute(context)
        finally:
            self._remove_staging()

    def execute_complete(self, context: Context, event: dict[str, Any] | None = None) -> Any:
        try:
            return super().execute_complete(context, event)
        finally:
            self._remove_staging()

    def _remove_staging(self) -> None:
        """Remove what was made for the upload: a task's process ends without the interpreter's own cleaning up."""
        if self._staging is not None:
            self._staging.cleanup()
            self._staging = None

    # The job -----------------------------------------------------------------------------------------------------

    def _job_request(self, context: Context, client: DataSphereClient) -> NewJob:
        from airflow_provider_datasphere.client.configuration.overlay import Overlay
        from airflow_provider_datasphere.client.configuration.read import ConfigSource
        from airflow_provider_datasphere.client.function.program import FOLDER
        from airflow_provider_datasphere.client.submission.new_job import NewJob

        call = self._call(context)
        # Lives until this try ends: one that attaches compares it with what the job has.
        self._staging = tempfile.TemporaryDirectory(prefix="datasphere-function-")
        folder = Path(self._staging.name)
        call.write(folder / FOLDER)
        config = {
            "cmd": call.command,
            "inputs": [{place: var} for place, var in self._places(call, folder).items()] + [FOLDER],
            "outputs": [*call.outputs, self._proof],
            **self._environment(folder),
        }
        overlay = Overlay(
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
            ConfigSource(config, folder),
            overlay,
            data_ttl=self.data_ttl,
            stage_inputs=self._stage_inputs(client),
            logger=self.log,
        )

    def _job_origin(self, context: Context, client: DataSphereClient) -> ProjectOrigin:
        from airflow_provider_datasphere.client.submission.new_job import ProjectOrigin

        return ProjectOrigin(client, self.project_id)

    def _call(self, context: Context) -> FunctionCall:
        from airflow_provider_datasphere.client.function.program import FunctionCall
        from airflow_provider_datasphere.client.function.source import read_source

        inputs = {} if self.inputs is None else dict(paths_as_text(self.inputs))
        args, kwargs = self._arguments(context, inputs)
        return FunctionCall(
            source=read_source(self.python_callable, self._version),
            args=args,
            kwargs=kwargs,
            inputs=inputs,
            outputs=[] if self.outputs is None else list(self.outputs),
            modules=[self._local(f"modules[{n}]", str(module)) for n, module in enumerate(self.modules or ())],
            serializer=self.serializer,
        )

    def _arguments(self, context: Context, inputs: Collection[str]) -> tuple[Sequence[Any], Mapping[str, Any]]:
        """Return all arguments of the function: the DAG's, its context's and its defaults."""
        signature = inspect.signature(self.python_callable)
        given = signature.bind_partial(*self.op_args, **self.op_kwargs)
        values: Any = context
        for name, parameter in signature.parameters.items():
            named = parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            if named and name not in given.arguments and name in values:
                given.arguments[name] = values[name]
        try:
            given = signature.bind(*given.args, **given.kwargs)
        except TypeError as error:
            raise JobRequestError(
                f"{self.python_callable.__name__}: {error}. If that is a context variable, this run hasn't it: one "
                "that was triggered by hand may have no logical date, and so no ds."
            ) from error
        given.apply_defaults()
        for name in inputs:
            given.arguments[name] = None  # the job has its own path
        return given.args, given.kwargs

    def _places(self, call: FunctionCall, folder: Path) -> dict[str, str]:
        """Return path or URI -> variable of the inputs; local ones are linked to, alike on each worker."""
        from airflow_provider_datasphere.client.uri import is_uri

        places = {}
        for name, var in call.input_vars.items():
            place = call.inputs[name]
            if is_uri(place) and not place.startswith("file://"):
                places[place] = var
                continue
            target = self._local(f"inputs[{name!r}]", place.removeprefix("file://"))
            link = Path("inputs", var, target.name)
            (folder / link).parent.mkdir(parents=True)
            (folder / link).symlink_to(target)
            places[str(link)] = var
        if len(places) < len(call.inputs):
            raise JobRequestError("inputs has one URI twice: give it to one parameter.")
        return places

    def _local(self, field: str, path: str) -> Path:
        """Return a local file or folder, whose path is relative to the DAG file's folder.

        :raises JobRequestError: there is none.
        """
        if not path.strip():
            raise JobRequestError(f"{field} is {path!r}: give a path or a URI.")
        place = Path(os.path.normpath(dag_folder(self) / path))
        if not place.exists():
            raise JobRequestError(f"{field} is {path!r}: there is no such file or folder; looked in {place.parent}.")
        return place

    @property
    def _version(self) -> str:
        return self.python_version or f"{sys.version_info.major}.{sys.version_info.minor}"

    def _environment(self, folder: Path) -> dict[str, Any]:
        """Return the section ``env``: an environment of its own, unless an image has all that is needed."""
        if self.docker and self.requirements is None and self.python_version is None:
            return {}
        file = "requirements.txt"
        lines: list[str] = []
        if isinstance(self.requirements, str):
            file = str(self._local("requirements", self.requirements))
        else:
            lines = list(self.requirements or ())
        if self.serializer == "cloudpickle" and not isinstance(self.requirements, str):
            import cloudpickle

            lines.append(f"cloudpickle=={cloudpickle.__version__}")
        if not isinstance(self.requirements, str):
            (folder / file).write_text("".join(f"{line}\n" for line in lines), "utf-8")
        python = {"type": "manual", "version": self._version, "requirements-file": file, "local-paths": []}
        return {"env": {"python": python}}

    # Its end -----------------------------------------------------------------------------------------------------

    def _examine(self, handle: JobHandle, outcome: Outcome) -> Outcome:
        from airflow_provider_datasphere.operators.function_end import FunctionEnd

        guard = self._guard
        assert guard.client is not None
        end = FunctionEnd(guard.client, handle, self.python_callable.__name__, guard.link, self.log)
        outcome, self._value = end.examine(outcome)
        return outcome

    def _return_value(self, handle: JobHandle) -> Any:
        return self._value
