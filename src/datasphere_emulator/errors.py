"""How the emulated service says no."""

from __future__ import annotations

from datasphere_emulator.settings import CODES


class Refused(Exception):
    """A call ends with this gRPC status.

    :param code: name of a gRPC status code.
    :param message: what is wrong, naming field and value.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.number = CODES[code]
        self.message = message


def invalid(message: str) -> Refused:
    """INVALID_ARGUMENT."""
    return Refused("INVALID_ARGUMENT", message)


def not_found(message: str) -> Refused:
    """NOT_FOUND."""
    return Refused("NOT_FOUND", message)


def precondition(message: str) -> Refused:
    """FAILED_PRECONDITION."""
    return Refused("FAILED_PRECONDITION", message)
