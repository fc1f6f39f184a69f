"""Python environments: interpreters on this machine, uv, and one cached environment per Airflow version."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
CACHE = PROJECT / ".venvs"
CONSTRAINTS = {
    "3.0": ["fastapi<0.117", "pydantic<2.12", "pyjwt<2.11"],
    "3.2": ["pydantic<2.13"],
}
"""Where an Airflow's API server doesn't run with the newest packages that its own metadata allow; as its published
constraints have them."""
NEWEST = installed_version("apache-airflow")
"""The Airflow of the development environment: the newest 3.x when it was set up."""


def uv(*arguments: str | Path, cwd: Path | None = None, environment: dict[str, str] | None = None) -> str:
    """Run uv and return what it printed on stdout.

    :param environment: variables on top of this process's
    :raises RuntimeError: uv failed; the message ends with what it printed
    """
    executable = Path(sys.prefix, "bin", "uv")
    command = [str(executable if executable.exists() else shutil.which("uv") or "uv"), *map(str, arguments)]
    # A virtual environment that happens to be active must not be the one that gets changed.
    clean = {name: value for name, value in os.environ.items() if name not in {"VIRTUAL_ENV", "CONDA_PREFIX"}}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=clean | (environment or {}))
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


@functools.cache
def find_python(*versions: str) -> Path | None:
    """Find an interpreter of one of these versions ("3.11"), in the order given; None if this machine has none."""
    folders = [*os.environ.get("PATH", "").split(os.pathsep), *map(str, Path.home().glob(".pyenv/versions/*/bin"))]
    for version in versions:
        if version == "{}.{}".format(*sys.version_info):
            return Path(sys.executable).resolve()
        for folder in folders:
            candidate = Path(folder, f"python{version}")
            if os.access(candidate, os.X_OK) and _runs(candidate):
                return candidate.resolve()
    return None


def _runs(python: Path) -> bool:
    # A pyenv shim exists for interpreters that are not selected, and fails when called.
    return subprocess.run([str(python), "-c", "import venv"], capture_output=True).returncode == 0


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes; several test runs may share one checkout."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class AirflowVenv:
    """An environment with one Airflow version, this project (editable, with the emulator) and further packages.

    :param version: an Airflow version, "2.11.2"
    :param packages: requirements on top
    :param python: interpreter versions to choose from, best first; default: what that Airflow supports
    """

    version: str
    packages: Sequence[str] = ()
    python: Sequence[str] = ()

    @property
    def is_development(self) -> bool:
        """Whether the environment that runs this code serves; it holds the newest Airflow already."""
        return self.version == NEWEST and not self.packages and not self.python

    @property
    def path(self) -> Path:
        if self.is_development:
            return Path(sys.prefix)
        extra = "-".join(re.sub(r"[^a-z0-9.]+", "-", package.lower()) for package in self.packages)
        python = f"py{self.python[0]}" if self.python else ""
        return CACHE / "-".join(filter(None, ["airflow", self.version, python, extra]))

    @property
    def bin(self) -> Path:
        return self.path / "bin"

    @property
    def supported_pythons(self) -> Sequence[str]:
        """Interpreter versions this Airflow runs on: 2.11 and 3.0 end at 3.12."""
        known = ["3.11", "3.12", "3.10"]
        return self.python or (known if self.version.startswith(("2.", "3.0.")) else [*known, "3.13"])

    def create(self) -> AirflowVenv:
        """Make the environment if it is missing or older than pyproject.toml; seconds with a warm cache.

        :raises RuntimeError: no suitable interpreter, or the packages do not resolve
        """
        if self.is_development:
            return self
        # What follows [tool.…] configures linters and tests.
        metadata = (PROJECT / "pyproject.toml").read_text().partition("[tool.")[0]
        wanted = hashlib.sha256(f"{metadata}{self!r}{CONSTRAINTS}".encode()).hexdigest()
        mark = self.path / ".harness"
        with locked(CACHE / f".{self.path.name}.lock"):
            if mark.exists() and mark.read_text() == wanted:
                return self
            python = find_python(*self.supported_pythons)
            if python is None:
                raise RuntimeError(f"Airflow {self.version} needs Python {' or '.join(self.supported_pythons)}")
            uv("venv", "--quiet", "--clear", "--no-python-downloads", "--python", python, self.path)
            airflow = [f"apache-airflow=={self.version}", *CONSTRAINTS.get(self.version.rpartition(".")[0], ())]
            wanted_packages = [*airflow, "--editable", f"{PROJECT}[emulator]", *self.packages]
            # Outside the project folder, so that [tool.uv] of pyproject.toml does not loosen the resolution.
            uv("pip", "install", "--python", self.bin / "python", *wanted_packages, cwd=Path("/"))
            mark.write_text(wanted)
        return self
