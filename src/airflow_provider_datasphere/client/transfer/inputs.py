"""Size limits of a job's inputs, checked before the first byte is copied or fetched.

There are two: the service's limits, a permanent error, and this worker's free disk space, a retryable one.
"""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from airflow_provider_datasphere.client.errors import DataSphereError, JobRequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path
    from threading import Event

#: The service's limit for one input file, bytes.
MAX_FILE_BYTES = 5 * 1024**3
#: The service's limit for all input files of a job together, bytes.
MAX_TOTAL_BYTES = 10 * 1024**3


@dataclass(frozen=True)
class InputSource:
    """Where an input comes from.

    :param var: its variable; empty where it has none.
    :param place: local path or URI; a relative path is also the input's path in the job.
    :param base_dir: what a relative path is relative to; ``None``: the current folder.
    """

    var: str
    place: str
    base_dir: Path | None = None


@dataclass(frozen=True)
class JobInput:
    """One input of a job.

    :param var: the variable that the program's command line names it by; empty where it has none.
    :param path: its path in the job: as the user gave it, or the base name of a staged file.
    :param sha256: of the bytes to upload, hexadecimal.
    :param size_bytes: bytes to upload.
    :param compression_type: a value of ``jobs_pb2.FileCompressionType``: NONE for a file, ZIP for a directory.
    :param content: context manager that returns a local file with these bytes. It may be downloaded only then: it isn't
        used where the service has the content already. The event that is passed in stops the download.
    """

    var: str
    path: str
    sha256: str
    size_bytes: int
    compression_type: int
    content: Callable[[Event], AbstractContextManager[Path]]


@dataclass(frozen=True)
class InputCandidate:
    """An input that exists, but hasn't been read yet.

    :param what: its name in messages: ``Input DATA: s3://…``.
    :param size_bytes: size, of a directory the total of its files; 0: unknown.
    :param copied_bytes: how much :attr:`read` writes to this worker's disk.
    :param read: prepares it for upload.
    """

    what: str
    size_bytes: int
    copied_bytes: int
    read: Callable[[], JobInput]


def prepare_inputs(found: Sequence[InputCandidate], scratch: Path) -> list[JobInput]:
    """Prepare inputs for upload, after a check of their sizes.

    :param scratch: folder that they are copied to.
    :raises JobRequestError: they exceed the service's limits, or one can't be read.
    :raises DataSphereError: not enough disk space; a retry, perhaps on another worker, may help.
    """
    check_sizes((one.what, one.size_bytes) for one in found)
    copied = [one for one in found if one.copied_bytes]
    if copied:
        require_disk_space(" and ".join(one.what for one in copied), sum(one.copied_bytes for one in copied), scratch)
    inputs = []
    for one in found:
        with writing(one.what, scratch):
            inputs.append(one.read())
    return inputs


def check_sizes(sizes: Iterable[tuple[str, int]]) -> None:
    """
    :param sizes: name for messages, and bytes, of each input.
    :raises JobRequestError: one has more than 5 GiB, or all together more than 10.
    """
    total = 0
    for what, size in sizes:
        if size > MAX_FILE_BYTES:
            raise JobRequestError(
                f"{what} has {size} bytes: DataSphere accepts at most {MAX_FILE_BYTES} (5 GiB) per input."
            )
        total += size
    if total > MAX_TOTAL_BYTES:
        raise JobRequestError(
            f"The inputs have {total} bytes together: DataSphere accepts at most {MAX_TOTAL_BYTES} (10 GiB)."
        )


def require_disk_space(what: str, size: int, scratch: Path) -> None:
    """
    :param size: bytes that are about to be written to ``scratch``.
    :raises DataSphereError: its disk has less free space.
    """
    free = shutil.disk_usage(scratch).free
    if size > free:
        raise DataSphereError(
            f"{what}: {size} bytes have to be copied to this worker, but {scratch} has only {free} free. Free some "
            "space there, or set TMPDIR to a folder on a larger disk."
        )


@contextmanager
def writing(what: str, scratch: Path) -> Iterator[None]:
    """Context of copying an input to ``scratch``: its errors are this worker's, not the input's.

    :raises DataSphereError: instead of any OSError.
    """
    try:
        yield
    except OSError as error:
        raise DataSphereError(f"{what} can't be copied to {scratch}: {error.strerror or error}.") from error
