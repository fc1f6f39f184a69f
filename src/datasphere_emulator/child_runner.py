"""Runs one program for the emulator and outlives it.

``python child_runner.py <folder>`` reads ``spec.json`` in that folder, detaches itself, starts the program in its own
session with stdout and stderr going to files, and writes ``started.json`` and, at the end, ``exit.json``. The emulator
may be killed and restarted meanwhile; a file lock that the runner inherits shows that it is alive.

Stands alone (standard library only, no import of the package), so that it starts in a few milliseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_POLL_SECONDS = 0.02


def write_json(path: Path, values: object) -> None:
    """Write a file atomically."""
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(values))
    temporary.replace(path)


def _reap_orphans() -> None:
    # Orphans of the program become our children, so that their end is seen even where pid 1 reaps nobody.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _owner_is_gone(owner: int | None) -> bool:
    if owner is None:
        return False
    try:
        os.kill(owner, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _group_is_alive(group: int) -> bool:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def run(folder: Path) -> None:
    """Run the program described in the folder until its end."""
    spec = json.loads((folder / "spec.json").read_text())
    _reap_orphans()
    with (folder / "stdout").open("ab") as stdout, (folder / "stderr").open("ab") as stderr:
        try:
            process = subprocess.Popen(
                spec["command"],
                cwd=spec["cwd"],
                env=spec["env"],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        except OSError as error:
            stderr.write(f"{error}\n".encode())
            write_json(folder / "exit.json", {"return_code": 127, "finished_at": time.time()})
            return
    write_json(folder / "started.json", {"group": process.pid, "started_at": time.time()})
    while True:
        pid, status, usage = os.wait4(-1, os.WNOHANG)
        if pid == process.pid:
            break
        if pid == 0:
            if _owner_is_gone(spec["owner"]):
                _kill_group(process.pid)
            time.sleep(_POLL_SECONDS)
    code = os.waitstatus_to_exitcode(status)
    # A program that shuts down gracefully may end after the shell that started it.
    while (folder / "graceful").exists() and _group_is_alive(process.pid):
        time.sleep(_POLL_SECONDS)
    _kill_group(process.pid)
    write_json(
        folder / "exit.json",
        {
            "return_code": 128 - code if code < 0 else code,
            "finished_at": time.time(),
            "user_seconds": usage.ru_utime,
            "system_seconds": usage.ru_stime,
            "max_rss_kilobytes": usage.ru_maxrss,
        },
    )


def main() -> None:
    """Detach and run."""
    if os.fork():
        os._exit(0)
    os.setsid()
    run(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
