"""What the tests of the official CLI have in common: an emulator in its place, and scenarios that run side by side.

The CLI looks at a running job every 5 seconds, so the tests would take minutes one after the other. A function marked
with :func:`scenario` is a test; when the first one is asked for its result, all of the session are started in threads.
"""

from __future__ import annotations

import itertools
import json
import os
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasphere_emulator import Emulator
from harness.package_index import package_index
from harness.redirected_hosts import PUBLIC_HOST
from harness.sdk_venv import PATIENCE, Cli, Command, SdkVenv

LAUNCHER = Path(__file__).parent / "harness" / "cli_launcher.py"
#: Set where the public hosts lead to the loopback interface, so that the CLI needs no change at all.
REDIRECTED = os.environ.get("DATASPHERE_CLI_HOSTS") == "redirected"


@dataclass
class Stage:
    """What one scenario has for itself: a folder to work in and a project in the emulator."""

    emulator: Emulator
    cli: Cli
    folder: Path
    project_id: str

    def start(self, *arguments: str | Path, environment: Mapping[str, str | None] | None = None) -> Command:
        """Start a command in the folder."""
        return self.cli.start(*arguments, cwd=self.folder, environment=environment)

    def run(
        self, *arguments: str | Path, code: int = 0, environment: Mapping[str, str | None] | None = None
    ) -> Command:
        """Run a command to its end, which must be with this exit code."""
        return self.start(*arguments, environment=environment).end(code)

    def ask(self, *arguments: str) -> Any:
        """Run a command that prints entities, and give them back."""
        output = self.folder / f"answer-{next(_numbers)}.json"
        self.run(*arguments, "--format", "json", "-o", output)
        return json.loads(output.read_text())

    def ask_execution(self, *arguments: str) -> tuple[str, str]:
        """Run ``execute`` or ``fork`` with --async; returns the ids of the job and the operation."""
        output = self.folder / f"execution-{next(_numbers)}.json"
        self.run("project", "job", *arguments, "--async", "-o", output)
        execution = json.loads(output.read_text())
        return execution["job_id"], execution["operation_id"]

    def write(self, files: Mapping[str, str]) -> None:
        """Write files in the folder; the texts may be indented as a whole."""
        for name, text in files.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text))

    def read(self, name: str) -> str:
        """A file that the CLI brought into the folder."""
        return (self.folder / name).read_text()

    @property
    def go(self) -> Path:
        """Programs wait for this file."""
        return self.folder / "go"

    def only_job(self, parent: str | None = None) -> str:
        """The id of the one job in the project, or the one fork of a job."""
        (job,) = [job for job in self.emulator.jobs(parent) if job.project_id == self.project_id]
        return str(job.id)

    def log(self, job_id: str, source: str = "stdout") -> str:
        """What the job has written, as the emulator has it."""
        pieces = self.emulator.log_text(job_id)
        return b"".join(content for name, _, content in pieces if name == source).decode()


_numbers = itertools.count(1)


def until(condition: Callable[[], Any]) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"It takes more than {PATIENCE} s."
        time.sleep(0.05)


Scenario = Callable[[Stage], None]


def scenario(function: Scenario) -> Callable[[Any], None]:
    """Make a test of a function that gets a stage."""

    def test(scenarios: Any) -> None:
        scenarios[function].result()

    test.__name__ = test.__qualname__ = function.__name__
    test.__module__ = function.__module__
    test.__doc__ = function.__doc__
    test.scenario = function  # type: ignore[attr-defined]
    return test


@contextmanager
def theatre(folder: Path) -> Iterator[Callable[[str], Stage]]:
    """An emulator and the CLI; gives what makes a stage of a name."""
    venv = SdkVenv().create()
    with ExitStack() as stack:
        options: dict[str, Any] = {}
        words = [venv.python, LAUNCHER]
        if REDIRECTED:
            names = ("*.api.cloud.yandex.net", "pypi.org")
            options = {"port": 443, "public_host": PUBLIC_HOST, "certificate_hosts": names}
            words = [venv.command]
        emulator = stack.enter_context(Emulator(**options))
        cli = Cli(words, folder / "commands", environment_of(emulator))
        asked = None
        if REDIRECTED:
            tls = emulator.state_dir / "tls"
            index = package_index(("127.0.0.2", 443), tls / "server.pem", tls / "server.key", "datasphere", ["0.10.0"])
            asked = stack.enter_context(index)

        def stage(name: str) -> Stage:
            project_id = emulator.add_project(name)
            emulator.iam.set_role(emulator.service_account_id, project_id, "developer")
            place = folder / name
            place.mkdir()
            return Stage(emulator, cli, place, project_id)

        yield stage
        assert asked != [], "The unmodified CLI asks the package index for newer versions."


def environment_of(emulator: Emulator) -> dict[str, str]:
    """Variables that let the SDK trust the emulator, and be trusted by it."""
    authority = str(emulator.root_certificates)
    return {
        "YC_IAM_TOKEN": emulator.iam_token,
        "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": authority,
        "REQUESTS_CA_BUNDLE": authority,
        "DATASPHERE_ENDPOINT": emulator.endpoint,
        "NO_PROXY": "*",
    }
