"""Exactly one job per key: find what an earlier try left behind, and decide what to do about it.

A key belongs to one generation of a task. Its token stands in the description of every job made for it, so that the
job can be found on the service even where nothing was written down (no state store, or a crash in between).
"""

from __future__ import annotations

import enum
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

from yandex.cloud.datasphere.v2.jobs import jobs_pb2

from airflow_provider_datasphere.client.errors import DataSphereError, JobInfrastructureError, JobRequestError
from airflow_provider_datasphere.client.execute import discard, execute, start, take_back
from airflow_provider_datasphere.client.key import Key, Store, retries_of
from airflow_provider_datasphere.client.outcome import (
    TERMINAL,
    JobHandle,
    has_unstored_outputs,
    return_code_of,
    status_name,
)
from airflow_provider_datasphere.client.submit import Submission, submit

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.fork import ForkRequest
    from airflow_provider_datasphere.client.reporting import Reporter
    from airflow_provider_datasphere.client.service import JobService

log = logging.getLogger(__name__)

#: Bounds of one search: jobs read, and seconds.
MAX_JOBS_SEARCHED = 20_000
MAX_SEARCH_SECONDS = 240.0
#: The clocks of Airflow and of the service may differ by this much.
CLOCK_SKEW = timedelta(minutes=10)


class Move(enum.Enum):
    """What to do about what was found."""

    FORK = "forking a new job"
    ATTACH = "attaching to it"
    ADOPT = "taking its result"
    EXECUTE = "starting it"
    SUBMIT_AGAIN = "uploading its inputs again and starting it"
    WAIT_AND_FORK = "waiting for its end, then forking a new job"


_RUNNING = 1
_WORTH = {jobs_pb2.SUCCESS: 0, jobs_pb2.CREATING: 2, jobs_pb2.CANCELLING: 3}


@dataclass(frozen=True)
class Found:
    """The jobs of one key, as far as they matter.

    :param job: the one that counts.
    :param ordinal: how many of the key's jobs are of no use any more; makes the next fork's idempotency key a new one.
    :param unstarted: the ids of all that were cloned and never executed.
    """

    job: jobs_pb2.Job | None
    move: Move
    ordinal: int
    unstarted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Obtained:
    """The one job of a key.

    :param found: whether it was there already.
    """

    handle: JobHandle
    found: bool


def decide(
    jobs: Sequence[jobs_pb2.Job], key: Key, *, uploaded: str | None, has_inputs: bool, failed: str | None = None
) -> Found:
    """The decision table. The most valuable job counts: a success, then a living one, then one that never ran.

    :param uploaded: id of the job whose inputs are known to be in place.
    :param has_inputs: whether the request uploads anything.
    :param failed: id of a job whose program is known to have failed, whatever the job's status says.
    """
    # A clear after somebody edited `retries` can lead to the same key; a person who clears wants a new job.
    of_use = [
        job
        for job in jobs
        if job.status not in (jobs_pb2.ERROR, jobs_pb2.CANCELLED)
        and job.id != failed
        and (job.status != jobs_pb2.SUCCESS or (retries_of(job.desc) == key.retries and not has_unstored_outputs(job)))
    ]
    spent = len(jobs) - len(of_use)
    unstarted = tuple(job.id for job in of_use if job.status == jobs_pb2.CREATING)
    by_worth = sorted(of_use, key=lambda job: _WORTH.get(job.status, _RUNNING))
    if not by_worth:
        return Found(jobs[-1] if jobs else None, Move.FORK, spent)
    job = by_worth[0]
    if job.status == jobs_pb2.SUCCESS:
        return Found(job, Move.ADOPT, spent, unstarted)
    if job.status == jobs_pb2.CANCELLING:
        return Found(job, Move.WAIT_AND_FORK, spent + 1)
    if job.status != jobs_pb2.CREATING:
        return Found(job, Move.ATTACH, spent, unstarted)
    if not has_inputs:
        return Found(job, Move.EXECUTE, spent, unstarted)
    job = next((ready for ready in by_worth if ready.id == uploaded), job)
    return Found(job, Move.EXECUTE if job.id == uploaded else Move.SUBMIT_AGAIN, spent, unstarted)


def search(client: JobService, project_id: str, key: Key, source_job_id: str) -> list[jobs_pb2.Job]:
    """All jobs of a key, oldest first (RPC ``List``, in whatever order it answers).

    :raises JobInfrastructureError: the search couldn't be finished; that is not the same as finding nothing.
    """
    found: list[jobs_pb2.Job] = []
    since = key.since - CLOCK_SKEW if key.since else None
    deadline = time.monotonic() + MAX_SEARCH_SECONDS
    try:
        for count, job in enumerate(client.list_jobs(project_id), start=1):
            if (
                key.token in job.desc
                and job.parent_job_id == source_job_id
                and _created(job) >= (since or _created(job))
            ):
                found.append(job)
            if count >= MAX_JOBS_SEARCHED or time.monotonic() > deadline:
                raise JobInfrastructureError(f"project {project_id} has too many jobs to look through ({count} read)")
    except DataSphereError as error:
        raise _not_looked(error) from error
    return sorted(found, key=_created)


def obtain(
    client: JobService,
    request: ForkRequest,
    submission: Submission,
    key: Key,
    *,
    store: Store | None = None,
    look: bool = True,
    link: Callable[[jobs_pb2.Job], str] | None = None,
    wait: Callable[[str], object] | None = None,
) -> Obtained:
    """The one job of ``key``: the one that an earlier try left, or a new one.

    :param submission: what to do on the way; its key is made here.
    :param look: whether there is a reason to look for an earlier job, where the store doesn't say.
    :param link: the page of a job, for the log.
    :param wait: waits for the end of a job by its id.
    """
    logger = submission.log or log
    entry_found = store.get() if store is not None else None
    written = entry_found if entry_found is not None and entry_found.get("token") == key.token else None
    source: jobs_pb2.Job | None = None
    found = Found(None, Move.FORK, 0)
    # An entry of another generation shows that the store works, and that this one has sent nothing yet. Without any
    # entry the store may be new, or have forgotten.
    if written is not None or (look and entry_found is None):
        jobs, source = _earlier_jobs(client, request, key, written)
        found = decide(
            jobs,
            key,
            uploaded=written.get("uploaded") if written else None,
            has_inputs=_has_inputs(request, jobs, source),
            failed=_known_to_have_failed(client, written, jobs),
        )
        _report(logger, found, request, link)
    elif look:
        logger.info("No earlier try of this generation got as far as cloning job %s.", request.source_job_id)

    entry: dict[str, Any] = {"token": key.token, "retries": key.retries}

    def write(**news: Any) -> None:
        entry.update(news)
        if store is not None:
            store.set(dict(entry))

    def cloned(job_id: str) -> None:
        write(job_id=job_id)
        submission.cloned(job_id)

    def uploaded(job_id: str) -> None:
        write(uploaded=job_id)
        submission.uploaded(job_id)

    job = found.job
    if job is not None and found.move is Move.WAIT_AND_FORK and wait is not None:
        wait(job.id)
        return obtain(client, request, submission, key, store=store, look=look, link=link, wait=wait)
    if job is not None and found.move in (Move.ATTACH, Move.ADOPT, Move.EXECUTE):
        job_id, move = _only_one(client, found, job.id)
        submission.cloned(job_id)
        operation_id = written.get("operation_id") if written and written.get("job_id") == job_id else None
        handle = JobHandle(job_id, operation_id)
        if move is Move.EXECUTE:
            handle = start(client, request, job_id, logger, may_run=True)
        elif move is Move.ATTACH and operation_id is None and client.get(job_id).status not in TERMINAL:
            # On a running job Execute answers with the operation that runs; what it does on an ended one isn't known.
            handle = execute(client, job_id, logger, may_run=True)
        write(job_id=job_id, uploaded=job_id, operation_id=handle.operation_id)
        return Obtained(handle, found=True)

    # Written before the Clone is sent: a store without an entry proves that nothing was.
    write(job_id=None)
    handle = submit(
        client,
        replace(request, desc=key.describe(_base_desc(client, request, source))),
        replace(
            submission,
            key=key.repeated(found.ordinal),
            cloned=cloned,
            uploaded=uploaded,
            find=lambda: _unstarted(client, request, key),
            resume=found.unstarted if found.move is Move.SUBMIT_AGAIN else (),
            verify=look or written is not None,
        ),
        source=source,
    )
    write(operation_id=handle.operation_id)
    return Obtained(handle, found=False)


def _only_one(client: JobService, found: Found, job_id: str) -> tuple[str, Move]:
    """Take back the key's other jobs that seem never to have been executed, before this one is.

    :return: the job to go on with, and how: one of those that runs all the same goes before one that would be started.
    """
    for other in found.unstarted:
        if other == job_id:
            continue
        if found.move is not Move.EXECUTE:
            discard(client, other)
        elif not take_back(client, other):
            discard(client, job_id)
            return other, Move.ATTACH
    return job_id, found.move


def differences(request: ForkRequest, job: jobs_pb2.Job) -> list[str]:
    """Which of the request's arguments the found job was not made with."""
    parameters = job.job_parameters
    args = {argument.name: argument.value for argument in parameters.arguments}
    outputs = {desc.var: desc.path for desc in parameters.output_files if desc.var}
    inputs = {file.desc.var for file in parameters.input_files}
    changed = [f"args[{name!r}]" for name, value in request.args.items() if args.get(name) != value]
    changed += [
        f"vars[{var!r}]" for var, path in request.vars.items() if var not in inputs and outputs.get(var) != path
    ]
    changed += [
        f"env_vars[{name!r}]" for name, value in request.env_vars.items() if parameters.env.vars.get(name) != value
    ]
    types = [instance.name for instance in parameters.cloud_instance_types]
    if request.cloud_instance_types and list(request.cloud_instance_types) != types:
        changed.append("cloud_instance_types")
    if request.name and request.name != job.name:
        changed.append("name")
    return changed


def _earlier_jobs(
    client: JobService, request: ForkRequest, key: Key, written: dict[str, Any] | None
) -> tuple[list[jobs_pb2.Job], jobs_pb2.Job | None]:
    """The key's jobs, and the source job where it was read on the way."""
    if written is not None and written.get("job_id"):
        try:
            job = client.get(written["job_id"])
        except JobRequestError:
            log.debug("The job in the state store is gone; searching.")
        else:
            if job.status not in (jobs_pb2.ERROR, jobs_pb2.CANCELLED):
                return [job], None
    source: jobs_pb2.Job | None = None
    try:
        source = client.get(request.source_job_id)
        project_id: str | None = source.project_id
    except JobRequestError as error:
        # The source may be gone while the job that was forked from it lives.
        project_id = client.settings.project_id
        if project_id is None:
            raise _not_looked(error, written) from error
    return search(client, project_id or "", key, request.source_job_id), source


def _not_looked(error: Exception, written: dict[str, Any] | None = None) -> JobInfrastructureError:
    known = (written or {}).get("job_id")
    running = f" Job {known} may still be running and costing money." if known else ""
    return JobInfrastructureError(
        f"Couldn't look for the job that an earlier try may have started: {error}{running} Without knowing, no new job "
        "is forked; the next try looks again. (reattach=False never looks.)"
    )


def _unstarted(client: JobService, request: ForkRequest, key: Key) -> list[str]:
    """Jobs of this key that have not been executed: the effect of Clones whose answers were lost."""
    source = client.get(request.source_job_id)
    jobs = search(client, source.project_id, key, request.source_job_id)
    return [job.id for job in jobs if job.status == jobs_pb2.CREATING]


def _known_to_have_failed(client: JobService, written: dict[str, Any] | None, jobs: list[jobs_pb2.Job]) -> str | None:
    """A job that shows SUCCESS though its program failed. Whether the service does that isn't documented; only the
    operation knows the return code.
    """
    job_id, operation_id = (written or {}).get("job_id"), (written or {}).get("operation_id")
    if not operation_id or all(job.id != job_id or job.status != jobs_pb2.SUCCESS for job in jobs):
        return None
    try:
        operation = client.get_operation(operation_id)
    except JobRequestError:
        return None  # forgotten
    return job_id if return_code_of(operation) else None


def _has_inputs(request: ForkRequest, jobs: Sequence[jobs_pb2.Job], source: jobs_pb2.Job | None) -> bool:
    described = [source] if source is not None else list(jobs)
    inputs = {file.desc.var for job in described for file in job.job_parameters.input_files}
    return any(var in inputs for var in request.vars)


def _base_desc(client: JobService, request: ForkRequest, source: jobs_pb2.Job | None) -> str:
    if request.desc is not None:
        return request.desc
    return (source or client.get(request.source_job_id)).desc


def _report(logger: Reporter, found: Found, request: ForkRequest, link: Callable[[jobs_pb2.Job], str] | None) -> None:
    job = found.job
    if job is None:
        logger.info("No job of an earlier try of this generation was found: %s.", Move.FORK.value)
        return
    where = f" ({link(job)})" if link is not None else ""
    logger.info(
        "An earlier try of this generation left job %s%s with status %s: %s.",
        job.id,
        where,
        status_name(job.status),
        found.move.value,
    )
    if found.move in (Move.ATTACH, Move.ADOPT, Move.EXECUTE) and (changed := differences(request, job)):
        logger.warning(
            "Job %s was made with other arguments than the task has now: %s differ. To run a new job with the new "
            "ones, clear the task (and cancel this job if it runs).",
            job.id,
            ", ".join(changed),
        )


def _created(job: jobs_pb2.Job) -> datetime:
    created: datetime = job.created_at.ToDatetime(tzinfo=timezone.utc)
    return created
