"""The jobs that wait for room in a project, in the triggerer: they are started one after the other, oldest first.

A quota of running jobs is a queue. The task of each job that waits in it is deferred, so that it holds no worker slot;
the oldest one asks the service for all, with pauses.
"""

from __future__ import annotations

import asyncio
import bisect
import logging
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import grpc
from yandex.cloud.datasphere.v2.jobs import jobs_pb2, project_job_service_pb2

from airflow_provider_datasphere.client.errors import JobCancelledError
from airflow_provider_datasphere.client.model import TERMINAL, JobHandle
from airflow_provider_datasphere.client.monitoring.polling import DENIED_GRACE_SECONDS, NOT_FOUND_GRACE_SECONDS
from airflow_provider_datasphere.client.rpc import (
    DENIED,
    READ_DEADLINE_SECONDS,
    TRANSIENT,
    WRITE_DEADLINE_SECONDS,
    call_error,
    code_and_details,
    code_name,
)
from airflow_provider_datasphere.client.submission.capacity import MAX_ROOM_PAUSE_SECONDS, RoomNotice
from airflow_provider_datasphere.client.submission.execution import (
    ExecuteState,
    JobEndedUnstartedError,
    Rejection,
    deleted_text,
    ended_unstarted,
)
from airflow_provider_datasphere.client.time_limit import within

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.connection.channels import AsyncChannels
    from airflow_provider_datasphere.client.logger import LoggerLike
    from airflow_provider_datasphere.client.submission.start_clock import StartClock

log = logging.getLogger(__name__)

#: The shortest pause between two attempts of a queue, seconds.
MIN_PAUSE_SECONDS = 1.0
#: The pause of a job whose turn it was, but whose task Airflow doesn't wait for, or doesn't answer about, seconds.
NOT_WAITED_FOR_PAUSE_SECONDS = 5.0
#: The longest pause after a failed read of a job, seconds.
MAX_READ_PAUSE_SECONDS = 30.0


@dataclass(order=True)
class _Place:
    """The place of one job in the queue: the oldest is first."""

    since: float
    job_id: str
    turn: asyncio.Event = field(default_factory=asyncio.Event, compare=False)


@dataclass(frozen=True)
class QueuedJob:
    """A created job that waits for room.

    :param clock: when it was first executed, which decides on its place; and its ``start_timeout``.
    :param may_start: asked before each Execute: whether its task still waits for it.
    """

    job_id: str
    clock: StartClock
    may_start: Callable[[], Awaitable[bool]]
    logger: LoggerLike = log


class StartQueue:
    """The jobs of one project that wait for room, in one event loop and with one connection.

    After an accepted Execute the next job's follows at once. After a rejected one there is a pause. It doubles where
    nothing was accepted since the last pause, and is halved where several were: so there is about one rejection for
    each job that starts, however long jobs run.
    """

    def __init__(self) -> None:
        self._users = 0
        self._places: list[_Place] = []
        self._busy = False
        self._reason = ""
        self._restart()

    def _restart(self) -> None:
        self._pause = MIN_PAUSE_SECONDS
        self._next_attempt_at = asyncio.get_running_loop().time() + self._pause * random.random()
        self._accepted = 0

    @classmethod
    def shared(cls, fingerprint: str, project_id: str) -> StartQueue:
        """Return the running loop's queue of a project for the connection with these settings."""
        queues = _queues.setdefault(asyncio.get_running_loop(), {})
        for key, queue in list(queues.items()):
            if not queue._users:
                del queues[key]
        return queues.setdefault((fingerprint, project_id), cls())

    async def start(self, channels: AsyncChannels, job: QueuedJob, reason: str) -> JobHandle:
        """Start a job, as soon as there is room and those before it have started.

        If another process has started it already, that is found out first.

        :param reason: the service's answer to the Execute that was rejected last.
        :raises JobNotStartedError: ``start_timeout`` has passed, and the job doesn't run.
        :raises JobCancelledError: somebody has deleted it.
        :raises DataSphereError: it can't be started, for another reason than lack of room or of instances.
        """
        self._users += 1
        try:
            return await self._start(channels, job, reason)
        finally:
            self._users -= 1

    async def _start(self, channels: AsyncChannels, job: QueuedJob, reason: str) -> JobHandle:
        self._reason = self._reason or reason
        state = ExecuteState(job.job_id, job.clock, job.logger, may_be_running=True, patient=True)
        notice = RoomNotice(job.logger)
        while state.handle is None:
            current = await _read_job(channels, job)
            if _is_unstarted(current):
                job.clock.check(f"Job {job.job_id}", self._reason)
                place = _Place(job.clock.first_execute_at or 0.0, job.job_id)
                self._enter(place)
                try:
                    pause = await self._start_in_turn(channels, job, state, place, notice)
                finally:
                    self._leave(place)
            elif current.status in (*TERMINAL, jobs_pb2.CANCELLING):
                # What Execute does on an ended job isn't known.
                return JobHandle(job.job_id, first_execute_at=job.clock.first_execute_at)
            else:
                # It runs, and Execute answers with its operation.
                await _execute(channels, job, state)
                pause = state.delay
            await asyncio.sleep(pause)
        return state.handle

    async def _start_in_turn(
        self, channels: AsyncChannels, job: QueuedJob, state: ExecuteState, place: _Place, notice: RoomNotice
    ) -> float:
        """Try to start the job, each time that it is first, until there is more to do than to wait for room.

        :return: how long the job has to pause outside the queue, seconds.
        """
        while await self._is_its_turn(place, job, notice):
            self._busy = True
            try:
                if not await job.may_start():
                    return NOT_WAITED_FOR_PAUSE_SECONDS
                current = await _read_job(channels, job)
                if ended_unstarted(current):
                    raise JobEndedUnstartedError(job.job_id)
                if not _is_unstarted(current):
                    return 0.0
                await _execute(channels, job, state)
                if state.rejection is Rejection.INSTANCE_TYPES:
                    return state.delay
                if state.handle is not None:
                    self._after_acceptance()
                    return 0.0
                self._after_rejection(state.reason)
            except JobEndedUnstartedError as error:
                self._after_rejection(str(error))
                raise
            finally:
                self._busy = False
                self._places[0].turn.set()  # another may have become the first meanwhile
        return 0.0

    async def _is_its_turn(self, place: _Place, job: QueuedJob, notice: RoomNotice) -> bool:
        """Wait until the job is first and an attempt is due; False: ``start_timeout`` has passed meanwhile.

        It may have been started by another process, so that it must be read before it is given up.
        """
        loop = asyncio.get_running_loop()
        while job.clock.remaining != 0:
            number = bisect.bisect_left(self._places, place) + 1
            where = f"place {number} of {len(self._places)} in this triggerer"
            notice.log(f"Job {job.job_id}", self._reason, where)
            if number == 1 and not self._busy:
                pause = self._next_attempt_at - loop.time()
                if pause <= 0:
                    return True
                await asyncio.sleep(job.clock.limit(min(pause, notice.due_in)))
            else:
                place.turn.clear()
                with suppress(asyncio.TimeoutError):
                    await within(place.turn.wait(), job.clock.limit(notice.due_in))
        return False

    def _enter(self, place: _Place) -> None:
        if not self._places:
            self._restart()
        bisect.insort(self._places, place)

    def _leave(self, place: _Place) -> None:
        self._places.remove(place)
        if self._places:
            self._places[0].turn.set()

    def _after_acceptance(self) -> None:
        self._accepted += 1
        self._next_attempt_at = 0.0

    def _after_rejection(self, reason: str) -> None:
        self._reason = reason
        if self._accepted == 0:
            self._pause = min(MAX_ROOM_PAUSE_SECONDS, 2 * self._pause)
        elif self._accepted > 1:
            self._pause = max(MIN_PAUSE_SECONDS, self._pause / 2)
        self._accepted = 0
        self._next_attempt_at = asyncio.get_running_loop().time() + self._pause * random.uniform(0.75, 1.25)


async def _execute(channels: AsyncChannels, job: QueuedJob, state: ExecuteState) -> None:
    """Call Execute until its result is clear."""
    while True:
        try:
            operation = await channels.unary(
                "jobs",
                "Execute",
                state.next_request(),
                timeout=WRITE_DEADLINE_SECONDS,
                idempotency_key=state.idempotency_key,
            )
        except grpc.RpcError as error:
            if state.failed(error):
                state.job_read(await _read_job(channels, job))
        else:
            state.accepted(operation)
        if state.handle is not None or state.rejection is not None:
            return
        await asyncio.sleep(state.delay)


async def _read_job(channels: AsyncChannels, job: QueuedJob) -> jobs_pb2.Job:
    """Return the job; retry transient errors without a limit, denied access and an unknown job as long as a poll does.

    :raises JobCancelledError: somebody has deleted it.
    :raises DataSphereError: it can't be read.
    """
    loop = asyncio.get_running_loop()
    request = project_job_service_pb2.GetProjectJobRequest(job_id=job.job_id)
    grace = {**dict.fromkeys(DENIED, DENIED_GRACE_SECONDS), "NOT_FOUND": NOT_FOUND_GRACE_SECONDS}
    pause, failing, logged = 0.5, ("", 0.0), False
    while True:
        try:
            read: jobs_pb2.Job = await channels.unary("jobs", "Get", request, timeout=READ_DEADLINE_SECONDS)
            return read
        except grpc.RpcError as error:
            code = code_name(error)
            if code != failing[0]:
                failing = (code, loop.time())
            if code not in TRANSIENT and loop.time() - failing[1] >= grace.get(code, 0.0):
                if code == "NOT_FOUND":
                    raise JobCancelledError(deleted_text(job.job_id)) from error
                raise call_error(error, f"Reading job {job.job_id}") from error
            if not logged:
                logged = True
                job.logger.warning("Job.Get failed: %s; retrying.", code_and_details(error))
        await asyncio.sleep(pause * random.uniform(0.75, 1.25))
        pause = min(MAX_READ_PAUSE_SECONDS, 2 * pause)


def _is_unstarted(job: jobs_pb2.Job) -> bool:
    return bool(job.status == jobs_pb2.CREATING) or ended_unstarted(job)


_queues: WeakKeyDictionary[Any, dict[tuple[str, str], StartQueue]] = WeakKeyDictionary()
