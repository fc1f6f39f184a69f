"""The state folder of an emulator: private, and used by one emulator at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_LOCK = "emulator.lock"
_SECRET = "control-secret"
_PRIVATE_FOLDER, _PRIVATE_FILE = 0o700, 0o600


class StateError(OSError):
    """The state folder can't be used; the message names it and says what to do."""


def prepare(folder: Path) -> None:
    """Create the folder, or make an existing one private: it has tokens, keys and output of programs.

    :raises StateError: it is not a folder, belongs to another user, or is readable by others and has other files.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=_PRIVATE_FOLDER)
        status = folder.stat()
        names = {entry.name for entry in os.scandir(folder)}
    except OSError as error:
        raise StateError(f"State folder {folder}: {error.strerror}.") from error
    user = os.geteuid()
    if user not in (0, status.st_uid):
        raise StateError(f"State folder {folder} belongs to user {status.st_uid}, not to you ({user}): use another.")
    if stat.S_IMODE(status.st_mode) & 0o077:
        if names and not names & {"state.db", _LOCK}:
            raise StateError(
                f"State folder {folder} has other files than an emulator's state, and others may read it (mode "
                f"{stat.S_IMODE(status.st_mode):04o}): use a new folder, or chmod 700 it."
            )
        folder.chmod(_PRIVATE_FOLDER)
    for path in (*folder.iterdir(), *folder.glob("tls/*"), folder / "storage" / "url-secret"):
        with contextlib.suppress(FileNotFoundError):
            mode = path.lstat().st_mode
            if stat.S_ISREG(mode) and mode & 0o077:
                path.chmod(_PRIVATE_FILE)


def write_private(path: Path, content: bytes) -> None:
    """Write a file atomically that only its owner may read."""
    temporary = path.with_name(path.name + ".new")
    temporary.unlink(missing_ok=True)
    # Never follow a file or link that another user created.
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _PRIVATE_FILE)
    with open(descriptor, "wb") as file:
        file.write(content)
    temporary.replace(path)


def control_secret(folder: Path) -> str:
    """Return the secret of the control API; it is kept in the state folder."""
    path = folder / _SECRET
    if not path.exists():
        write_private(path, secrets.token_urlsafe(24).encode())
    return path.read_text().strip()


class StateLock:
    """Lock of a state folder, for one emulator at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Lock the folder.

        :raises StateError: another emulator uses it.
        """
        descriptor = os.open(self._folder / _LOCK, os.O_RDWR | os.O_CREAT, _PRIVATE_FILE)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 20).decode("ascii", "replace").strip()
            os.close(descriptor)
            raise StateError(
                f"State folder {self._folder} is in use by another emulator (process {owner or 'unknown'}): stop "
                "it, or use another folder."
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        self._descriptor = descriptor

    def release(self) -> None:
        """Unlock the folder if it is locked."""
        if self._descriptor is not None:
            # Unlock explicitly: a forked process may have a copy of the descriptor.
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            os.close(self._descriptor)
            self._descriptor = None
