"""A fork, from what a person writes to the message that the service gets. Pure: no I/O.

The rules are those of the official ``datasphere`` SDK 0.10 (``fork_params``, ``parse_docker_image``,
``parse_working_storage``, ``check_limits``), which sends the same Clone request.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from airflow_provider_datasphere.client.errors import JobRequestError
from airflow_provider_datasphere.client.overrides import MAX_ENTRIES, OVERRIDE_CHECKS, is_pattern
from airflow_provider_datasphere.client.submission.job_key import without_tag
from airflow_provider_datasphere.client.submission.job_parameters import (
    check_request_size,
    file_message,
    set_docker,
    storage_message,
)
from airflow_provider_datasphere.client.transfer.inputs import check_sizes
from airflow_provider_datasphere.client.uri import is_uri
from airflow_provider_datasphere.client.validation import check_job_id, parse_ttl, parse_working_storage

if TYPE_CHECKING:
    from yandex.cloud.datasphere.v2.jobs import jobs_pb2

    from airflow_provider_datasphere.client.transfer.inputs import JobInput

EXPIRY_WARNING = timedelta(days=3)

#: The check of each field of a :class:`ForkRequest`, for its whole value; raises :class:`JobRequestError`.
FIELD_CHECKS: Mapping[str, Callable[[Any], object]] = {
    "source_job_id": lambda value: check_job_id(
        "source_job_id", value, "give the id of the DataSphere job to fork, such as 'bt1…'"
    ),
    **OVERRIDE_CHECKS,
}


@dataclass(frozen=True)
class ForkRequest:
    """What to fork and what to change: one value from the operator's arguments to the Clone call.

    :param source_job_id: the job to clone.
    :param args: argument name -> value (strings); names must exist in the source job.
    :param vars: input variable -> local path or URI; output variable -> new path inside the job.
    :param env_vars: environment variables. Whether the service merges them with the source's or puts them in
        their place is not documented.
    :param name: name of the new job; ``None`` leaves it to the service.
    :param desc: description of the new job; ``None`` leaves it to the service.
    :param docker: image resource id or system image name, or ``{"image", "username", "password": {"secret-id"}}``.
    :param working_storage: ``{"type": "SSD", "size": "100GB"}``, at least 100 GB.
    :param cloud_instance_types: in order of preference; empty keeps the source's.
    :param data_ttl: how long the service keeps the new job's data, whole days or ``"infinity"``; ``None``: 14 days.
    """

    source_job_id: str
    args: Mapping[str, str] = field(default_factory=dict)
    vars: Mapping[str, str] = field(default_factory=dict)
    env_vars: Mapping[str, str] = field(default_factory=dict)
    name: str | None = None
    desc: str | None = None
    docker: str | Mapping[str, Any] | None = None
    working_storage: Mapping[str, Any] | None = None
    cloud_instance_types: Sequence[str] = ()
    data_ttl: timedelta | int | str | None = None

    def __post_init__(self) -> None:
        for name, check in FIELD_CHECKS.items():
            check(getattr(self, name))

    def comparable_arguments(self) -> dict[str, Any]:
        """Return the arguments by the names that messages give them, so that equal requests have equal ones."""
        ttl = parse_ttl("data_ttl", self.data_ttl)
        values: dict[str, Any] = {"source_job_id": self.source_job_id}
        for name, entries in (("args", self.args), ("vars", self.vars), ("env_vars", self.env_vars)):
            values |= {f"{name}[{key!r}]": value for key, value in entries.items()}
        optional = {
            "name": self.name,
            "desc": None if self.desc is None else without_tag(self.desc),
            "docker": self.docker or None,
            "working_storage": parse_working_storage(self.working_storage),
            "cloud_instance_types": list(self.cloud_instance_types) or None,
            "data_ttl": "infinity" if ttl is None else ttl.total_seconds(),
        }
        return values | {name: value for name, value in optional.items() if value is not None}


@dataclass(frozen=True)
class ForkPlan:
    """A request sorted by what its source job declares: which variables are inputs, which outputs.

    :param kept_inputs: paths of the source's named inputs that stay.
    """

    request: ForkRequest
    input_vars: Mapping[str, str]
    output_vars: Mapping[str, str]
    kept_inputs: Sequence[str] = ()


def plan_fork(request: ForkRequest, source: jobs_pb2.Job) -> ForkPlan:
    """Check a request against its source job.

    :raises JobRequestError: the source's data are cleared; an argument or variable that the source doesn't have
        (the message lists those it has); a variable given nothing; an output variable given a URI; outputs that
        overlap; too many entries.
    """
    if source.data_cleared:
        raise JobRequestError(
            f"Source job {source.id} can't be forked: its data are cleared. Run its template again and use the new "
            "job's id, and keep it longer with source_data_ttl='infinity'."
        )
    parameters = source.job_parameters
    known_args = [argument.name for argument in parameters.arguments]
    _check_known("args", request.args, known_args, "arguments", source.id)
    old_inputs = {file.desc.var: file.desc.path for file in parameters.input_files if file.desc.var}
    old_outputs = {desc.var: desc.path for desc in parameters.output_files if desc.var}
    _check_known("vars", request.vars, [*old_inputs, *old_outputs], "named input and output files", source.id)

    input_vars = {var: path for var, path in request.vars.items() if var in old_inputs}
    output_vars = {var: path for var, path in request.vars.items() if var not in old_inputs}
    _check_inputs(input_vars, source.id)
    _check_outputs(output_vars, source.id)
    kept_outputs = [path for var, path in old_outputs.items() if var not in output_vars]
    _check_no_overlaps("vars (outputs)", [*output_vars.values(), *kept_outputs])
    kept_inputs = [path for var, path in old_inputs.items() if var not in input_vars]
    return ForkPlan(request, input_vars, output_vars, kept_inputs)


def _check_inputs(input_vars: Mapping[str, str], source_job_id: str) -> None:
    _check_count("input files", input_vars)
    for var, path in input_vars.items():
        # Nothing, as of a template whose XCom is empty, would otherwise be the worker's current folder.
        if not path.removeprefix("file://").strip():
            raise JobRequestError(
                f"vars[{var!r}] is {path!r}: give a local path or a URI for this input of job {source_job_id}, or "
                f"leave {var} out to keep the source's file."
            )


def _check_outputs(output_vars: Mapping[str, str], source_job_id: str) -> None:
    _check_count("output files", output_vars)
    for var, path in output_vars.items():
        if is_uri(path):
            raise JobRequestError(
                f"vars[{var!r}] is {path!r}, but {var} is an output of job {source_job_id}: give the path inside the "
                "job where the program writes it, and download it with DownloadJobResultsOperator."
            )
        if not path:
            raise JobRequestError(f"vars[{var!r}] is empty: give the new path of this output inside the job.")
        if is_pattern(path):
            raise JobRequestError(
                f"vars[{var!r}] is {path!r}, a pattern: DataSphere accepts it, and fails the job at its end. Give the "
                "path of one file or folder."
            )


def _check_count(what: str, entries: Mapping[str, str]) -> None:
    if len(entries) > MAX_ENTRIES:
        raise JobRequestError(f"vars overrides {len(entries)} {what}: DataSphere allows {MAX_ENTRIES}.")


def pattern_warning(plan: ForkPlan, source: jobs_pb2.Job) -> str | None:
    """Return a warning about outputs of the source job that are patterns, which make the job fail at its end."""
    paths = [desc.path for desc in source.job_parameters.output_files if desc.var not in plan.output_vars]
    patterns = [path for path in paths if is_pattern(path)]
    if not patterns:
        return None
    return (
        f"Outputs of source job {source.id} look like patterns: {', '.join(patterns)}. DataSphere collects files and "
        "folders by their names, and fails such a job at its end."
    )


def kept_paths(parameters: jobs_pb2.JobParameters, replaced: Collection[str]) -> list[str]:
    """Return the paths of a source job's inputs that stay.

    :param replaced: variables of the others.
    """
    return [file.desc.path for file in parameters.input_files if file.desc.var not in replaced]


def overrides_message(plan: ForkPlan, inputs: Sequence[JobInput]) -> jobs_pb2.JobParameters:
    """Return the ``job_parameters_overrides`` of Clone; what isn't overridden has its default value, as in the SDK.

    :raises JobRequestError: an input over 5 GiB, or over 10 GiB together; inputs that overlap; more than one request
        can hold.
    """
    from yandex.cloud.datasphere.v2.jobs import jobs_pb2

    # Those that were copied were checked before; only now all sizes are known.
    check_sizes((f"vars[{job_input.var!r}] ({job_input.path})", job_input.size_bytes) for job_input in inputs)
    # Relative paths of the source's inputs are compared as if they were here, as the SDK does.
    paths = [*(job_input.path for job_input in inputs), *plan.kept_inputs]
    _check_no_overlaps("vars (inputs)", map(os.path.abspath, paths))

    request = plan.request
    environment = jobs_pb2.Environment(vars=request.env_vars)
    set_docker(environment, request.docker)
    message = jobs_pb2.JobParameters(
        arguments=[jobs_pb2.Argument(name=name, value=value) for name, value in request.args.items()],
        input_files=[file_message(job_input) for job_input in inputs],
        output_files=[jobs_pb2.FileDesc(path=path, var=var) for var, path in plan.output_vars.items()],
        env=environment,
        cloud_instance_types=[jobs_pb2.CloudInstanceType(name=name) for name in request.cloud_instance_types],
        extended_working_storage=storage_message(parse_working_storage(request.working_storage)),
    )
    in_message = {
        f"{field_name}[{name!r}]": value
        for field_name in ("args", "vars", "env_vars")
        for name, value in getattr(request, field_name).items()
    }
    check_request_size(
        f"The request to fork job {request.source_job_id}",
        message.ByteSize(),
        {"name": request.name or "", "desc": request.desc or ""},
        in_message,
    )
    return message


def expiry_warning(source: jobs_pb2.Job, now: datetime) -> str | None:
    """Return a warning about a source job whose data expire within 3 days, after which it can't be forked any more.

    :param now: timezone-aware.
    """
    if not source.HasField("data_expires_at"):
        return None
    expires = source.data_expires_at.ToDatetime(tzinfo=timezone.utc)
    if expires - now > EXPIRY_WARNING:
        return None
    hours = max(0, int((expires - now).total_seconds() // 3600))
    return (
        f"The data of source job {source.id} expire in {hours} hours ({expires.isoformat()}); after that it can't be "
        "forked. Keep it with source_data_ttl='infinity' (or a timedelta) on this task."
    )


def _check_known(
    field_name: str, given: Mapping[str, str], known: Sequence[str], what: str, source_job_id: str
) -> None:
    unknown = [name for name in given if name not in known]
    if unknown:
        raise JobRequestError(
            f"{field_name} names {', '.join(map(repr, unknown))}, which source job {source_job_id} doesn't have; its "
            f"{what}: {', '.join(known) or 'none'}."
        )


def overlapping(path: PurePosixPath, others: Iterable[PurePosixPath]) -> PurePosixPath | None:
    """Return the first of ``others`` that is the same file as ``path``, a folder above it, or a file in it."""
    return next((other for other in others if path == other or other in path.parents or path in other.parents), None)


def _check_no_overlaps(field_name: str, paths: Iterable[str]) -> None:
    seen: set[PurePosixPath] = set()
    for path in map(PurePosixPath, paths):
        clash = overlapping(path, seen)
        if clash is not None:
            raise JobRequestError(
                f"{field_name}: {str(path)!r} and {str(clash)!r} overlap; each file needs its own path."
            )
        seen.add(path)
