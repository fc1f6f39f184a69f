"""A fork, from what a person writes to the message the service gets. Decides and checks; talks to nobody.

The rules are those of the official ``datasphere`` SDK 0.10 (``fork_params``, ``parse_docker_image``,
``parse_working_storage``, ``check_limits``), which sends the same Clone request.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, cast

from airflow_provider_datasphere.client.errors import JobRequestError
from airflow_provider_datasphere.client.staging import check_sizes

if TYPE_CHECKING:
    from yandex.cloud.datasphere.v2.jobs import jobs_pb2

    from airflow_provider_datasphere.client.upload import JobInput

GIB = 1 << 30
#: What the SDK sends with every Create and Clone.
DEFAULT_DATA_TTL = timedelta(days=14)
INFINITY = "infinity"
MAX_ENTRIES = 100
MIN_WORKING_STORAGE_GIB = 100
EXPIRY_WARNING = timedelta(days=3)

_ID = re.compile(r"[0-9A-Za-z_-]+")
_SIZE = re.compile(r"\s*(\d+)\s*(KB|MB|GB|TB|PB)?\s*", re.IGNORECASE)
_UNITS = {unit: 1 << shift for unit, shift in (("KB", 10), ("MB", 20), ("GB", 30), ("TB", 40), ("PB", 50))}
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://")


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
        check_source_job_id(self.source_job_id)
        for name in ("args", "vars", "env_vars"):
            check_strings(name, getattr(self, name))
        check_text("name", self.name)
        check_text("desc", self.desc)
        check_instance_types(self.cloud_instance_types)
        check_docker(self.docker)
        parse_working_storage(self.working_storage)
        parse_ttl("data_ttl", self.data_ttl)


def check_source_job_id(source_job_id: object) -> None:
    """Refuse what can't be a job's id."""
    check_job_id("source_job_id", source_job_id, "give the id of the DataSphere job to fork, such as 'bt1…'")


def check_job_id(field_name: str, job_id: object, way_out: str) -> None:
    """Refuse what can't be a job's id; a blank or a quote around one would make it that of no job."""
    # A template of an XCom that isn't there renders to "None".
    if not isinstance(job_id, str) or job_id == "None" or not _ID.fullmatch(job_id):
        raise JobRequestError(f"{field_name} is {job_id!r}: {way_out}.")


def check_text(field_name: str, text: object) -> None:
    """Refuse what is neither a string nor ``None``."""
    if text is not None and not isinstance(text, str):
        raise JobRequestError(f"{field_name} is {text!r} ({type(text).__name__}): give a string.")


def check_strings(field_name: str, values: object) -> None:
    """Refuse what is not a mapping of strings to strings."""
    if not isinstance(values, Mapping):
        raise JobRequestError(f"{field_name} is {values!r}: give a mapping of names to strings.")
    for name, value in values.items():
        if not isinstance(name, str) or not name:
            raise JobRequestError(f"{field_name} has the name {name!r}: names are non-empty strings.")
        if field_name == "env_vars" and ("=" in name or "\0" in name):
            raise JobRequestError(f"{field_name} has the name {name!r}: no environment variable can be called that.")
        if not isinstance(value, str):
            raise JobRequestError(
                f"{field_name}[{name!r}] is {value!r} ({type(value).__name__}): DataSphere takes strings; write "
                f"{str(value)!r}."
            )


def check_instance_types(types: object) -> None:
    """Refuse what is not a sequence of instance type names."""
    if isinstance(types, str):
        raise JobRequestError(f"cloud_instance_types is {types!r}: give a list, such as [{types!r}].")
    if not isinstance(types, Sequence) or not all(isinstance(name, str) and name for name in types):
        raise JobRequestError(f"cloud_instance_types is {types!r}: give a list of names, such as ['g1.1', 'c1.4'].")


def parse_ttl(field_name: str, ttl: timedelta | int | str | None) -> timedelta | None:
    """A time to live as the API wants it: whole days, or ``None`` for infinity.

    ``None`` as input means the default of 14 days. A number may be text, as a template makes it.
    """
    if ttl is None:
        return DEFAULT_DATA_TTL
    if isinstance(ttl, str) and ttl.strip().lower() in (INFINITY, "inf"):
        return None
    if isinstance(ttl, str) and ttl.strip().isdecimal():
        ttl = int(ttl)
    if isinstance(ttl, int) and not isinstance(ttl, bool) and 1 <= ttl <= timedelta.max.days:
        return timedelta(days=ttl)
    if isinstance(ttl, timedelta) and ttl >= timedelta(days=1) and not ttl % timedelta(days=1):
        return ttl
    raise JobRequestError(
        f"{field_name} is {ttl!r}: give a timedelta of one or more whole days, such as timedelta(days=30), "
        f"a number of days, or {INFINITY!r}."
    )


def check_docker(docker: object) -> None:
    """Refuse what is neither an image id or name nor a mapping that describes an image."""
    if docker is None or isinstance(docker, str):
        return
    if not isinstance(docker, Mapping):
        raise JobRequestError(f"docker is {docker!r}: give an image id or name, or {{'image': …, 'username': …}}.")
    unknown = sorted(set(docker) - {"image", "username", "password"})
    if unknown or not isinstance(docker.get("image"), str) or not docker["image"]:
        raise JobRequestError(
            f"docker has the keys {sorted(docker)}: 'image' is needed; 'username' and 'password' may be given."
        )
    password = docker.get("password")
    if isinstance(password, str):
        raise JobRequestError(
            "docker['password'] is plain text: DataSphere takes the name of a project secret, "
            "{'secret-id': '<name>'}, so that the password stays out of the DAG."
        )
    if password is not None and (not isinstance(password, Mapping) or not isinstance(password.get("secret-id"), str)):
        raise JobRequestError("docker['password'] must be {'secret-id': '<name of a project secret>'}.")


def parse_size(field_name: str, size: object) -> int:
    """Bytes of ``100`` or ``'100GB'`` (binary multiples, as the SDK reads them)."""
    match = _SIZE.fullmatch(str(size)) if isinstance(size, (int, str)) and not isinstance(size, bool) else None
    if match is None:
        raise JobRequestError(f"{field_name} is {size!r}: give bytes, or a whole number with KB, MB, GB, TB or PB.")
    number, unit = match.groups()
    return int(number) * (_UNITS[unit.upper()] if unit else 1)


def parse_working_storage(storage: object) -> int | None:
    """The size of extended working storage as the API wants it: GiB, rounded up."""
    if storage is None:
        return None
    if not isinstance(storage, Mapping) or "size" not in storage or set(storage) - {"type", "size"}:
        raise JobRequestError(f"working_storage is {storage!r}: give {{'size': '100GB'}}, 'type' may be 'SSD'.")
    if storage.get("type", "SSD") != "SSD":
        raise JobRequestError(f"working_storage['type'] is {storage['type']!r}: DataSphere offers 'SSD'.")
    size_gib = -(-parse_size("working_storage['size']", storage["size"]) // GIB)
    if size_gib < MIN_WORKING_STORAGE_GIB:
        raise JobRequestError(f"working_storage['size'] is {storage['size']!r}: at least {MIN_WORKING_STORAGE_GIB}GB.")
    return size_gib


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
    _refuse_unknown("args", request.args, known_args, "arguments", source.id)
    old_inputs = {file.desc.var: file.desc.path for file in parameters.input_files if file.desc.var}
    old_outputs = {desc.var: desc.path for desc in parameters.output_files if desc.var}
    _refuse_unknown("vars", request.vars, [*old_inputs, *old_outputs], "named input and output files", source.id)

    input_vars = {var: path for var, path in request.vars.items() if var in old_inputs}
    output_vars = {var: path for var, path in request.vars.items() if var not in old_inputs}
    for var, path in input_vars.items():
        # Nothing, as of a template whose XCom is empty, would otherwise be the worker's current folder.
        if not path.removeprefix("file://").strip():
            raise JobRequestError(
                f"vars[{var!r}] is {path!r}: give a local path or a URI for this input of job {source.id}, or leave "
                f"{var} out to keep the source's file."
            )
    for var, path in output_vars.items():
        if _URI.match(path):
            raise JobRequestError(
                f"vars[{var!r}] is {path!r}, but {var} is an output of job {source.id}: give the path inside the job "
                "where the program writes it, and bring it elsewhere with DownloadJobResultsOperator."
            )
        if not path:
            raise JobRequestError(f"vars[{var!r}] is empty: give the new path of this output inside the job.")
    _refuse_overlaps(
        "vars (outputs)", [*output_vars.values(), *(p for v, p in old_outputs.items() if v not in output_vars)]
    )
    for what, entries in (("input files", input_vars), ("output files", output_vars)):
        if len(entries) > MAX_ENTRIES:
            raise JobRequestError(f"vars overrides {len(entries)} {what}: DataSphere allows {MAX_ENTRIES}.")
    kept_inputs = [path for var, path in old_inputs.items() if var not in input_vars]
    return ForkPlan(request, input_vars, output_vars, kept_inputs)


def overrides_message(plan: ForkPlan, inputs: Sequence[JobInput]) -> jobs_pb2.JobParameters:
    """The ``job_parameters_overrides`` of Clone; what isn't overridden keeps its default value, as the SDK sends it.

    :raises JobRequestError: an input over 5 GiB, or over 10 GiB together; inputs that overlap.
    """
    from yandex.cloud.datasphere.v2.jobs import jobs_pb2

    # Those that were copied were checked before; only now all sizes are known.
    check_sizes((f"vars[{job_input.var!r}] ({job_input.path})", job_input.size_bytes) for job_input in inputs)
    # Relative paths of the source's inputs are compared as if they were here, as the SDK does.
    paths = [*(job_input.path for job_input in inputs), *plan.kept_inputs]
    _refuse_overlaps("vars (inputs)", map(os.path.abspath, paths))

    request = plan.request
    environment = jobs_pb2.Environment(vars=request.env_vars)
    docker = request.docker
    if isinstance(docker, str):
        if docker:
            environment.docker_image_resource_id = docker
    elif docker is not None:
        environment.docker_image_spec.image_url = docker["image"]
        environment.docker_image_spec.username = docker.get("username") or ""
        if docker.get("password"):
            environment.docker_image_spec.password_ds_secret_name = docker["password"]["secret-id"]
    size_gib = parse_working_storage(request.working_storage)
    storage = jobs_pb2.ExtendedWorkingStorage
    return jobs_pb2.JobParameters(
        arguments=[jobs_pb2.Argument(name=name, value=value) for name, value in request.args.items()],
        input_files=[
            jobs_pb2.File(
                desc=jobs_pb2.FileDesc(path=job_input.path, var=job_input.var),
                sha256=job_input.sha256,
                size_bytes=job_input.size_bytes,
                compression_type=cast("jobs_pb2.FileCompressionType.ValueType", job_input.compression_type),
            )
            for job_input in inputs
        ],
        output_files=[jobs_pb2.FileDesc(path=path, var=var) for var, path in plan.output_vars.items()],
        env=environment,
        cloud_instance_types=[jobs_pb2.CloudInstanceType(name=name) for name in request.cloud_instance_types],
        extended_working_storage=storage(type=storage.SSD, size_gb=size_gib) if size_gib is not None else None,
    )


def expiry_warning(source: jobs_pb2.Job, now: datetime) -> str | None:
    """A line about a source job whose data expire within 3 days, after which it can't be forked any more.

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


def _refuse_unknown(
    field_name: str, given: Mapping[str, str], known: Sequence[str], what: str, source_job_id: str
) -> None:
    unknown = [name for name in given if name not in known]
    if unknown:
        raise JobRequestError(
            f"{field_name} names {', '.join(map(repr, unknown))}, which source job {source_job_id} doesn't have; its "
            f"{what}: {', '.join(known) or 'none'}."
        )


def overlapping(path: PurePosixPath, others: Iterable[PurePosixPath]) -> PurePosixPath | None:
    """The first of ``others`` that is the same file as ``path``, a folder above it, or a file in it."""
    return next((other for other in others if path == other or other in path.parents or path in other.parents), None)


def _refuse_overlaps(field_name: str, paths: Iterable[str]) -> None:
    seen: set[PurePosixPath] = set()
    for path in map(PurePosixPath, paths):
        clash = overlapping(path, seen)
        if clash is not None:
            raise JobRequestError(
                f"{field_name}: {str(path)!r} and {str(clash)!r} overlap; each file needs its own path."
            )
        seen.add(path)
