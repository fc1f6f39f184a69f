"""Declared outputs after the end of a program: checks, zips, and the errors of those that can't be stored.

Blocks; called in a thread.
"""

from __future__ import annotations

import errno
import os
import stat
import zipfile
from pathlib import Path, PurePosixPath

from yandex.cloud.datasphere.v2.jobs import jobs_pb2

#: The service's description of an output that it can't store, such as a pattern.
PROCESSING_ERROR = "Error while processing file"

_KINDS = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class UnusableOutput(Exception):
    """An existing output can't be stored; the message has the path and the reason."""


def is_pattern(path: str) -> bool:
    """Return whether a declared output is a glob, which the service accepts and fails to upload."""
    return any(character in path for character in "*?[")


def upload_error(desc: jobs_pb2.FileDesc, kind: str, description: str) -> jobs_pb2.FileUploadError:
    """Return the error of an output. :param kind: ``NOT_FOUND`` or ``UPLOAD_FAILED``."""
    number = jobs_pb2.FileUploadError.ErrorType.Value(kind)
    return jobs_pb2.FileUploadError(output_file_desc=desc, description=description, type=number)


def missing_output(desc: jobs_pb2.FileDesc) -> jobs_pb2.FileUploadError:
    """Return the error of a declared output that doesn't exist."""
    if is_pattern(desc.path):
        return upload_error(desc, "UPLOAD_FAILED", PROCESSING_ERROR)
    return upload_error(desc, "NOT_FOUND", f"File {desc.path} is not found.")


def failed_uploads_details(errors: list[jobs_pb2.FileUploadError]) -> str:
    """Return the status details of a job with failed uploads, "" without failures."""
    kind = jobs_pb2.FileUploadError.ErrorType.UPLOAD_FAILED
    failed = [error for error in errors if error.type == kind and error.HasField("output_file_desc")]
    listed = ", ".join(f"{error.output_file_desc.path} ({error.description})" for error in failed)
    return f"Some output files were not uploaded due to errors: {listed}" if failed else ""


def is_directory(path: Path, name: str) -> bool:
    """Return whether a path is a directory; False for a regular file.

    :param name: the path in messages.
    :raises UnusableOutput: it is neither, and reading it would fail or block.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        reason = "a broken link" if error.errno in (errno.ENOENT, errno.ELOOP) else None
        raise UnusableOutput(f"{name} is {reason}" if reason else f"{name}: {error.strerror}") from error
    for test, kind in _KINDS:
        if test(mode):
            raise UnusableOutput(f"{name} is {kind}")
    return stat.S_ISDIR(mode)


def pack_directory(directory: Path, name: str, archive: Path) -> None:
    """Zip a directory as the service does: without compression, names begin with the directory's own.

    :raises UnusableOutput: an entry can't be read.
    """
    with zipfile.ZipFile(archive, "w", strict_timestamps=False) as target:
        target.writestr(f"{name}/", b"")
        for path in sorted(directory.rglob("*")):
            inside = PurePosixPath(name) / path.relative_to(directory).as_posix()
            shown = os.fsencode(inside).decode("utf-8", "backslashreplace")
            is_directory(path, shown)
            try:
                target.write(path, inside)
            except (OSError, ValueError) as error:
                raise UnusableOutput(f"{shown}: {getattr(error, 'strerror', None) or error}") from error
