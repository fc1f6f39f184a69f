"""``datasphere://[conn_id@]<job_id>/<output path or var>``: a job's output file as a URI. Pure: no I/O."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from airflow_provider_datasphere.client.errors import JobRequestError

if TYPE_CHECKING:
    from yandex.cloud.datasphere.v2.jobs import jobs_pb2

SCHEME = "datasphere"

# Characters are taken as they are: neither fsspec nor Airflow decode %20 and the like.
# Airflow 2 writes a path object as datasphere://conn@/job/… where it hasn't met this file system before.
_URI = re.compile(rf"{SCHEME}://(?:(?P<conn_id>[^@/]*)@)?/*(?P<job_id>[^@/]+)(?:/(?P<path>.*))?", re.DOTALL)


@dataclass(frozen=True)
class JobFileUri:
    """The parts of a ``datasphere://`` URI.

    :param conn_id: Airflow connection; None where the URI leaves it to its user.
    :param job_id: the job.
    :param path: path or var of one of the job's outputs; empty for the job as a whole.
    """

    conn_id: str | None
    job_id: str
    path: str

    def __str__(self) -> str:
        connection = f"{self.conn_id}@" if self.conn_id else ""
        return f"{SCHEME}://{connection}{self.job_id}/{self.path}"


def parse_job_file_uri(uri: str) -> JobFileUri:
    """Take a ``datasphere://`` URI apart.

    :raises JobRequestError: it isn't one.
    """
    match = _URI.fullmatch(uri)
    if not match:
        raise JobRequestError(
            f"{uri!r} doesn't name a job's file: write {SCHEME}://[<connection id>@]<job id>/<output path or var>."
        )
    return JobFileUri(match["conn_id"] or None, match["job_id"], match["path"] or "")


def plain_path(path: str) -> str:
    """The one name of a job's file where its path has many: ``./a``, ``a/``, ``/a``, ``b/../a`` are all ``a``.

    Absolute paths lose their root and what climbs above the top stays there, as tar and unzip do it.

    :return: empty for the working folder itself.
    """
    parts: list[str] = []
    for part in path.split("/"):
        if part == "..":
            del parts[-1:]
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)


def find_file(job: jobs_pb2.Job, path_or_var: str) -> jobs_pb2.File:
    """The output of ``job`` with this path, exactly or as :func:`plain_path` has it, or else with this var.

    :raises JobRequestError: there is none; the message lists those that exist.
    """
    files: list[jobs_pb2.File] = list(job.output_files) if path_or_var else []
    for file in files:
        if file.desc.path == path_or_var:
            return file
    for file in files:
        if plain_path(file.desc.path) == plain_path(path_or_var):
            return file
    for file in files:
        if file.desc.var == path_or_var:
            return file
    names = [f"{file.desc.path} ({file.desc.var})" if file.desc.var else file.desc.path for file in job.output_files]
    raise JobRequestError(
        f"Job {job.id} has no output {path_or_var!r}. It has: {', '.join(names) if names else 'none (yet)'}."
    )
