"""The judge: what the emulator's records say about one run."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from itertools import pairwise
from typing import Any

from yandex.cloud.datasphere.v2.jobs import jobs_pb2

from datasphere_emulator import Emulator

_TOKEN = re.compile(r"airflow:[0-9a-f]{20}")
_ENDED = (jobs_pb2.SUCCESS, jobs_pb2.ERROR, jobs_pb2.CANCELLED)


@dataclass
class Verdict:
    """``faults`` break the promise; ``notes`` are worth a look."""

    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    executed: int = 0


def judge(
    emulator: Emulator,
    jobs_of_run: Sequence[jobs_pb2.Job],
    state: str,
    result: dict[str, Any] | None,
    *,
    expected: str,
    proof: str,
    may_cancel: bool,
) -> Verdict:
    """Judge one run.

    :param jobs_of_run: the jobs that it has made.
    :param state: the task's end.
    :param result: its XCom.
    :param expected: the end it should have.
    :param may_cancel: whether anybody wanted a job ended.
    :param proof: what the program of every executed job must have printed: it read the bytes that the DAG gave.
    """
    verdict = Verdict()
    if state != expected:
        verdict.faults.append(f"ended as {state}, not {expected}")
    generations: dict[str, list[jobs_pb2.Job]] = defaultdict(list)
    for job in jobs_of_run:
        token = _TOKEN.search(job.desc)
        if token is None:
            verdict.faults.append(f"{job.id} has no mark: {job.desc!r}")
            continue
        if job.status not in _ENDED and job.status != jobs_pb2.CREATING:
            verdict.faults.append(f"{job.id} is left {jobs_pb2.JobStatus.Name(job.status)}")
        executions = emulator.executions(job.id)
        if executions > 1:
            verdict.faults.append(f"{job.id} was executed {executions} times")
        if executions:
            generations[token.group()].append(job)
        elif job.status == jobs_pb2.CREATING:
            verdict.notes.append("a job left that never ran")
    mine = {job.id for job in jobs_of_run}
    if not may_cancel and (cancelled := [c.job_id for c in emulator.journal.calls("Cancel") if c.job_id in mine]):
        verdict.faults.append(f"{', '.join(map(str, cancelled))} cancelled though nobody asked for it")
    for jobs in generations.values():
        verdict.executed += len(jobs)
        verdict.faults += _overlaps(jobs)
        for job in jobs:
            log = b"".join(part for _, _, part in emulator.log_text(job.id)).decode(errors="replace")
            if job.status == jobs_pb2.SUCCESS and proof not in log:
                verdict.faults.append(f"{job.id} didn't read the bytes that the DAG gave")
        if len(jobs) > 1:
            verdict.notes.append(f"{len(jobs)} jobs in one generation, one after another")
    if expected == "success":
        succeeded = {job.id for jobs in generations.values() for job in jobs if job.status == jobs_pb2.SUCCESS}
        if not result or result.get("job_id") not in succeeded or result.get("return_code") != 0:
            verdict.faults.append(f"the result is lost: {result}")
        elif [file["path"] for file in result["output_files"]] != ["out.txt"]:
            verdict.faults.append(f"the result's files are {result['output_files']}")
    return verdict


def _overlaps(jobs: list[jobs_pb2.Job]) -> list[str]:
    faults = []
    spans = sorted(
        ((_time(job.started_at), _time(job.finished_at), job) for job in jobs if job.HasField("started_at")),
        key=lambda span: span[:2],
    )
    for (_, first_end, first), (second_start, _, second) in pairwise(spans):
        if first.status == jobs_pb2.SUCCESS:
            faults.append(f"{second.id} was executed after {first.id} had succeeded")
        elif not first.HasField("finished_at") or second_start < first_end:
            faults.append(f"{second.id} was executed while {first.id} lived")
    return faults


def _time(moment: Any) -> datetime:
    found: datetime = moment.ToDatetime(tzinfo=timezone.utc)
    return found
