"""The Python blocks of README and pages are run, one after the other as a reader would, against the emulator."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk import DAG

from airflow_side import connect
from datasphere_emulator import Emulator

PROJECT = Path(__file__).resolve().parents[2]
PAGES = sorted([PROJECT / "README.md", *PROJECT.glob("docs/*.md")])
_BLOCK = re.compile(r"^( *)```python\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
#: What a page may take for granted: a reader has it from the pages before.
PRELUDE = """
import os
from datetime import datetime, timedelta
from pathlib import Path

from airflow.sdk import DAG, ObjectStoragePath, task

from airflow_provider_datasphere.hooks.datasphere import DataSphereHook
from airflow_provider_datasphere.operators.jobs import CancelJobOperator, ExecuteJobOperator, ForkJobOperator
from airflow_provider_datasphere.operators.results import DownloadJobResultsOperator
from airflow_provider_datasphere.sensors.jobs import DataSphereJobSensor
"""
#: Tasks that stand above what a block shows.
TASKS = """
fork = ForkJobOperator(task_id="fork_above", source_job_id=job_id)
train = ForkJobOperator(task_id="train_above", source_job_id=job_id)
wait = DataSphereJobSensor(task_id="wait_above", job_id=fork.output)
cancel = CancelJobOperator(task_id="cancel_above", job_id=fork.output)
"""
#: Page and beginning of a block -> why it isn't run.
NOT_RUN = {
    ("migration.md", "@task(task_id="): "what the service's documentation shows, with the SDK",
    (
        "results.md",
        "from airflow.sdk import ObjectStoragePath",
    ): "needs buckets; tests/component/transfer has each line",
}


def blocks(page: Path) -> list[str]:
    return [textwrap.dedent(text) for _, text in _BLOCK.findall(page.read_text())]


def is_run(page: Path, text: str) -> bool:
    return not any(page.name == name and text.startswith(begin) for name, begin in NOT_RUN)


@pytest.fixture(scope="module")
def emulator() -> Iterator[Emulator]:
    with Emulator(tls=False) as running:
        yield running


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_the_blocks_of_a_page_run(
    emulator: Emulator, page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    connect(emulator, monkeypatch)
    shutil.copytree(PROJECT / "example_dags" / "train", tmp_path / "train")
    monkeypatch.chdir(tmp_path)
    source = emulator.create_job(
        "cat ${INPUT_DATA} > ${MODEL}",
        files={"in.txt": "1"},
        inputs=[("in.txt", "INPUT_DATA")],
        outputs=[("result.txt", "MODEL")],
        args={"RANGE": "1", "LR": "1"},
        execute=True,
    )
    emulator.wait_job(source)
    names: dict[str, Any] = {"__name__": page.stem, "job_id": source}
    exec(PRELUDE, names)
    for number, text in enumerate(blocks(page)):
        if not is_run(page, text):
            continue
        # A DAG for each block: names of tasks come again.
        file = tmp_path / f"block_{number}.py"
        file.write_text(text.replace("bt1…", source))
        code = compile(file.read_text(), str(file), "exec")
        with DAG(f"{page.stem}_{number}", schedule=None):
            exec(TASKS, names)
            exec(code, names)
