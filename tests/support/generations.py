"""A task's generation for tests of what its tries do: they share the service, and a store if there is one."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from yandex.cloud.datasphere.v2.jobs import jobs_pb2

from airflow_provider_datasphere.client.configuration.overlay import Overlay
from airflow_provider_datasphere.client.configuration.read import ConfigSource
from airflow_provider_datasphere.client.monitoring.outcome import OutcomePolicy, evaluate_outcome
from airflow_provider_datasphere.client.monitoring.watch import watch
from airflow_provider_datasphere.client.submission.context import SubmissionCallbacks
from airflow_provider_datasphere.client.submission.fork import Fork
from airflow_provider_datasphere.client.submission.fork_request import ForkRequest
from airflow_provider_datasphere.client.submission.job_key import Key
from airflow_provider_datasphere.client.submission.job_request import JobRequest
from airflow_provider_datasphere.client.submission.new_job import NewJob
from airflow_provider_datasphere.client.submission.reattach import SubmittedJob, get_or_create_job
from airflow_provider_datasphere.client.submission.request_digest import request_digest
from airflow_provider_datasphere.client.sync_client import DataSphereClient
from datasphere_emulator import Emulator


class Crash(BaseException):
    """The worker dies here."""


@dataclass
class DictStore:
    """A store that survives the tries, and may die after so many writes."""

    entry: dict[str, Any] | None = None
    writes: int = 0
    dies_at: int | None = None

    def get(self) -> dict[str, Any] | None:
        return None if self.entry is None else dict(self.entry)

    def set(self, entry: dict[str, Any]) -> None:
        self.entry = dict(entry)
        self.writes += 1
        if self.writes == self.dies_at:
            raise Crash


@dataclass
class Generation:
    """One generation of a task: its key, and tries that share nothing but the service (and a store)."""

    emulator: Emulator
    client: DataSphereClient
    source: str
    store: DictStore | None
    key: Key = field(
        default_factory=lambda: Key(
            ("dag", "run", "task", -1, 2), "dag.task run", retries=2, since=datetime.now(timezone.utc)
        )
    )
    vars: dict[str, str] = field(default_factory=dict)
    tries: int = 0
    policy: OutcomePolicy = field(default_factory=OutcomePolicy)

    def try_once(self, **overrides: Any) -> SubmittedJob:
        self.tries += 1
        callbacks = {name: overrides.pop(name) for name in ("created", "uploaded") if name in overrides}
        return get_or_create_job(
            self.client,
            self.request(**overrides),
            self.key,
            store=self.store,
            search_existing=self.tries > 1,
            policy=self.policy,
            callbacks=SubmissionCallbacks(**callbacks),
            poll_interval=0.1,
        )

    def request(self, **overrides: Any) -> JobRequest:
        """What a try wants to run."""
        return Fork(self.client, ForkRequest(**{"source_job_id": self.source, "vars": self.vars, **overrides}))

    def tag_description(self, desc: str) -> str:
        return self.key.tag_description(desc, request_digest(ForkRequest(self.source, vars=self.vars)))

    def run(self) -> int | None:
        """A whole try; returns the program's return code."""
        handle = self.try_once().handle
        ended = watch(self.client, handle, poll_interval=0.1)
        return evaluate_outcome(handle.job_id, ended.operation, ended.job, OutcomePolicy()).result.return_code

    @property
    def jobs(self) -> list[jobs_pb2.Job]:
        return self.emulator.jobs(self.source)

    def one_job_ran_once(self, job_id: str | None = None) -> None:
        (job,) = self.jobs
        assert job_id in (None, job.id)
        assert self.emulator.executions(job.id) == 1


@dataclass
class NewJobGeneration(Generation):
    """The same of a task that makes a new job; ``source`` is the name of its jobs.

    :param config: keys of its config.yaml.
    """

    config: dict[str, Any] = field(default_factory=dict)
    folder: Path = Path()

    def request(self, **overrides: Any) -> JobRequest:
        config = {"name": self.source, "cmd": "scripted ${RANGE}", "args": {"RANGE": "1"}, **self.config}
        return NewJob(self.client, None, ConfigSource(config, self.folder), Overlay(**overrides))

    @property
    def jobs(self) -> list[jobs_pb2.Job]:
        return [job for job in self.emulator.jobs() if job.name == self.source]
