"""A server for the tests of one process: own folder, own port, an unprivileged user; gone with the process."""

from __future__ import annotations

import atexit
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from harness.ports import free_port

#: Seconds, for a busy machine.
_PATIENCE = 60.0


def unprivileged_user(*names: str) -> str | None:
    """The first of these users, or "nobody", that this machine has."""
    for name in (*names, "nobody"):
        try:
            return pwd.getpwnam(name).pw_name
        except KeyError:
            continue
    return None


#: Becomes a user, then the program. Not Popen(user=…): that forks this process, in which gRPC's threads may be at work.
_BECOME = "import os, sys; os.setgroups([]); os.setgid(int(sys.argv[1])); os.setuid(int(sys.argv[2])); "
_BECOME += "os.execv(sys.argv[3], sys.argv[3:])"


class ServerProcess:
    """A server that can be killed, and started again with its data."""

    #: What it is, for messages and folders.
    name: ClassVar[str]
    #: Whom it runs as where we are root, the first that there is; None: as ourselves.
    users: ClassVar[Sequence[str] | None] = None

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=f"{self.name.lower()}-"))
        self.port = free_port()
        self._become: list[str] = []
        if os.getuid() == 0 and self.users is not None:
            user = unprivileged_user(*self.users)
            assert user is not None
            shutil.chown(self.path, user)
            account = pwd.getpwnam(user)
            self._become = [sys.executable, "-ISc", _BECOME, str(account.pw_gid), str(account.pw_uid)]
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.stop)

    def command(self) -> Sequence[str | Path]:
        """What starts it."""
        raise NotImplementedError

    def answers(self) -> bool:
        """Whether it serves requests."""
        raise NotImplementedError

    def as_user(self, command: Sequence[str | Path]) -> list[str | Path]:
        """A command that begins with the path of a program, as the server's user."""
        return [*self._become, *command]

    @property
    def output(self) -> Path:
        return self.path / "server.log"

    def start(self) -> None:
        """Start it, and wait until it answers.

        :raises RuntimeError: it doesn't.
        """
        assert self._process is None, f"{self.name} runs already"
        with self.output.open("ab") as output:
            self._process = subprocess.Popen(
                self.as_user(self.command()),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=self.path,
            )
        deadline = time.monotonic() + _PATIENCE
        while not self.answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                ended, printed = self._process.poll(), self.output.read_text(errors="replace")[-3000:]
                raise RuntimeError(f"{self.name} doesn't answer; exit code {ended}:\n{printed}")
            time.sleep(0.1)

    def kill(self, signal_number: int = signal.SIGKILL) -> None:
        """Send it a signal that ends it, and wait for its end; its data stay."""
        assert self._process is not None, f"{self.name} doesn't run"
        self._process.send_signal(signal_number)
        self._process.wait(_PATIENCE)
        self._process = None

    def stop(self) -> None:
        """End it, and remove its data."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        shutil.rmtree(self.path, ignore_errors=True)
