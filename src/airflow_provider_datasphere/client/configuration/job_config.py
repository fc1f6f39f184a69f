"""A configuration as a value: what stands in it, read and checked, before any of it becomes a message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from airflow_provider_datasphere.client.configuration.faults import Place

#: What the service takes where no type is named (``parse_cloud_config`` of the official SDK).
DEFAULT_INSTANCE_TYPE = "c1.4"
#: The reserved variable for the project's disk, and the flag that it needs.
PROJECT_HOME, PROJECT_DISK_FLAG = "DS_PROJECT_HOME", "attach-project-disk"


@dataclass(frozen=True)
class PathEntry:
    """An entry of ``inputs`` or ``outputs``, or an id in ``s3-mounts`` or ``datasets``.

    :param path: as written: a path, a URI (of an input that an argument replaces), or an id.
    :param var: the variable that ``cmd`` names it by; empty: none.
    """

    path: str
    var: str = ""
    place: Place = field(default=Place(), compare=False)

    @property
    def label(self) -> str:
        """What messages call it."""
        return self.var or self.path


@dataclass(frozen=True)
class PipOptions:
    """Options of ``pip install`` in the job (``env.python.pip``, and those in requirements files)."""

    index_url: str = ""
    extra_index_urls: tuple[str, ...] = ()
    trusted_hosts: tuple[str, ...] = ()
    no_deps: bool = False


@dataclass(frozen=True)
class PythonEnvironment:
    """The section ``env.python`` of type manual.

    :param version: major and minor: ``3.11``.
    :param requirements: lines with one requirement each, without comments and markers.
    :param local_paths: modules and packages to ship.
    :param pip: ``None`` where no option is given.
    """

    version: str
    requirements: tuple[str, ...] = ()
    local_paths: tuple[PathEntry, ...] = ()
    pip: PipOptions | None = None


@dataclass(frozen=True)
class OutputDataset:
    """An entry of ``output-datasets``.

    :param size_gib: rounded down, as the official SDK does.
    """

    name: str
    var: str
    size_gib: int
    description: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    place: Place = field(default=Place(), compare=False)


@dataclass(frozen=True)
class GracefulShutdown:
    """The section ``graceful-shutdown``.

    :param signal: its number.
    :param timeout_seconds: whole seconds; ``None``: no timeout.
    """

    signal: int
    timeout_seconds: int | None = None


@dataclass(frozen=True)
class JobConfig:
    """A job to create.

    :param cmd: the command, with ``${NAME}`` for variables and arguments; names of S3 connectors and datasets are
        replaced by their ids, as the official SDK does.
    :param docker: resource id or system image name, or ``{"image", "username", "password": {"secret-id"}}``.
    :param working_storage_gib: ``None`` for the default disk.
    :param spark_connector: id; empty for none.
    :param base_dir: what relative paths are relative to.
    :param text: the raw text of the configuration, which is stored with the job.
    """

    cmd: str
    name: str = ""
    desc: str = ""
    args: Mapping[str, str] = field(default_factory=dict)
    inputs: Sequence[PathEntry] = ()
    outputs: Sequence[PathEntry] = ()
    s3_mounts: Sequence[PathEntry] = ()
    datasets: Sequence[PathEntry] = ()
    env_vars: Mapping[str, str] = field(default_factory=dict)
    docker: str | Mapping[str, Any] | None = None
    python: PythonEnvironment | None = None
    attach_project_disk: bool = False
    cloud_instance_types: Sequence[str] = (DEFAULT_INSTANCE_TYPE,)
    working_storage_gib: int | None = None
    output_datasets: Sequence[OutputDataset] = ()
    graceful_shutdown: GracefulShutdown | None = None
    spark_connector: str = ""
    base_dir: Path = Path()
    text: str = ""

    def comparable_arguments(self) -> dict[str, Any]:
        """Return what the job is made of, by the names that messages give it; equal for equal jobs.

        Not the text: a comment in it changes no job.
        """
        values: dict[str, Any] = {
            "cmd": self.cmd,
            "inputs": [(entry.path, entry.var) for entry in self.inputs if not entry.var] or None,
            "outputs": [(entry.path, entry.var) for entry in self.outputs if not entry.var] or None,
            "s3-mounts": [entry.path for entry in self.s3_mounts] or None,
            "datasets": [entry.path for entry in self.datasets] or None,
            "docker": self.docker or None,
            "flags": [PROJECT_DISK_FLAG] if self.attach_project_disk else None,
            "cloud-instance-types": list(self.cloud_instance_types),
            "working-storage": self.working_storage_gib,
            "output-datasets": [
                (one.name, one.var, one.size_gib, one.description, dict(one.labels)) for one in self.output_datasets
            ]
            or None,
            "spark": self.spark_connector or None,
            "name": self.name or None,
        }
        if self.graceful_shutdown is not None:
            values["graceful-shutdown"] = (self.graceful_shutdown.signal, self.graceful_shutdown.timeout_seconds)
        if self.python is not None:
            python = self.python
            values |= {
                "env.python.version": python.version,
                "env.python.requirements-file": list(python.requirements) or None,
                "env.python.local-paths": [entry.path for entry in python.local_paths] or None,
                "env.python.pip": None if python.pip is None else repr(python.pip),
            }
        values |= {f"args[{name!r}]": value for name, value in self.args.items()}
        values |= {f"env_vars[{name!r}]": value for name, value in self.env_vars.items()}
        values |= {f"vars[{one.var!r}]": one.path for one in (*self.inputs, *self.outputs) if one.var}
        return {name: value for name, value in values.items() if value is not None}
