"""Our client against each setting of the emulator, every way: what nobody knows of the service must not matter."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_datasphere.client.connection.settings import Settings as ConnectionSettings
from airflow_provider_datasphere.client.errors import (
    DataSphereError,
    JobCancelledError,
    JobFailedError,
    JobInfrastructureError,
)
from airflow_provider_datasphere.client.model import JobHandle
from airflow_provider_datasphere.client.monitoring import logs as logs_module
from airflow_provider_datasphere.client.monitoring.outcome import OutcomePolicy, evaluate_outcome
from airflow_provider_datasphere.client.monitoring.watch import watch
from airflow_provider_datasphere.client.submission import capacity
from airflow_provider_datasphere.client.sync_client import DataSphereClient, Job
from datasphere_emulator import Emulator, Script, Settings
from generations import DictStore, Generation
from harness.settings_scenarios import SETTINGS_SCENARIOS
from stub_client import Client, raises_status
from waits import wait_until
from watching import Watcher

LINES = ["first", "second", "last"]
PROGRAM = (
    "echo first; cat ${IN} > ${OUT}; echo ${WORD} >> ${OUT}; sleep ${PAUSE}; echo second; sleep ${PAUSE}; echo last"
)
NEW, OLD = "new input\n", "old input\n"

#: Every value of these that a client can tell apart, except the default: it is played too, once.
WAYS: Mapping[str, list[Any]] = {
    "idempotency": [False],
    "clone_env_vars": ["merge"],
    "clone_empty_name": ["empty"],
    "clone_empty_desc": ["empty"],
    "clone_requires_started_source": [True],
    "clone_seconds": [0.5],
    "new_jobs_visible": ["when_done"],
    "stored_uploads": ["empty_url"],
    "upload_order": ["declared"],
    "unset_data_ttl": ["infinite"],
    "default_data_ttl_seconds": [3600.0],
    "unique_names": [True],
    "max_name_length": [63],
    "max_desc_length": [200],
    "allowed_instance_types": [["c1.4"]],
    "unavailable_instance_types": [["g2.2"]],
    "quota_code": ["UNAVAILABLE"],
    "refused_job": ["error"],
    "execute_finished": ["failed_precondition"],
    "cancel_finished": ["ok"],
    "creating_seconds": [0.4],
    "preparing_seconds": [0.4],
    "uploading_seconds": [0.4],
    "cancelling_seconds": [0.4],
    "status_after_nonzero_exit": ["SUCCESS"],
    "status_after_failed_upload": ["SUCCESS"],
    "outputs_after_error": ["never"],
    "outputs_after_cancel": ["graceful", "never"],
    "cancelled_operation_code": ["ABORTED"],
    "read_role": ["developer"],
    "operation_retention_seconds": [0.0],
    "url_lifetime_seconds": [1.0],
    "fresh_operation_urls": [True],
    "list_order": ["oldest", "shuffled"],
    "seed": [7],
    "read_logs_of_running_job": ["live", "at_end"],
    "log_delay_seconds": [1.0],
    "log_chunk_bytes": [1],
    "log_stream_seconds": [0.2],
    "log_keepalive_seconds": [0.05],
    "max_concurrent_streams": [3],
}
#: What goes with a setting so that it shows.
ALONG: Mapping[str, dict[str, Any]] = {
    "new_jobs_visible": {"clone_seconds": 0.5},
    "default_data_ttl_seconds": {},
    "refused_job": {"refused_job_seconds": 0.1},
}
#: Turned by tests of their own below, or only together with others.
ELSEWHERE = {
    "max_running_jobs",
    "room_refusals",
    "refused_job_seconds",
    "unavailable_seconds",
    "unavailable_calls",
    "instance_types_checked_by",
}
#: What a client can't see: they change what programs find, or what is kept on the emulator's disk.
UNSEEN = {"job_environment", "project_secrets", "unbuffered_python", "quote_substitutions", "keep_scratch"}

CASES = [pytest.param({}, id="defaults")] + [
    pytest.param({**ALONG.get(name, {}), name: value}, id=f"{name}={value}")
    for name, values in WAYS.items()
    for value in values
]


def test_every_setting_is_turned_here_or_can_not_be_seen() -> None:
    names = {field.name for field in dataclasses.fields(Settings)}
    assert set(WAYS) | ELSEWHERE | UNSEEN == names
    defaults = Settings().to_json()
    assert not [name for name, values in WAYS.items() if defaults[name] in values]


def test_the_scenario_table_has_a_row_for_every_setting_that_can_be_seen_in_a_task() -> None:
    turned = {name for scenario in SETTINGS_SCENARIOS for name in scenario.settings}
    assert turned == set(WAYS) | ELSEWHERE


@dataclasses.dataclass
class Place:
    """An emulator with a source job that has run, and a client of it."""

    emulator: Emulator
    client: DataSphereClient
    source: str
    folder: Path
    messages: Callable[[], list[str]]

    def watcher(self, *, asynchronous: bool = True) -> Watcher:
        return Watcher(self.emulator, asynchronous, logging.getLogger("watcher"))

    @property
    def input(self) -> str:
        path = self.folder / "new.txt"
        path.write_text(NEW)
        return str(path)

    def fork(self, source: str | None = None, **overrides: Any) -> Job:
        return self.client.fork_job(source or self.source, **overrides)

    def scripted(self, script: Script, **fields: Any) -> str:
        """A source job that has begun, since the service may fork only such."""
        job_id = self.emulator.create_scripted_job(script, outputs=["out.txt"], execute=True, **fields)
        self.emulator.wait_job(job_id, "EXECUTING" if script.never_ends else None)
        return job_id

    def outcome_by_id_alone(self, job_id: str) -> DataSphereError | None:
        """What a sensor that knows nothing else makes of an ended job."""
        ended = watch(self.client, JobHandle(job_id), poll_interval=0.05)
        return evaluate_outcome(job_id, ended.operation, ended.job, OutcomePolicy()).error

    def downloaded(self, job_id: str) -> dict[str, str]:
        folder = self.folder / f"from {job_id}"
        self.client.download_job_files(job_id, output_dir=folder)
        return {path.name: path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs_module, "SILENCE_SECONDS", 1.0)
    monkeypatch.setattr(capacity, "MAX_ROOM_PAUSE_SECONDS", 0.2)
    monkeypatch.setattr(capacity, "MAX_INSTANCE_TYPES_PAUSE_SECONDS", 0.2)


@pytest.fixture
def place(
    request: pytest.FixtureRequest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> Iterator[Callable[[Mapping[str, Any]], Place]]:
    """Makes the place for some settings."""
    waiting = "airflow_provider_datasphere.client.sync_client"
    caplog.set_level(logging.INFO, logger=waiting)
    opened: list[Any] = []

    def make(settings: Mapping[str, Any]) -> Place:
        starting = {name: settings[name] for name in ("max_concurrent_streams",) if name in settings}
        emulator = Emulator(Settings(**starting), tls=False)
        emulator.start()
        opened.append(emulator)
        source = emulator.create_job(
            PROGRAM,
            files={"in.txt": OLD},
            inputs=[("in.txt", "IN")],
            outputs=[("out.txt", "OUT")],
            args={"WORD": "old", "PAUSE": "0"},
            env_vars={"KEPT": "1"},
            name="source",
            desc="the source",
            execute=True,
        )
        emulator.wait_job(source)
        emulator.settings.update(settings)
        client = DataSphereClient(ConnectionSettings.from_extra(emulator.connection_extra()))
        opened.append(client)
        return Place(
            emulator,
            client,
            source,
            tmp_path,
            lambda: [r.message for r in caplog.records if r.name.endswith(".sync_client")],
        )

    yield make
    for thing in reversed(opened):
        thing.close()


Make = Callable[[Mapping[str, Any]], Place]


@pytest.mark.parametrize("settings", CASES)
def test_a_job_is_run_seen_downloaded_and_found_again(place: Make, settings: Mapping[str, Any]) -> None:
    here = place(settings)
    # Names that the source doesn't have, for a service that wants them unique.
    generation = Generation(here.emulator, here.client, here.source, None, vars={"IN": here.input})
    arguments = {"WORD": "key", "PAUSE": "0.1"}
    first = generation.try_once(args=arguments, name="another")
    job = here.fork(args={"WORD": "word"}, vars={"IN": here.input}, env_vars={"MORE": "2"}, name="a fork")

    result = job.wait(poll_interval=0.1)
    assert (result.job_id, result.status, result.return_code) == (job.id, "SUCCESS", 0)
    told = here.messages()
    assert [line for line in told if line in LINES][-len(LINES) :] == LINES, told
    assert here.downloaded(job.id) == {"out.txt": f"{NEW}word\n"}

    # A later try of the other task finds its job; so does one that has a store.
    for store in (None, DictStore()):
        generation.store = store
        again = generation.try_once(args=arguments, name="another")
        assert (again.reattached, again.handle.job_id) == (True, first.handle.job_id)
    ended = watch(here.client, again.handle, poll_interval=0.1)
    assert evaluate_outcome(first.handle.job_id, ended.operation, ended.job, OutcomePolicy()).result.return_code == 0
    assert here.downloaded(first.handle.job_id) == {"out.txt": f"{NEW}key\n"}

    # A sensor that knows the job alone, with the log of an ended job.
    watcher = here.watcher()
    seen = watcher.wait(JobHandle(job.id))
    assert (seen.status, seen.return_code) == ("SUCCESS", 0)
    assert watcher.of("stdout") == LINES
    assert len(here.emulator.jobs(parent=here.source)) == 2
    assert [here.emulator.executions(id) for id in (job.id, first.handle.job_id)] == [1, 1]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["threads", "asyncio"])
@pytest.mark.parametrize(
    "settings",
    [case for case in CASES if "log" in str(case.id) or case.id == "defaults"],
)
def test_a_log_that_is_read_from_its_middle_is_complete(
    place: Make, settings: Mapping[str, Any], asynchronous: bool
) -> None:
    here = place(settings)
    job_id = here.fork(args={"PAUSE": "0.4"}, vars={"IN": here.input}).id
    here.emulator.wait_job(job_id, "EXECUTING")
    # The first lines are out, the last one isn't.
    wait_until(lambda: b"second" in b"".join(content for _, _, content in here.emulator.log_text(job_id)))
    watcher = here.watcher(asynchronous=asynchronous)
    assert watcher.wait(JobHandle(job_id, here.emulator.operation_of(job_id))).status == "SUCCESS"
    told = watcher.of("stdout")
    assert told[-len(LINES) :] == LINES, told
    if settings.get("read_logs_of_running_job") != "live":
        assert told == LINES


@pytest.mark.parametrize(
    "settings",
    [case for case in CASES if not str(case.id).startswith(("log_", "read_logs", "list_", "url_", "fresh_"))],
)
def test_ends_are_told_apart(place: Make, settings: Mapping[str, Any]) -> None:
    """A program that fails, one that is cancelled, and an output that can't be stored."""
    here = place(settings)
    sources = {
        "failed": here.scripted(Script(return_code=3)),
        "cancelled": here.scripted(Script(never_ends=True)),
        "not stored": here.scripted(Script(failed_uploads=["out.txt"])),
    }
    jobs = {name: here.fork(source, name=name) for name, source in sources.items()}
    here.emulator.wait_job(jobs["cancelled"].id, "EXECUTING")
    here.emulator.cancel_job(jobs["cancelled"].id, reason="enough")

    with pytest.raises(JobFailedError, match="code 3") as failed:
        jobs["failed"].wait(poll_interval=0.05)
    assert type(failed.value) is JobFailedError
    with pytest.raises(JobCancelledError, match="enough"):
        jobs["cancelled"].wait(poll_interval=0.05)
    with pytest.raises(JobInfrastructureError, match=r"couldn't store outputs.*out\.txt"):
        jobs["not stored"].wait(poll_interval=0.05)

    if settings.get("status_after_nonzero_exit") != "SUCCESS":  # the job alone tells no return code
        assert type(here.outcome_by_id_alone(jobs["failed"].id)) is JobFailedError
    assert type(here.outcome_by_id_alone(jobs["cancelled"].id)) is JobCancelledError
    assert type(here.outcome_by_id_alone(jobs["not stored"].id)) is JobInfrastructureError


# Room


def afterwards(seconds: float, function: Callable[..., object], *arguments: Any) -> None:
    threading.Timer(seconds, function, arguments).start()


@pytest.mark.parametrize(
    ("rule", "code"), [("stays", "RESOURCE_EXHAUSTED"), ("stays", "UNAVAILABLE"), ("error", "RESOURCE_EXHAUSTED")]
)
def test_a_job_without_room_runs_when_there_is_some(place: Make, rule: str, code: str) -> None:
    here = place({"refused_job": rule, "refused_job_seconds": 0.3, "max_running_jobs": 0, "quota_code": code})
    afterwards(1.5, here.emulator.settings.update, {"max_running_jobs": None})
    job = here.fork(vars={"IN": here.input})
    assert job.wait(poll_interval=0.1).return_code == 0
    ran = [fork.id for fork in here.emulator.jobs(parent=here.source) if here.emulator.executions(fork.id)]
    assert ran == [job.id]


def test_a_sensor_tells_a_job_that_never_ran_from_one_that_failed(place: Make) -> None:
    here = place({"refused_job": "error", "refused_job_seconds": 0.1, "max_running_jobs": 0})
    service = Client(here.emulator)  # ours would go on asking for room
    job_id = service.fork(here.source)
    with raises_status("RESOURCE_EXHAUSTED", "quota exhausted"):
        service.call("Execute", job_id=job_id)
    here.emulator.wait_job(job_id, "ERROR")
    for asynchronous in (False, True):
        result = here.watcher(asynchronous=asynchronous).wait(JobHandle(job_id))
        assert (result.status, result.return_code, result.started_at) == ("ERROR", None, None)
    error = here.outcome_by_id_alone(job_id)
    assert type(error) is JobInfrastructureError
    assert "no capacity" in str(error)


@pytest.mark.parametrize("method", ["Clone", "Execute"])
@pytest.mark.parametrize("limit", [{"unavailable_calls": 2}, {"unavailable_seconds": 0.5}], ids=["calls", "seconds"])
def test_instance_types_that_come_back(place: Make, method: str, limit: dict[str, Any]) -> None:
    refused = {"unavailable_instance_types": ["c1.4"], "instance_types_checked_by": [method], **limit}
    here = place(refused)
    job = here.fork(vars={"IN": here.input})
    assert job.wait(poll_interval=0.1).return_code == 0
    assert len(here.emulator.jobs(parent=here.source)) == 1
    assert here.emulator.journal.count(method, code="INVALID_ARGUMENT") >= 1


@pytest.mark.parametrize("method", ["Clone", "Execute"])
def test_instance_types_that_stay_away(place: Make, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    monkeypatch.setattr(capacity, "INSTANCE_TYPES_SECONDS", 1.0)
    here = place({"unavailable_instance_types": ["c1.4"], "instance_types_checked_by": [method]})
    with pytest.raises(JobInfrastructureError, match="not available for your community"):
        here.fork(vars={"IN": here.input})
    assert not [job for job in here.emulator.jobs(parent=here.source) if here.emulator.executions(job.id)]
