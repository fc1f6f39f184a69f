"""Error statuses of the emulated service."""

from __future__ import annotations

import errno

from datasphere_emulator.settings import CODES


class StatusError(Exception):
    """The gRPC status that a call ends with.

    :param code: name of a gRPC status code.
    :param message: what is wrong; names the field and its value.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.number = CODES[code]
        self.message = message


def internal_error(error: Exception) -> StatusError:
    """Return INTERNAL for a failure of the emulator itself, such as a full disk."""
    full = getattr(error, "errno", None) == errno.ENOSPC or "is full" in str(error)
    what = "The emulator's disk is full" if full else "The emulator failed"
    return StatusError("INTERNAL", f"{what}: {error}")


def invalid(message: str) -> StatusError:
    """Return INVALID_ARGUMENT."""
    return StatusError("INVALID_ARGUMENT", message)


def not_found(message: str) -> StatusError:
    """Return NOT_FOUND."""
    return StatusError("NOT_FOUND", message)


def precondition(message: str) -> StatusError:
    """Return FAILED_PRECONDITION."""
    return StatusError("FAILED_PRECONDITION", message)
