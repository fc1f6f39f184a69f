"""``datasphere://[conn_id@]<job_id>/<output path or var>``: a job's output file as a URI. Pure: no I/O."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from airflow_provider_datasphere.client.errors import JobRequestError

if TYPE_CHECKING:
    from yandex.cloud.datasphere.v2.jobs import jobs_pb2

SCHEME = "datasphere"

# Characters are not decoded: neither fsspec nor Airflow decode %20.
# Airflow 2 writes a path object as datasphere://conn@/job/… until it has loaded this file system.
_URI = re.compile(rf"{SCHEME}://(?:(?P<conn_id>[^@/]*)@)?/*(?P<job_id>[^@/]+)(?:/(?P<path>.*))?", re.DOTALL)


_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://")
_JOB_ID = re.compile(r"[0-9A-Za-z_-]+")
_FILE_URI = re.compile(r"file:(?://(?P<host>[^/]*))?(?P<path>.*)", re.DOTALL | re.IGNORECASE)
_ONE_SLASH = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+:/(?!/)")


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
    """Parse a ``datasphere://`` URI.

    :raises JobRequestError: it isn't one.
    """
    match = _URI.fullmatch(uri)
    if not match:
        raise JobRequestError(
            f"{uri!r} doesn't name a job's file: write {SCHEME}://[<connection id>@]<job id>/<output path or var>."
        )
    return JobFileUri(match["conn_id"] or None, match["job_id"], match["path"] or "")


def check_job_file_uri(field_name: str, uri: str) -> JobFileUri:
    """Parse a ``datasphere://`` URI that must name a job and one of its files.

    :raises JobRequestError: it doesn't, or its job is the word "None", which an empty XCom renders to.
    """
    parsed = parse_job_file_uri(uri)
    if parsed.job_id == "None":
        raise JobRequestError(
            f"{field_name} is {uri!r}: the job id is the word None, so the task that should return it hasn't run or "
            "returned nothing. An f-string adds no dependency: add `first >> second`."
        )
    if not _JOB_ID.fullmatch(parsed.job_id):
        raise JobRequestError(f"{field_name} is {uri!r}: {parsed.job_id!r} can't be a job's id.")
    if not plain_path(parsed.path):
        raise JobRequestError(
            f"{field_name} is {uri!r}, which names a job but none of its files: write "
            f"{SCHEME}://{parsed.job_id}/<output path or var>."
        )
    return parsed


def is_uri(place: str) -> bool:
    """Return whether this is a URI (``s3://…``, ``file://…``) and not a path."""
    return _SCHEME.match(place) is not None


def local_folder(field_name: str, place: str) -> str | None:
    """Return the path of a local folder that is given as a path or a ``file:`` URI; ``None`` for the URI of a store.

    ``~`` is the home of the worker's user.

    :raises JobRequestError: a ``file:`` URI of another machine, a URI with one slash, ``~`` of an unknown user.
    """
    uri = _FILE_URI.fullmatch(place)
    if uri:
        if (uri["host"] or "") not in ("", "localhost") or not uri["path"].startswith("/"):
            raise JobRequestError(
                f"{field_name} is {place!r}: a folder of this worker is file:///folder, or just its path; for that of "
                "another machine give the URI of an object store."
            )
        return uri["path"]
    if is_uri(place):
        return None
    if _ONE_SLASH.match(place):
        fixed = place.replace(":/", "://", 1)
        raise JobRequestError(f"{field_name} is {place!r}: a URI has two slashes, {fixed!r}; a folder is './{place}'.")
    path = os.path.expanduser(place)
    if path.startswith("~"):
        raise JobRequestError(f"{field_name} is {place!r}: this worker has no such user; a folder is './{place}'.")
    return path


def plain_path(path: str) -> str:
    """Return the canonical path of a job's file: ``./a``, ``a/``, ``/a``, ``b/../a`` are all ``a``.

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


def match_file(job: jobs_pb2.Job, path_or_var: str) -> jobs_pb2.File | None:
    """Return the output of ``job`` with this path, exactly or as :func:`plain_path` has it, or else with this var."""
    plain = plain_path(path_or_var)
    files: list[jobs_pb2.File] = list(job.output_files) if path_or_var else []
    matches = (
        lambda file: file.desc.path == path_or_var,
        lambda file: plain_path(file.desc.path) == plain,
        lambda file: file.desc.var == path_or_var,
    )
    return next((file for match in matches for file in files if match(file)), None)


def find_file(job: jobs_pb2.Job, path_or_var: str) -> jobs_pb2.File:
    """Return the output that :func:`match_file` finds.

    :raises JobRequestError: there is none; the message lists those that exist.
    """
    file = match_file(job, path_or_var)
    if file is not None:
        return file
    names = [f"{file.desc.path} ({file.desc.var})" if file.desc.var else file.desc.path for file in job.output_files]
    raise JobRequestError(
        f"Job {job.id} has no output {path_or_var!r}. It has: {', '.join(names) if names else 'none (yet)'}."
    )
