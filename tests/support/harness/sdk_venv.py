"""A cached environment with the official ``datasphere`` package, and its CLI as a person would type it."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.venvs import CACHE, find_python, locked, uv

REQUIREMENTS = ("datasphere==0.10.0", "yandexcloud")
#: No command takes longer, seconds.
PATIENCE = 180.0
_COLOUR = re.compile(r"\x1b\[\d+m")


@dataclass(frozen=True)
class SdkVenv:
    """An environment with nothing but the SDK: it resolves only where no Airflow is (its ``envzy`` pins old packages).

    :param requirements: what is installed.
    """

    requirements: tuple[str, ...] = REQUIREMENTS

    @property
    def path(self) -> Path:
        return CACHE / "datasphere-cli"

    @property
    def python(self) -> Path:
        return self.path / "bin" / "python"

    @property
    def command(self) -> Path:
        """The unmodified ``datasphere`` command."""
        return self.path / "bin" / "datasphere"

    def create(self) -> SdkVenv:
        """Make the environment if it is missing; seconds with a warm cache.

        :raises RuntimeError: no suitable interpreter, or the packages can't be had.
        """
        wanted = hashlib.sha256(repr(self).encode()).hexdigest()
        mark = self.path / ".harness"
        with locked(CACHE / f".{self.path.name}.lock"):
            if mark.exists() and mark.read_text() == wanted:
                return self
            python = find_python("3.11", "3.10", "3.12", "3.13")
            if python is None:
                raise RuntimeError("The datasphere package needs Python 3.10 to 3.13")
            uv("venv", "--quiet", "--clear", "--no-python-downloads", "--python", python, self.path)
            # Outside the project folder, so that [tool.uv] of pyproject.toml does not loosen the resolution.
            uv("pip", "install", "--python", self.python, *self.requirements, cwd=Path("/"))
            mark.write_text(wanted)
        return self


class Command:
    """A CLI command that runs.

    :param files: folder for what it prints.
    """

    def __init__(self, words: Sequence[str], environment: Mapping[str, str], cwd: Path, files: Path) -> None:
        self._words = words
        self._files = files
        self._log_dir = files / "logs"
        files.mkdir(parents=True)
        with (files / "stdout").open("wb") as stdout, (files / "stderr").open("wb") as stderr:
            self.process = subprocess.Popen(
                words, cwd=cwd, env=dict(environment), stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr
            )

    def _text(self, name: str) -> str:
        return _COLOUR.sub("", (self._files / name).read_text(errors="replace"))

    @property
    def stdout(self) -> str:
        """What it has printed so far, without colours."""
        return self._text("stdout")

    @property
    def stderr(self) -> str:
        """The same of stderr."""
        return self._text("stderr")

    def log(self, name: str) -> str:
        """A file of its folder of logs."""
        return (self._log_dir / name).read_text()

    def __str__(self) -> str:
        words = " ".join(self._words)
        return f"$ {words}\n{self.stdout}{self.stderr}\nended with {self.process.poll()}"

    def until(self, text: str) -> None:
        """Wait until it has printed this.

        :raises AssertionError: it ended without, or takes too long.
        """
        deadline = time.monotonic() + PATIENCE
        while text not in self.stdout:
            ended = self.process.poll() is not None
            assert text in self.stdout or not ended, f"{text!r} was not printed:\n{self}"
            assert time.monotonic() < deadline, f"{text!r} is not printed:\n{self}"
            time.sleep(0.05)

    def end(self, code: int = 0) -> Command:
        """Wait for the end and return itself.

        :raises AssertionError: another exit code, or it takes too long.
        """
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"No end within {PATIENCE} s:\n{self}") from None
        assert self.process.returncode == code, f"Exit code {code} expected:\n{self}"
        return self


class Cli:
    """The CLI against one emulator.

    :param words: how it is started.
    :param folder: for homes, temporary files and outputs of commands.
    :param environment: variables on top of the few that any program gets.
    """

    def __init__(self, words: Sequence[str | Path], folder: Path, environment: Mapping[str, str]) -> None:
        self._words = [str(word) for word in words]
        self._folder = folder
        self._number = 0
        (folder / "home").mkdir(parents=True)
        self.environment = {
            "PATH": os.defpath,
            "HOME": str(folder / "home"),
            "TMPDIR": str(folder / "home"),
            "LANG": "C.UTF-8",
            **environment,
        }

    def start(self, *arguments: str | Path, cwd: Path, environment: Mapping[str, str | None] | None = None) -> Command:
        """Start a command. :param environment: variables on top; None takes one away."""
        self._number += 1
        files = self._folder / str(self._number)
        variables = {**self.environment, **(environment or {})}
        given = {name: value for name, value in variables.items() if value is not None}
        words = [*self._words, "--log-dir", str(files / "logs"), *map(str, arguments)]
        return Command(words, given, cwd, files)
