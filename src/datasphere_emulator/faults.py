"""Fault injection: which coming calls fail, hang or slow down, and how.

``interceptor.JournalInterceptor`` applies faults to gRPC calls, ``http_calls.apply_faults`` to HTTP requests.
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
from typing import TYPE_CHECKING, Any

import grpc

if TYPE_CHECKING:
    from datasphere_emulator.journal import Call

#: Effects on the body of a file.
_BODY_EFFECTS = ("truncate_at", "corrupt_at", "cut_at", "bytes_per_second")
#: Methods that answer with a stream of messages.
_STREAMS = ("ReadLogs", "ReadStdLogs")


@dataclasses.dataclass
class Fault:
    """A fault to inject into coming calls.

    Effects on bodies, HTTP statuses or messages leave calls alone that have none, whatever ``method`` says.

    :param method: short name of the method as in :class:`~datasphere_emulator.journal.Call`; may hold wildcards
        (``*``, ``storage.*``).
    :param code: name of the gRPC status to end with.
    :param message: message of the status (HTTP: of the body).
    :param times: number of calls to inject the fault into; None for all.
    :param probability: share of the matching calls to inject it into, 0..1.
    :param delay: seconds to wait before the call is handled.
    :param hang: give no answer until the client's deadline or disconnect. When the fault is removed, the call is
        handled.
    :param lost_answer: let the handler run and have its effect, but end with ``code`` (default UNAVAILABLE).
    :param after_messages: streams: end after this many messages, with ``code``, or cleanly if that is None.
    :param job_id: only calls whose request names this job (as ``job_id`` or ``source_job_id``) or operation.
    :param project_id: only calls whose request names this project, such as Create and List.
    :param subject: only calls of this account.
    :param skip: number of matching calls to let pass first.
    :param rate_limit: calls per second; further ones end with RESOURCE_EXHAUSTED (or ``code``).
    :param status: storage and metadata: HTTP status to answer with.
    :param truncate_at: storage: share of the body (0..1) after which it ends as if it were complete: a GET announces
        that shorter length, a PUT is rejected with 400 BadDigest.
    :param corrupt_at: storage: place in the body (0..1) where one byte is changed (PUT: then 400 BadDigest).
    :param cut_at: storage: share of the body (0..1) after which the connection is closed.
    :param bytes_per_second: storage: speed of the body.
    :raises ValueError: a value is out of range, or the fault would have no effect.
    """

    id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex[:12], init=False)
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
    project_id: str | None = None
    subject: str | None = None
    skip: int = 0
    rate_limit: float | None = None
    status: int | None = None
    truncate_at: float | None = None
    corrupt_at: float | None = None
    cut_at: float | None = None
    bytes_per_second: float | None = None
    matched: int = dataclasses.field(default=0, init=False)
    fired: int = dataclasses.field(default=0, init=False)
    _allowance: float = dataclasses.field(default=0.0, init=False)
    _allowance_time: float | None = dataclasses.field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.code is not None and (self.code == "OK" or self.code not in grpc.StatusCode.__members__):
            raise ValueError(f"code={self.code!r}: must be the name of a gRPC error status, such as UNAVAILABLE.")
        for name in ("truncate_at", "corrupt_at", "cut_at"):
            share = getattr(self, name)
            if share is not None and not 0.0 <= share <= 1.0:
                raise ValueError(f"{name}={share}: must be a share of the body, 0..1.")
        for name in ("rate_limit", "bytes_per_second"):
            rate = getattr(self, name)
            if rate is not None and rate <= 0:
                raise ValueError(f"{name}={rate}: must be above 0.")
        if not 0.0 <= self.probability <= 1.0:
            raise ValueError(f"probability={self.probability}: must be 0..1.")
        if self.status is not None and not 200 <= self.status <= 599:
            raise ValueError(f"status={self.status}: must be an HTTP status, 200..599.")
        if not (self.ends_call or self.hang or self.delay > 0):
            raise ValueError(f"The fault of {self.method} has no effect: give code, delay, hang or another effect.")
        if not any(wildcard in self.method for wildcard in "*?[") and not self.applies_to(self.method):
            raise ValueError(f"The fault of {self.method} has an effect that this method can't have.")

    @property
    def ends_call(self) -> bool:
        """Whether it decides how the call ends (a delay or a hang alone doesn't)."""
        effects = ("code", "after_messages", "rate_limit", "status", *_BODY_EFFECTS)
        return self.lost_answer or any(getattr(self, name) is not None for name in effects)

    def applies_to(self, method: str) -> bool:
        """Whether this method can have its effects: bodies are storage's, statuses HTTP's, messages streams'."""
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

    def _fires(self, generator: random.Random) -> bool:
        self.matched += 1
        if self.matched <= self.skip or (self.times is not None and self.fired >= self.times):
            return False
        if self.probability < 1.0 and generator.random() >= self.probability:
            return False
        if self.rate_limit is not None and self._within_rate(time.monotonic()):
            return False
        self.fired += 1
        return True


class Faults:
    """The injected faults. Thread-safe: may be changed from any thread while calls run.

    :param seed: seed of the random numbers behind ``probability``.
    """

    def __init__(self, seed: int = 0) -> None:
        self._lock = threading.Lock()
        self._random = random.Random(seed)
        self._faults: dict[str, Fault] = {}
        self._held: dict[str, list[asyncio.Future[None]]] = {}

    def inject(self, method: str, *, code: str | grpc.StatusCode | None = None, **fields: Any) -> str:
        """Inject a fault into coming calls and return its id.

        Of several faults that match a call, all delays and hangs happen, in the order of injection, up to the first
        fault that decides how the call ends.

        :param method: short name of the method, may hold wildcards.
        :param code: gRPC status to end with, or its name.
        :param fields: the other fields of :class:`Fault`.
        :raises ValueError: a value is out of range, or the fault would have no effect.
        """
        return self.add(Fault(method, code.name if isinstance(code, grpc.StatusCode) else code, **fields))

    def add(self, fault: Fault) -> str:
        """Inject this fault and return its id."""
        with self._lock:
            self._faults[fault.id] = fault
        return fault.id

    def remove(self, id: str) -> None:
        """Remove a fault; calls that hang in it are handled now.

        :raises KeyError: there is no fault with this id.
        """
        with self._lock:
            if id not in self._faults:
                raise KeyError(f"There is no fault {id!r}.")
            del self._faults[id]
            held = self._held.pop(id, [])
        for future in held:
            _release(future)

    def clear(self) -> None:
        """Remove all faults; calls that hang in them are handled now."""
        with self._lock:
            self._faults.clear()
            held = [future for futures in self._held.values() for future in futures]
            self._held.clear()
        for future in held:
            _release(future)

    def active(self) -> list[dict[str, Any]]:
        """The faults that can still fire or hold a call, oldest first, with how often they ``matched`` and ``fired``.

        Fields with their default value are left out.
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

    def _matching(self, call: Call, names: set[str]) -> list[Fault]:
        found = []
        with self._lock:
            for fault in self._faults.values():
                if (
                    fnmatch.fnmatchcase(call.method, fault.method)
                    and fault.applies_to(call.method)
                    and (fault.job_id is None or fault.job_id in names)
                    and (fault.project_id is None or fault.project_id == (call.request or {}).get("project_id"))
                    and (fault.subject is None or fault.subject == call.subject)
                    and fault._fires(self._random)
                ):
                    found.append(fault)
                    if fault.ends_call:
                        break
        return found

    async def apply(self, call: Call) -> Fault | None:
        """Wait out delays and hangs of matching faults; return the fault that decides how the call ends, if any."""
        request = call.request or {}
        names = {call.job_id, call.operation_id, request.get("job_id"), request.get("source_job_id")}
        ending = None
        for fault in self._matching(call, {name for name in names if name}):
            if fault.delay > 0:
                await asyncio.sleep(fault.delay)
            if fault.hang:
                await self._hold(fault)
            if fault.ends_call:
                ending = fault
        return ending

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
