"""Identity and callbacks of a submission."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.submission.job_request import DescriptionTagger


def _noop(*_: str) -> None:
    """Ignore the call."""


@dataclass(frozen=True)
class SubmissionIdentity:
    """Whose job is created, and which earlier jobs of the same owner there are.

    :param key: the same for each repetition of the same creation, and for no other; the idempotency key is made of it.
    :param tag: adds the owner's tag to the job's description.
    :param find_unexecuted: finds jobs of this owner that were created and not executed: the effect of calls whose
        answers were lost.
    :param earlier_tries: other tries have been or are under way. An honoured idempotency key may lead to a job of an
        earlier one that is deleted or over, and can't be run, or to one that another try has just started, which is
        this try's too.
    :param superseded: ids of jobs of this owner that, by their status, were never executed; the call is repeated for
        their upload URLs, and those that it doesn't lead to are deleted. Only with ``earlier_tries``.
    """

    key: str
    tag: DescriptionTagger | None = None
    find_unexecuted: Callable[[], Sequence[str]] | None = None
    earlier_tries: bool = False
    superseded: Sequence[str] = ()


@dataclass(frozen=True)
class SubmissionCallbacks:
    """What a submission calls on its way.

    :param require_newest_try: called before a job is recorded and before it is executed; raises if a newer try has
        begun, so that this one must start nothing.
    :param created: called with the ids of the new job and its project as soon as they are known, before anything else
        happens to the job.
    :param uploaded: called with the job's id when all its inputs are uploaded, before Execute.
    """

    require_newest_try: Callable[[], None] = _noop
    created: Callable[[str, str], None] = _noop
    uploaded: Callable[[str], None] = _noop
