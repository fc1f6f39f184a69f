"""Job parameters: checks, overrides of a fork, and ``${NAME}`` references."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from yandex.cloud.datasphere.v2.jobs import jobs_pb2

from datasphere_emulator.errors import invalid

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from datasphere_emulator.settings import Settings

#: Largest number of inputs, outputs, S3 connectors and datasets each.
MAX_ENTRIES = 100
#: Largest size of a file and of all files of a job, bytes ("Limits in DataSphere").
MAX_FILE_BYTES = 5 << 30
MAX_JOB_BYTES = 10 << 30
MIN_WORKING_STORAGE_GB = 100
DEFAULT_INSTANCE_TYPE = "c1.4"
PROJECT_HOME = "DS_PROJECT_HOME"

_REFERENCE = re.compile(r"\$\{(.+?)}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def uploaded_files(parameters: jobs_pb2.JobParameters) -> Iterator[jobs_pb2.File]:
    """Iterate over the files that a client uploads: inputs and local modules."""
    yield from parameters.input_files
    yield from parameters.env.python_env.local_modules


def references(cmd: str) -> list[str]:
    """Return the names in ``${NAME}`` of a command."""
    found: list[str] = _REFERENCE.findall(cmd)
    return found


def replace_references(cmd: str, values: dict[str, str]) -> str:
    """Return the command with all ``${NAME}`` replaced; all names must be in ``values``."""
    return _REFERENCE.sub(lambda match: values[match[1]], cmd)


def check(parameters: jobs_pb2.JobParameters) -> None:
    """Check the parameters of a job.

    :raises StatusError: INVALID_ARGUMENT.
    """
    if not parameters.cmd.strip():
        raise invalid("job_parameters.cmd: must not be empty.")
    for field in ("input_files", "output_files", "s3_mount_ids", "dataset_ids"):
        if len(getattr(parameters, field)) > MAX_ENTRIES:
            raise invalid(f"job_parameters.{field}: more than {MAX_ENTRIES} entries.")
    _check_files(parameters)
    _check_paths("input_files", [file.desc for file in parameters.input_files])
    _check_paths("output_files", list(parameters.output_files))
    _check_names(parameters)
    if not parameters.cloud_instance_types:
        raise invalid("job_parameters.cloud_instance_types: at least one is required.")
    if parameters.HasField("extended_working_storage"):
        size = parameters.extended_working_storage.size_gb
        if size < MIN_WORKING_STORAGE_GB:
            raise invalid(
                f"job_parameters.extended_working_storage.size_gb={size}: must be {MIN_WORKING_STORAGE_GB} or more."
            )


def _check_files(parameters: jobs_pb2.JobParameters) -> None:
    total = 0
    for file in uploaded_files(parameters):
        if not _SHA256.fullmatch(file.sha256):
            raise invalid(f"File {file.desc.path!r}: sha256={file.sha256!r} is not 64 hexadecimal digits.")
        if not 0 <= file.size_bytes <= MAX_FILE_BYTES:
            raise invalid(f"File {file.desc.path!r}: size_bytes={file.size_bytes} is not within 0..{MAX_FILE_BYTES}.")
        total += file.size_bytes
    if total > MAX_JOB_BYTES:
        raise invalid(f"Files of the job have {total} bytes together, more than {MAX_JOB_BYTES}.")


def _check_paths(field: str, descs: list[jobs_pb2.FileDesc]) -> None:
    paths = []
    for desc in descs:
        if not desc.path:
            raise invalid(f"job_parameters.{field}: an entry has no path.")
        path = PurePosixPath(desc.path)
        if not desc.var and (path.is_absolute() or ".." in path.parts):
            raise invalid(f"job_parameters.{field}: path {desc.path!r} without var must be relative, without '..'.")
        paths.append(path)
    for number, path in enumerate(paths):
        for other in paths[number + 1 :]:
            if path == other or path in other.parents or other in path.parents:
                raise invalid(f"job_parameters.{field}: paths {str(path)!r} and {str(other)!r} overlap.")


def _check_names(parameters: jobs_pb2.JobParameters) -> None:
    names = list(declared_names(parameters))
    for name in names:
        if name == PROJECT_HOME:
            raise invalid(f"{name!r} is reserved and can't name a variable.")
        if names.count(name) > 1:
            raise invalid(f"Variable {name!r} is declared more than once.")
    for name in references(parameters.cmd):
        if name == PROJECT_HOME:
            if not parameters.attach_project_disk:
                raise invalid(f"job_parameters.cmd: {name} needs the flag attach_project_disk.")
        elif name not in names:
            raise invalid(f"job_parameters.cmd: there is no variable {name!r}.")


def declared_names(parameters: jobs_pb2.JobParameters) -> Iterator[str]:
    """Iterate over the names that ``${NAME}`` may refer to, except the project's home."""
    yield from (file.desc.var for file in parameters.input_files if file.desc.var)
    yield from (desc.var for desc in parameters.output_files if desc.var)
    yield from (argument.name for argument in parameters.arguments)
    yield from (dataset.var for dataset in parameters.output_datasets)
    yield from parameters.s3_mount_ids
    yield from parameters.dataset_ids


def override(
    source: jobs_pb2.JobParameters, overrides: jobs_pb2.JobParameters, settings: Settings
) -> jobs_pb2.JobParameters:
    """Return the parameters of a fork.

    :raises StatusError: INVALID_ARGUMENT, a field can't be overridden or a name isn't in the source.
    """
    _check_fixed(overrides)
    result = jobs_pb2.JobParameters()
    result.CopyFrom(source)
    arguments = {argument.name: argument for argument in result.arguments}
    for argument in overrides.arguments:
        if argument.name not in arguments:
            raise invalid(f"Argument {argument.name!r} is not present in the source job.{_have(arguments)}")
        arguments[argument.name].value = argument.value
    inputs = {file.desc.var: file for file in result.input_files if file.desc.var}
    for file in overrides.input_files:
        if file.desc.var not in inputs:
            raise invalid(f"Input variable {file.desc.var!r} is not present in the source job.{_have(inputs)}")
        inputs[file.desc.var].CopyFrom(file)
    outputs = {desc.var: desc for desc in result.output_files if desc.var}
    for desc in overrides.output_files:
        if desc.var not in outputs:
            raise invalid(f"Output variable {desc.var!r} is not present in the source job.{_have(outputs)}")
        outputs[desc.var].CopyFrom(desc)
    if overrides.env.vars:
        if settings.clone_env_vars == "replace":
            result.env.vars.clear()
        result.env.vars.update(overrides.env.vars)
    image = overrides.env.WhichOneof("docker_image")
    if image == "docker_image_resource_id":
        result.env.docker_image_resource_id = overrides.env.docker_image_resource_id
    elif image == "docker_image_spec":
        result.env.docker_image_spec.CopyFrom(overrides.env.docker_image_spec)
    if overrides.HasField("extended_working_storage"):
        result.extended_working_storage.CopyFrom(overrides.extended_working_storage)
    if overrides.cloud_instance_types:
        del result.cloud_instance_types[:]
        result.cloud_instance_types.extend(overrides.cloud_instance_types)
    return result


def _check_fixed(overrides: jobs_pb2.JobParameters) -> None:
    fixed = [
        name
        for name in (
            "cmd",
            "s3_mount_ids",
            "dataset_ids",
            "attach_project_disk",
            "output_datasets",
        )
        if getattr(overrides, name)
    ]
    fixed += [name for name in ("graceful_shutdown_parameters", "spark_parameters") if overrides.HasField(name)]
    if overrides.env.HasField("python_env"):
        fixed.append("env.python_env")
    if fixed:
        raise invalid(f"job_parameters_overrides: {', '.join(fixed)} can't be overridden.")


def _have(names: Iterable[str]) -> str:
    listed = ", ".join(sorted(names))
    return f" It has: {listed}." if listed else " It has none."
