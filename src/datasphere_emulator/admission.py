"""Admission of jobs: quotas, and instance types that are unavailable for a while or not allowed."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING

from datasphere_emulator.errors import StatusError, invalid

if TYPE_CHECKING:
    from yandex.cloud.datasphere.v2.jobs import jobs_pb2

    from datasphere_emulator.settings import Settings


@dataclasses.dataclass
class _Rejections:
    """Number of rejected calls of an account, and time of the first (monotonic seconds)."""

    count: int = 0
    since: float = dataclasses.field(default_factory=time.monotonic)


class Admission:
    """Rejects calls as the settings say. Its counts start from zero after a restart."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._rejections: dict[tuple[str, str | None], _Rejections] = {}

    def check_instance_types(self, method: str, subject: str | None, parameters: jobs_pb2.JobParameters) -> None:
        """Check the instance types of a call.

        :param method: ``Create``, ``Clone`` or ``Execute``.
        :raises StatusError: INVALID_ARGUMENT, an instance type is unavailable or not allowed.
        """
        settings = self._settings
        if method not in settings.instance_types_checked_by:
            return
        names = [kind.name for kind in parameters.cloud_instance_types]
        allowed = settings.allowed_instance_types
        wrong = [name for name in names if allowed is not None and name not in allowed]
        unavailable = [name for name in names if name in settings.unavailable_instance_types]
        if unavailable and self._rejects(
            f"{method}: instance types", subject, settings.unavailable_calls, settings.unavailable_seconds
        ):
            wrong += [name for name in unavailable if name not in wrong]
        if wrong:
            raise invalid(f"Instance types {', '.join(wrong)} are not available for your community")

    def check_quota(self, subject: str | None, running: int) -> StatusError | None:
        """Return the error if one more job can't run now, None if it can.

        :param running: number of running jobs of the project.
        """
        limit = self._settings.max_running_jobs
        if limit is not None and running >= limit:
            return self.quota_error(f": {running} of {limit} run.")
        return self.quota_error() if self._rejects("quota", subject, self._settings.room_refusals, None) else None

    def quota_error(self, more: str = "") -> StatusError:
        """Return the error of an Execute beyond the quota."""
        return StatusError(self._settings.quota_code, f"Job execution quota exhausted{more}")

    def _rejects(self, what: str, subject: str | None, calls: int | None, seconds: float | None) -> bool:
        """Count one more rejected call, unless the limit of calls or seconds is reached."""
        rejections = self._rejections.setdefault((what, subject), _Rejections())
        if (calls is not None and rejections.count >= calls) or (
            seconds is not None and time.monotonic() - rejections.since >= seconds
        ):
            return False
        rejections.count += 1
        return True
