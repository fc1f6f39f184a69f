"""What is recorded about a generation's job, so that a later try needs no search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.submission.job_key import Key, Store


@dataclass
class JobRecord:
    """The entry of a :class:`.job_key.Store`, with its keys as fields.

    :param token: of the key that it is about.
    :param retries: the task's ``retries`` when it was written.
    :param request: digest of the request.
    :param arguments: short digests of the request's arguments, by name.
    :param ordinal: see :class:`.decision.Decision`.
    :param job_id: the job; ``None`` while none was created.
    :param uploaded: id of the job whose inputs are uploaded.
    :param operation_id: of Execute.
    :param first_execute_at: when it was first called, epoch seconds.
    :param accepted_at: when it was accepted, epoch seconds.
    :param cancelled: id of the job that the task itself cancelled.
    """

    token: str
    retries: int | None = None
    request: str | None = None
    arguments: Mapping[str, str] | None = None
    ordinal: int | None = None
    job_id: str | None = None
    uploaded: str | None = None
    operation_id: str | None = None
    first_execute_at: float | None = None
    accepted_at: float | None = None
    cancelled: str | None = None

    @classmethod
    def of(cls, entry: Mapping[str, Any] | None, key: Key) -> JobRecord | None:
        """Return the record; ``None`` where there is none, or it is about another generation."""
        if entry is None or entry.get("token") != key.token:
            return None
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in entry.items() if name in names})

    def save(self, store: Store | None) -> None:
        """Write the record; does nothing without a store."""
        if store is not None:
            store.set(asdict(self))
