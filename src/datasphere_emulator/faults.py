"""Injected faults: which coming calls to spoil, and how.

``interceptor.JournalInterceptor`` applies them to gRPC calls, ``storage`` and ``web`` to HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fnmatch
import random
import threading
import time
import uuid
from typing import Any

import grpc

from datasphere_emulator.journal import Call, Journal

__all__ = ["Call", "Fault", "Faults", "Journal"]

#: Effects that only make sense on a file's body.
_BODY_EFFECTS = ("truncate_at", "corrupt_at", "cut_at", "bytes_per_second")
#: Methods that answer with a stream of messages.
_STREAMS = ("ReadLogs", "ReadStdLogs")


@dataclasses.dataclass
class Fault:
    """One injected fault; the fields are described at :meth:`Faults.inject`."""

    id: str
    method: str
    code: str | None = None
    message: str = ""
    times: int | None = None
    probability: float = 1.0
    delay: float = 0.0
    hang: bool = False
    lost_answer: bool = False
    after_messages: int | None = None
    job_id: str | None = None
    subject: str | None = None
    skip: int = 0
    rate_limit: float | None = None
    status: int | None = None
    truncate_at: float | None = None
    corrupt_at: float | None = None
    cut_at: float | None = None
    bytes_per_second: float | None = None
    matched: int = 0
    fired: int = 0
    _allowance: float = 0.0
    _allowance_time: float | None = None

    @property
    def ends_call(self) -> bool:
        """Whether it decides how the call ends (a delay or a hang alone doesn't)."""
        effects = ("code", "after_messages", "rate_limit", "status", *_BODY_EFFECTS)
        return self.lost_answer or any(getattr(self, name) is not None for name in effects)

    def suits(self, method: str) -> bool:
        """Whether its effects can happen to this method: bodies are storage's, statuses HTTP's, messages streams'."""
        if any(getattr(self, name) is not None for name in _BODY_EFFECTS):
            return method.startswith("storage.")
        if self.status is not None:
            return method.startswith(("storage.", "metadata."))
        return self.after_messages is None or method in _STREAMS

    def _within_rate(self, now: float) -> bool:
        # A bucket of one second's calls, at least one.
        assert self.rate_limit is not None
        burst = max(1.0, self.rate_limit)
        if self._allowance_time is None:
            self._allowance = burst
        else:
            self._allowance = min(burst, self._allowance + (now - self._allowance_time) * self.rate_limit)
        self._allowance_time = now
        if self._allowance < 1.0:
            return False
        self._allowance -= 1.0
        return True

    def _strikes(self, chance: random.Random) -> bool:
        self.matched += 1
        if self.matched <= self.skip or (self.times is not None and self.fired >= self.times):
            return False
        if self.probability < 1.0 and chance.random() >= self.probability:
            return False
        if self.rate_limit is not None and self._within_rate(time.monotonic()):
            return False
        self.fired += 1
        return True


class Faults:
    """The faults in force. Thread-safe: may be changed from any thread while calls run.

    :param seed: seed of the random numbers behind ``probability``.
    """

    def __init__(self, seed: int = 0) -> None:
        self._lock = threading.Lock()
        self._chance = random.Random(seed)
        self._faults: dict[str, Fault] = {}
        self._held: dict[str, list[asyncio.Future[None]]] = {}

    def inject(
        self,
        method: str,
        *,
        code: str | grpc.StatusCode | None = None,
        message: str = "",
        times: int | None = None,
        probability: float = 1.0,
        delay: float = 0.0,
        hang: bool = False,
        lost_answer: bool = False,
        after_messages: int | None = None,
        job_id: str | None = None,
        subject: str | None = None,
        skip: int = 0,
        rate_limit: float | None = None,
        status: int | None = None,
        truncate_at: float | None = None,
        corrupt_at: float | None = None,
        cut_at: float | None = None,
        bytes_per_second: float | None = None,
    ) -> str:
        """Spoil coming calls; returns the fault's id.

        Of several faults that match a call, delays and hangs all happen, in the order of injection; the first that
        decides how the call ends is the last that is looked at.

        :param method: short method name as in :class:`Call`; may hold wildcards (``*``, ``storage.*``).
        :param code: name of the gRPC status to end with.
        :param message: the status' message (HTTP: of the body).
        :param times: how many calls to spoil, None for all.
        :param probability: share of the matching calls to spoil, 0..1.
        :param delay: seconds to wait before the call is handled.
        :param hang: give no answer until the client's deadline or disconnect, or the fault's removal (the call then
            goes on).
        :param lost_answer: let the handler run and have its effect, but end with ``code`` (default UNAVAILABLE).
        :param after_messages: streams: end after this many messages, with ``code``, or cleanly if that is None.
        :param job_id: only calls whose request names this job (as ``job_id`` or ``source_job_id``) or operation.
        :param subject: only calls of this account.
        :param skip: let this many matching calls pass first.
        :param rate_limit: calls per second; those beyond it end with RESOURCE_EXHAUSTED (or ``code``).
        :param status: storage and metadata: answer with this HTTP status.
        :param truncate_at: storage: share of the body (0..1) after which it ends as if it were complete: a GET
            announces that shorter length, a PUT is refused with 400 BadDigest.
        :param corrupt_at: storage: place in the body (0..1) where one byte is changed (PUT: then 400 BadDigest).
        :param cut_at: storage: share of the body (0..1) after which the connection is closed.
        :param bytes_per_second: storage: speed of the body.

        An effect on bodies, statuses or messages leaves the calls alone that have none, whatever ``method`` says.
        :raises ValueError: a value is out of range, or the fault would do nothing.
        """
        code_name = code.name if isinstance(code, grpc.StatusCode) else code
        if code_name is not None and (code_name == "OK" or code_name not in grpc.StatusCode.__members__):
            raise ValueError(f"code={code_name!r}: must be the name of a gRPC error status, such as UNAVAILABLE.")
        for name, share in (("truncate_at", truncate_at), ("corrupt_at", corrupt_at), ("cut_at", cut_at)):
            if share is not None and not 0.0 <= share <= 1.0:
                raise ValueError(f"{name}={share}: must be a share of the body, 0..1.")
        for name, positive in (("rate_limit", rate_limit), ("bytes_per_second", bytes_per_second)):
            if positive is not None and positive <= 0:
                raise ValueError(f"{name}={positive}: must be above 0.")
        if not 0.0 <= probability <= 1.0:
            raise ValueError(f"probability={probability}: must be 0..1.")
        if status is not None and not 200 <= status <= 599:
            raise ValueError(f"status={status}: must be an HTTP status, 200..599.")
        fault = Fault(
            id=uuid.uuid4().hex[:12],
            method=method,
            code=code_name,
            message=message,
            times=times,
            probability=probability,
            delay=delay,
            hang=hang,
            lost_answer=lost_answer,
            after_messages=after_messages,
            job_id=job_id,
            subject=subject,
            skip=skip,
            rate_limit=rate_limit,
            status=status,
            truncate_at=truncate_at,
            corrupt_at=corrupt_at,
            cut_at=cut_at,
            bytes_per_second=bytes_per_second,
        )
        if not (fault.ends_call or hang or delay > 0):
            raise ValueError(f"A fault of {method} that does nothing: give code, delay, hang or another effect.")
        if not any(wildcard in method for wildcard in "*?[") and not fault.suits(method):
            raise ValueError(f"A fault of {method} with an effect that this method can't have.")
        with self._lock:
            self._faults[fault.id] = fault
        return fault.id

    def remove(self, id: str) -> None:
        """Take a fault away and let go the calls that hang in it; KeyError if there is none with this id."""
        with self._lock:
            del self._faults[id]
            held = self._held.pop(id, [])
        for future in held:
            _release(future)

    def clear(self) -> None:
        """Take all faults away and let go the calls that hang in them."""
        with self._lock:
            self._faults.clear()
            held = [future for futures in self._held.values() for future in futures]
            self._held.clear()
        for future in held:
            _release(future)

    def active(self) -> list[dict[str, Any]]:
        """The faults that can still strike or hold a call, oldest first, with how often they ``matched`` and ``fired``.

        Fields that have their default value are left out.
        """
        with self._lock:
            return [
                {
                    field.name: getattr(fault, field.name)
                    for field in dataclasses.fields(fault)
                    if not field.name.startswith("_")
                    and (
                        field.name in ("id", "method", "matched", "fired")
                        or getattr(fault, field.name) != field.default
                    )
                }
                for fault in self._faults.values()
                if fault.times is None or fault.fired < fault.times or self._held.get(fault.id)
            ]

    def _strike(self, call: Call, names: set[str]) -> list[Fault]:
        struck = []
        with self._lock:
            for fault in self._faults.values():
                if (
                    fnmatch.fnmatchcase(call.method, fault.method)
                    and fault.suits(call.method)
                    and (fault.job_id is None or fault.job_id in names)
                    and (fault.subject is None or fault.subject == call.subject)
                    and fault._strikes(self._chance)
                ):
                    struck.append(fault)
                    if fault.ends_call:
                        break
        return struck

    async def apply(self, call: Call) -> Fault | None:
        """Wait as the matching faults want it; returns the one that decides how the call ends, if any."""
        request = call.request or {}
        names = {call.job_id, call.operation_id, request.get("job_id"), request.get("source_job_id")}
        decisive = None
        for fault in self._strike(call, {name for name in names if name}):
            if fault.delay > 0:
                await asyncio.sleep(fault.delay)
            if fault.hang:
                await self._hold(fault)
            if fault.ends_call:
                decisive = fault
        return decisive

    async def _hold(self, fault: Fault) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        with self._lock:
            if fault.id not in self._faults:
                return
            self._held.setdefault(fault.id, []).append(future)
        try:
            await future
        finally:
            with self._lock:
                if future in self._held.get(fault.id, []):
                    self._held[fault.id].remove(future)


def _release(future: asyncio.Future[None]) -> None:
    def release() -> None:
        if not future.done():
            future.set_result(None)

    # A closed loop belongs to an emulator that was stopped meanwhile: the call is gone with it.
    with contextlib.suppress(RuntimeError):
        future.get_loop().call_soon_threadsafe(release)
