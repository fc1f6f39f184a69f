"""Compares a fork with a job that was made for an earlier one: which arguments and inputs differ. Reads no service."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from airflow_provider_datasphere.client.errors import DataSphereError
from airflow_provider_datasphere.client.submission.fork_request import kept_paths
from airflow_provider_datasphere.client.submission.job_key import without_tag
from airflow_provider_datasphere.client.submission.job_parameters import image_of
from airflow_provider_datasphere.client.transfer.inputs import InputSource
from airflow_provider_datasphere.client.uri import SCHEME, is_uri
from airflow_provider_datasphere.client.validation import parse_working_storage

if TYPE_CHECKING:
    from yandex.cloud.datasphere.v2.jobs import jobs_pb2

    from airflow_provider_datasphere.client.submission.fork_request import ForkRequest
    from airflow_provider_datasphere.client.submission.job_request import InputStager

log = logging.getLogger(__name__)


def changed_arguments(request: ForkRequest, job: jobs_pb2.Job, source: jobs_pb2.Job | None = None) -> list[str]:
    """Return the names of the arguments that, by what the job shows, differ from the request's.

    :param source: the source job, where it is known: it tells which arguments were removed.
    """
    made, base = job.job_parameters, source.job_parameters if source is not None else None
    changed = ["source_job_id"] if job.parent_job_id and job.parent_job_id != request.source_job_id else []
    changed += _changed_entries(
        "args",
        request.args,
        {argument.name: argument.value for argument in made.arguments},
        None if base is None else {argument.name: argument.value for argument in base.arguments},
    )
    inputs = {file.desc.var for file in made.input_files}
    outputs = {desc.var: desc.path for desc in made.output_files if desc.var}
    changed += _changed_entries(
        "vars",
        {var: path for var, path in request.vars.items() if var not in inputs},
        outputs,
        None if base is None else {desc.var: desc.path for desc in base.output_files if desc.var},
    )
    if base is not None:
        own = {file.desc.var: file.sha256 for file in made.input_files if file.desc.var}
        kept = {file.desc.var: file.sha256 for file in base.input_files if file.desc.var}
        changed += [f"vars[{v!r}]" for v, sha256 in own.items() if v not in request.vars and kept.get(v) != sha256]
    variables = dict(made.env.vars)
    # The service may put the request's variables in the place of the source's, or merge the two.
    changed += [f"env_vars[{name!r}]" for name, value in request.env_vars.items() if variables.get(name) != value]
    if base is not None:
        added = {name: value for name, value in variables.items() if base.env.vars.get(name) != value}
        changed += [f"env_vars[{name!r}]" for name in added if name not in request.env_vars]
    changed += _changed_settings(request, job, source)
    return list(dict.fromkeys(changed))


def changed_inputs(
    request: ForkRequest,
    job: jobs_pb2.Job,
    parameters: jobs_pb2.JobParameters,
    stage_inputs: InputStager,
    *,
    compare_remote: bool,
) -> list[str]:
    """Return the names of the inputs whose content differs from the job's; an unreadable one isn't compared.

    :param parameters: of the source job.
    :param compare_remote: compare objects in stores too, which downloads them.
    """
    made = {file.desc.var: (file.sha256.lower(), file.size_bytes) for file in job.job_parameters.input_files}
    changed: list[str] = []
    for var, place in request.vars.items():
        if var not in made or (_is_remote(place) and not compare_remote):
            continue
        with tempfile.TemporaryDirectory(prefix="datasphere-inputs-") as scratch:
            try:
                staged = stage_inputs([InputSource(var, place)], kept_paths(parameters, [var]), Path(scratch))
            except DataSphereError as error:
                log.debug("Input %s can't be compared with that of job %s: %s", var, job.id, error)
                continue
        changed += [f"vars[{one.var!r}]" for one in staged if made[one.var] != (one.sha256.lower(), one.size_bytes)]
    return changed


def _is_remote(place: str) -> bool:
    """Return whether this is a URI whose content must be downloaded to compare it; a job's file has a known sha256."""
    return is_uri(place) and not place.startswith(("file://", f"{SCHEME}://"))


def _changed_entries(
    field: str, given: Mapping[str, str], made: Mapping[str, str], base: Mapping[str, str] | None
) -> list[str]:
    changed = [name for name, value in given.items() if made.get(name) != value]
    if base is not None:
        changed += [name for name, value in made.items() if name not in given and base.get(name) != value]
    return [f"{field}[{name!r}]" for name in changed]


def _changed_settings(request: ForkRequest, job: jobs_pb2.Job, source: jobs_pb2.Job | None) -> list[str]:
    made, base = job.job_parameters, source.job_parameters if source is not None else None
    changed = []
    types = [instance.name for instance in made.cloud_instance_types]
    wanted = list(request.cloud_instance_types) or (
        [instance.name for instance in base.cloud_instance_types] if base is not None else types
    )
    if wanted != types:
        changed.append("cloud_instance_types")
    inherited = ("", source.name) if source is not None else ("", job.name)
    if job.name not in (inherited if request.name is None else (request.name,)):
        changed.append("name")
    if request.desc is not None and not _same_beginning(without_tag(request.desc), without_tag(job.desc)):
        changed.append("desc")
    storage = made.extended_working_storage.size_gb
    wanted_storage = parse_working_storage(request.working_storage)
    if wanted_storage is None:
        wanted_storage = storage if base is None else base.extended_working_storage.size_gb
    if wanted_storage != storage:
        changed.append("working_storage")
    image = image_of(made.env)
    if request.docker:
        docker = request.docker
        if image != (docker if isinstance(docker, str) else docker["image"]):
            changed.append("docker")
    elif base is not None and image != image_of(base.env):
        changed.append("docker")
    return changed


def _same_beginning(wanted: str, made: str) -> bool:
    """Compare descriptions, of which one may have been shortened to make room for the tag."""
    return wanted == made or (made.endswith("…") and wanted.startswith(made[:-1]))
