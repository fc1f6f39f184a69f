"""What a job's inputs may take, checked before the first byte of them is copied or fetched.

There are two limits: the service's, which no other try changes, and the room on this worker's disk, which one may.
"""

from __future__ import annotations

import errno
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from airflow_provider_datasphere.client.errors import DataSphereError, JobRequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from airflow_provider_datasphere.client.upload import JobInput

#: The service's limit for one input file, bytes.
MAX_FILE_BYTES = 5 * 1024**3
#: The service's limit for all input files of a job together, bytes.
MAX_TOTAL_BYTES = 10 * 1024**3


@dataclass(frozen=True)
class Found:
    """An input that has been looked at, but not read.

    :param what: names it in messages: ``Input DATA: s3://…``.
    :param size_bytes: of a directory, of its files together; 0 where nobody knows.
    :param copied_bytes: how much of it :attr:`read` writes to this worker's disk.
    :param read: makes it ready for upload.
    """

    what: str
    size_bytes: int
    copied_bytes: int
    read: Callable[[], JobInput]


def read_inputs(found: Sequence[Found], scratch: Path) -> list[JobInput]:
    """Make inputs ready for upload, if they are neither too large for the service nor for this worker.

    :param scratch: the folder that they are copied to.
    :raises JobRequestError: the service wouldn't take them, or one can't be read.
    :raises DataSphereError: the disk has no room for them; trying again, perhaps on another worker, may help.
    """
    check_sizes((one.what, one.size_bytes) for one in found)
    copied = [one for one in found if one.copied_bytes]
    if copied:
        check_room(" and ".join(one.what for one in copied), sum(one.copied_bytes for one in copied), scratch)
    inputs = []
    for one in found:
        with writing(one.what, scratch):
            inputs.append(one.read())
    return inputs


def check_sizes(sizes: Iterable[tuple[str, int]]) -> None:
    """
    :param sizes: of each input what to call it in a message, and its bytes.
    :raises JobRequestError: one has more than 5 GiB, or all together more than 10.
    """
    total = 0
    for what, size in sizes:
        if size > MAX_FILE_BYTES:
            raise JobRequestError(
                f"{what} has {size} bytes: DataSphere takes at most {MAX_FILE_BYTES} (5 GiB) for one input."
            )
        total += size
    if total > MAX_TOTAL_BYTES:
        raise JobRequestError(
            f"The inputs in vars have {total} bytes together: DataSphere takes at most {MAX_TOTAL_BYTES} (10 GiB)."
        )


def check_room(what: str, size: int, scratch: Path) -> None:
    """
    :param size: how many bytes are about to be written to ``scratch``.
    :raises DataSphereError: its disk has less room.
    """
    free = shutil.disk_usage(scratch).free
    if size > free:
        raise DataSphereError(
            f"{what}: {size} bytes have to be copied to this worker, but {scratch} has only {free} left. Make room "
            "there, or set TMPDIR to a folder on a larger disk."
        )


def is_full(error: BaseException) -> bool:
    """Whether this says that there is no room left, and so nothing about what was being read."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def writing(what: str, scratch: Path) -> Iterator[None]:
    """What the disk of ``scratch`` refuses in here is this worker's trouble, not the input's.

    :raises DataSphereError: instead of any OSError.
    """
    try:
        yield
    except OSError as error:
        raise DataSphereError(f"{what} can't be copied to {scratch}: {error.strerror or error}.") from error
