"""The event of the trigger, as operator and sensor read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from airflow_provider_datasphere.exceptions import DataSphereError

JobEventStatus = Literal["ended", "started", "not_started", "start_timeout", "timeout", "lost"]


@dataclass(frozen=True)
class JobEvent:
    """How the deferred wait for a job ended.

    :param status: ``"ended"``: the job is over; ``"started"``: it runs, and the trigger doesn't watch it;
        ``"not_started"``: it waits for room no longer, and can't be started; ``"start_timeout"``: it wasn't computing
        when ``start_timeout`` passed; ``"timeout"``: the deadline has passed; ``"lost"``: the job can't be monitored
        any more.
    :param link: the job's page.
    :param message: details, for people.
    :param cancelled: whether the trigger has cancelled the job, after a timeout.
    :param first_execute_at: when Execute was first called, epoch seconds; ``None``: not known.
    :param accepted_at: when it was accepted, epoch seconds; ``None``: not known, or never.
    :param queued: whether the trigger started the job, which had waited for room.
    :param error: after ``"not_started"``: the client error that ends the try; ``None``: the task submits the job anew.
    """

    status: JobEventStatus
    job_id: str
    operation_id: str | None = None
    link: str | None = None
    message: str = ""
    cancelled: bool = False
    first_execute_at: float | None = None
    accepted_at: float | None = None
    queued: bool = False
    error: str | None = None

    @classmethod
    def parse(cls, event: Mapping[str, Any] | None) -> JobEvent:
        """Read a trigger event; unknown fields, of a later version, are ignored.

        :raises DataSphereError: it isn't an event of :class:`.jobs.DataSphereJobTrigger`.
        """
        given = event or {}
        if given.get("status") not in get_args(JobEventStatus) or not given.get("job_id"):
            raise DataSphereError(f"Unexpected trigger event: {event!r}.")
        return cls(**{field.name: given[field.name] for field in fields(cls) if field.name in given})
