"""Both ways to wait for a job, threads and asyncio, behind one call."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from airflow_provider_datasphere.client.async_client import AsyncDataSphereClient
from airflow_provider_datasphere.client.connection.channels import AsyncChannels
from airflow_provider_datasphere.client.connection.settings import Settings
from airflow_provider_datasphere.client.model import JobHandle, JobResult
from airflow_provider_datasphere.client.monitoring.logs import LogLine
from airflow_provider_datasphere.client.monitoring.outcome import OutcomePolicy, evaluate_outcome
from airflow_provider_datasphere.client.monitoring.polling import TerminalState
from airflow_provider_datasphere.client.monitoring.watch import watch
from airflow_provider_datasphere.client.sync_client import DataSphereClient
from datasphere_emulator import Emulator


def has_poll_in_flight(emulator: Emulator) -> bool:
    """Whether a poll of an operation is under way at this moment."""
    return any(call.finished is None for call in emulator.journal.calls("Operation.Get"))


@dataclass
class Watcher:
    """Waits for jobs of an emulator and keeps what it sees."""

    emulator: Emulator
    asynchronous: bool
    log: logging.Logger
    lines: list[LogLine] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def settings(self) -> Settings:
        return Settings.from_extra(self.emulator.connection_extra())

    def run(self, job_id: str, *, operation: bool = True, settings: Settings | None = None, **fields: Any) -> str:
        """Start a job's execution, if it doesn't run, and wait for its end; returns the name of its status."""
        handle = JobHandle(job_id, self.emulator.operation_of(job_id) if operation else None)
        return self.wait(handle, settings=settings, **fields).status

    def wait(
        self,
        handle: JobHandle,
        *,
        settings: Settings | None = None,
        logs: bool = True,
        emit: Callable[[LogLine], None] | None = None,
        poll_interval: float = 0.2,
    ) -> JobResult:
        """Wait for a job's end."""
        chosen = (emit or self.lines.append) if logs else None
        options: dict[str, Any] = {"poll_interval": poll_interval, "emit": chosen, "logger": self.log}
        begin = time.monotonic()
        try:
            ended = self._ended(settings or self.settings, handle, options)
        finally:
            self.seconds = time.monotonic() - begin
        return evaluate_outcome(handle.job_id, ended.operation, ended.job, OutcomePolicy()).result

    def _ended(self, settings: Settings, handle: JobHandle, options: dict[str, Any]) -> TerminalState:
        if not self.asynchronous:
            client = DataSphereClient(settings)
            try:
                return watch(client, handle, **options)
            finally:
                client.close()

        async def wait() -> TerminalState:
            channels = AsyncChannels(settings)
            try:
                return await AsyncDataSphereClient(channels, settings).watch(handle, **options)
            finally:
                await channels.close()

        return asyncio.run(wait())

    @property
    def texts(self) -> list[str]:
        """The lines as people see them."""
        return [str(line) for line in self.lines]

    def of(self, stream: str) -> list[str]:
        """The lines of one stream."""
        return [line.text for line in self.lines if line.stream == stream]
