"""The unmodified ``datasphere`` command: the service's public hosts lead to the emulator, in a namespace of their own.

The tests are those of this folder, run by a second pytest inside the namespace.
"""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FILES = ("test_cli_execute.py", "test_cli_fork.py", "test_cli_look.py")
UNSHARE = ("unshare", "--net", "--mount")


def why_not() -> str | None:
    """Why hosts can't be redirected here; None if they can."""
    if sys.platform != "linux":
        return "only Linux has network and mount namespaces"
    if os.geteuid() != 0:
        return "redirecting the public hosts to loopback needs root"
    try:
        subprocess.run([*UNSHARE, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"root may not make a namespace here: {error}"
    return None


@pytest.mark.root
@pytest.mark.timeout(600)
def test_unmodified_cli(tmp_path: Path) -> None:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    report = tmp_path / "report.xml"
    command = [*UNSHARE, sys.executable, str(TESTS / "support" / "harness" / "redirected_hosts.py")]
    command += [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--timeout=550",
        f"--junit-xml={report}",
    ]
    command += [f"--basetemp={tmp_path / 'inner'}", *(str(TESTS / "sdk_parity" / name) for name in FILES)]
    hosts = Path("/etc/hosts").read_bytes()
    run = subprocess.run(
        command,
        cwd=TESTS.parent,
        env={**os.environ, "DATASPHERE_CLI_HOSTS": "redirected"},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    counts = {name: int(suite.attrib[name]) for name in ("failures", "errors", "skipped")}
    assert counts == {"failures": 0, "errors": 0, "skipped": 0}
    assert {case.attrib["classname"].rpartition(".")[2] + ".py" for case in suite.iter("testcase")} == set(FILES)
    assert Path("/etc/hosts").read_bytes() == hosts
