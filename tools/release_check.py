"""Build sdist and wheel, check them, install each into a fresh environment and fork a job: ``make release-check``.

With ``--tag v1.2.3`` the tag, the package's version and the changelog must agree.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
TARGET = PROJECT / "build" / "release"
SMOKE = """
import airflow_provider_datasphere.operators.jobs, airflow_provider_datasphere.decorators.datasphere
from airflow_provider_datasphere.client.connection.settings import Settings
from airflow_provider_datasphere.client.sync_client import DataSphereClient
from datasphere_emulator import Emulator

with Emulator(tls=False) as emulator:
    source = emulator.create_job("true", execute=True)
    client = DataSphereClient(Settings.from_extra(emulator.connection_extra()))
    print(client.fork_job(source).wait().status)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tag", default="")
    parser.add_argument("--airflow", default="apache-airflow>=3.3,<4")
    options = parser.parse_args()
    shutil.rmtree(TARGET, ignore_errors=True)
    packages = TARGET / "packages"
    run("uv", "build", "--quiet", "--out-dir", packages, PROJECT)
    (packages / ".gitignore").unlink(missing_ok=True)
    version = check_version(options.tag)
    wheel, sdist = next(packages.glob("*.whl")), next(packages.glob("*.tar.gz"))
    check_contents(wheel, sdist)
    run("twine", "check", "--strict", wheel, sdist)
    for package in (wheel, sdist):
        check_installation(package, options.airflow)
    print(f"Version {version} can be released: {wheel.name}, {sdist.name}.")
    return 0


def run(command: str, *arguments: str | Path) -> None:
    subprocess.run([Path(sys.executable).with_name(command), *arguments], check=True)


def check_version(tag: str) -> str:
    """Check the versions against each other; write the changelog's section, for the release's notes."""
    source = (PROJECT / "src" / "airflow_provider_datasphere" / "__init__.py").read_text()
    found = re.search(r'__version__ = "(.+)"', source)
    assert found is not None
    version = found[1]
    sections = re.split(r"^## ", (PROJECT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1:]
    named = {section.split()[0].strip("[]"): section for section in sections}
    if tag and (tag != f"v{version}" or version not in named):
        raise SystemExit(f"Tag {tag}, package version {version}, changelog {', '.join(named)}: they must agree.")
    notes = named.get(version) or sections[0]
    (TARGET / "notes.md").write_text(notes.partition("\n")[2].strip() + "\n")
    return version


def check_contents(wheel: Path, sdist: Path) -> None:
    """Check that each has what users need, and nothing of ours alone."""
    names = zipfile.ZipFile(wheel).namelist()
    with tarfile.open(sdist) as archive:
        sources = archive.getnames()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"airflow_provider_datasphere", "datasphere_emulator"}, tops
    for wanted in ("airflow_provider_datasphere/py.typed", "airflow_provider_datasphere/client/function/driver.py"):
        assert wanted in names, wanted
    assert not [name for name in [*names, *sources] if "__pycache__" in name or name.endswith(".pyc")]
    assert any(name.endswith("/example_dags/train/config.yaml") for name in sources)


def check_installation(package: Path, airflow: str) -> None:
    folder = TARGET / f"venv-{package.suffix[1:]}"
    run("uv", "venv", "--quiet", folder)
    python = folder / "bin" / "python"
    run("uv", "pip", "install", "--quiet", "--python", python, airflow, f"{package}[emulator]")
    run("uv", "pip", "check", "--quiet", "--python", python)
    environment = {**os.environ, "AIRFLOW_HOME": str(folder / "airflow")}
    done = subprocess.run([python, "-c", SMOKE], check=True, capture_output=True, text=True, env=environment)
    assert done.stdout.strip().endswith("SUCCESS"), done.stdout
    config = PROJECT / "example_dags" / "train" / "config.yaml"
    subprocess.run([folder / "bin" / "datasphere-config", "check", config], check=True)
    shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
