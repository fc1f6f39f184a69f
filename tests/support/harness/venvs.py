"""Python environments: interpreters on this machine, uv, and one cached environment per Airflow version."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[3]
CACHE = PROJECT / ".venvs"
CONSTRAINTS = {
    "3.0": ["fastapi<0.117", "pydantic<2.12", "pyjwt<2.11"],
    "3.2": ["fastapi<0.137"],
}
"""Where an Airflow's API server doesn't run with the newest packages that its own metadata allow; as its published
constraints have them."""
DRIVERS = ["psycopg2-binary>=2.9", "asyncpg>=0.29"]
"""What Airflow needs to reach PostgreSQL."""
CELERY = [
    "apache-airflow-providers-celery>=3.8",
    "celery<5.7",  # 3.26 of the provider admits 5.7, and can't be imported beside it
    "apache-airflow-providers-amazon>=9.0",
    "s3fs>=2024.6",
]
"""What a cluster has besides: its executor, and the store of its logs and results."""
CELERY_2 = ["apache-airflow-providers-amazon<9.5"]
"""Later ones bring no log of a triggerer of Airflow 2 to S3."""
NEWEST = installed_version("apache-airflow")
"""The Airflow of the development environment: the newest 3.x when it was set up."""
SUPPORTED = ["2.11.2", "3.0.6", "3.1.8", "3.2.2", NEWEST]
"""The newest of each minor version that is supported."""


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
    """An environment that holds an Airflow of this version."""

    path: Path
    version: str

    @property
    def bin(self) -> Path:
        return self.path / "bin"

    @classmethod
    def create(cls, path: Path, version: str, pythons: Sequence[str] = ()) -> AirflowVenv:
        """Make an empty environment with an interpreter that this Airflow supports, or keep the one that is there.

        :param pythons: interpreter versions to choose from, best first; default: what that Airflow runs on
        :raises RuntimeError: this machine has no suitable interpreter
        """
        # Airflow 2.11 and 3.0 end at Python 3.12.
        newer = [] if version.startswith(("2.", "3.0.")) else ["3.13"]
        suitable = list(pythons) or ["3.11", "3.12", "3.10", *newer]
        python = find_python(*suitable)
        if python is None:
            raise RuntimeError(f"Airflow {version} needs Python {' or '.join(suitable)}")
        uv("venv", "--quiet", "--allow-existing", "--no-python-downloads", "--python", python, path)
        return cls(path, version)

    def install(self, *requirements: str | Path) -> None:
        """Install beside this version of Airflow, with pip's rules; options of ``uv pip install`` may be among them.

        :raises RuntimeError: the requirements contradict each other
        """
        constraints = CONSTRAINTS.get(self.version.rpartition(".")[0], ())
        airflow = [f"apache-airflow=={self.version}", *constraints]
        # Outside the project folder, so that [tool.uv] of pyproject.toml does not loosen the resolution.
        uv("pip", "install", "--python", self.bin / "python", *airflow, *requirements, cwd=Path("/"))


def airflow_venv(version: str = NEWEST) -> AirflowVenv:
    """The cached environment of an Airflow version with this project, editable, and the emulator.

    Seconds with a warm cache; made anew when pyproject.toml has changed. The newest Airflow's is the environment that
    runs this code.
    """
    if version == NEWEST:
        return AirflowVenv(Path(sys.prefix), version)
    return _cached_venv(f"airflow-{version}", version, DRIVERS)


def celery_venv(version: str = NEWEST) -> AirflowVenv:
    """The same with what a cluster of Celery workers needs; apart, since tests of one machine do without."""
    requirements = DRIVERS + CELERY + (CELERY_2 if version.startswith("2.") else [])
    return _cached_venv(f"celery-{version}", version, requirements)


def _cached_venv(name: str, version: str, requirements: list[str]) -> AirflowVenv:
    # What follows [tool.…] configures linters and tests.
    metadata = (PROJECT / "pyproject.toml").read_text().partition("[tool.")[0]
    wanted = hashlib.sha256(f"{metadata}{CONSTRAINTS}{requirements}".encode()).hexdigest()
    path = CACHE / name
    mark = path / ".harness"
    with locked(CACHE / f".{path.name}.lock"):
        if not mark.exists() or mark.read_text() != wanted:
            # Compiled once, not by each of the dozen processes that start together.
            provider = ("--editable", f"{PROJECT}[emulator]")
            AirflowVenv.create(path, version).install("--compile-bytecode", *provider, *requirements)
            mark.write_text(wanted)
    return AirflowVenv(path, version)
