"""``make demo`` and ``make demo-ui`` as a newcomer sees them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import requests

pytestmark = [pytest.mark.airflow, pytest.mark.timeout(600)]

PROJECT = Path(__file__).resolve().parents[2]


@contextmanager
def demo(output: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """The demo as the Makefile starts it; whatever happens, its processes are gone afterwards."""
    environment = os.environ | {"PYTHONPATH": str(PROJECT / "tests" / "support")}
    with output.open("wb") as file:
        command = [sys.executable, str(PROJECT / "tools" / "demo.py"), *options]
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT, cwd=output.parent)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)


#: What the logs show for each pattern of the documentation, in this order.
WAITED = ["read 24 hours, the last 1 day(s)", "epoch 1/5: loss", "epoch 5/5: loss", '"status": "SUCCESS"']
SENSED = ["not waiting for its end", "this task has its worker to itself", "ended with return code 0", "SUCCESS"]
CHAINED = [
    "read 240 hours",
    "read a model of 10 day(s)",
    "hour 240: ",
    '"path": "result.txt"',
    '"path": "forecast.txt"',
]
MADE = [
    "Fitting a line to 168 hours",
    '"path": "model.json"',
    "was made from a configuration",
    "50 % 168 rows read",
    "Model: {'slope'",
]


@pytest.mark.parametrize(
    ("options", "expected"),
    [((), WAITED), pytest.param(("--all",), [*WAITED, *SENSED, *CHAINED, *MADE], marks=pytest.mark.long)],
    ids=["demo", "demo-all"],
)
def test_the_demo_shows_the_programs_own_lines_and_the_result(
    tmp_path: Path, options: tuple[str, ...], expected: list[str]
) -> None:
    output = tmp_path / "output"
    with demo(output, *options) as process:
        assert process.wait(timeout=500) == 0, output.read_text()
    text = output.read_text()
    position = 0
    for line in expected:
        position = text.find(line, position)
        assert position >= 0, (line, text)
    assert '"path": "model.json"' in text
    assert "::group::" not in text


def test_the_pages_stay_until_they_are_ended(tmp_path: Path) -> None:
    output = tmp_path / "output"
    with demo(output, "--ui") as process:
        deadline = time.monotonic() + 400
        while "Ctrl-C ends everything" not in output.read_text():
            assert process.poll() is None, output.read_text()
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.5)
        addresses = [word for word in output.read_text().split() if word.startswith("http://")]
        assert len(addresses) == 2
        for address in addresses:
            assert requests.get(address, timeout=60).status_code == 200
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 4  # API server, scheduler, DAG processor, triggerer
    assert process.returncode == 0, output.read_text()
    assert "Traceback" not in output.read_text()
    assert not psutil.wait_procs(children, timeout=10)[1]
