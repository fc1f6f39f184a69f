"""Exactly one new job per key: the ways to die that differ from a fork's, since there is no source job."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from yandex.cloud.datasphere.v2.jobs import jobs_pb2
from yandex.cloud.datasphere.v2.jobs import project_job_service_pb2 as service_pb2

from airflow_provider_datasphere.client.errors import JobInfrastructureError
from airflow_provider_datasphere.client.http.client import HttpClient
from airflow_provider_datasphere.client.submission.job_key import Key
from airflow_provider_datasphere.client.sync_client import DataSphereClient
from datasphere_emulator import Emulator, Script
from generations import Crash, DictStore, NewJobGeneration

QUICK = Script(executing_seconds=0.05)
ENDLESS = Script(never_ends=True)
NAME = "nightly"

Begin = Callable[..., NewJobGeneration]


@pytest.fixture(params=[True, False], ids=["key-honoured", "key-ignored"])
def idempotency(request: pytest.FixtureRequest, emulator: Emulator) -> None:
    emulator.settings.idempotency = request.param


@pytest.fixture(params=[True, False], ids=["store", "list"])
def store(request: pytest.FixtureRequest) -> DictStore | None:
    return DictStore() if request.param else None


@pytest.fixture
def begin(emulator: Emulator, client: DataSphereClient, store: DictStore | None, tmp_path: Path) -> Begin:
    """Begins a generation: the script of the job, and whether it uploads something."""

    def begin(script: Script | list[Script] = QUICK, *, inputs: bool = True) -> NewJobGeneration:
        emulator.script_new_jobs(NAME, script)
        (tmp_path / "data.csv").write_text("3,4")
        (tmp_path / "requirements.txt").write_text("")
        (tmp_path / "package").mkdir(exist_ok=True)
        (tmp_path / "package" / "main.py").write_text("print(1)")
        python = {"type": "manual", "version": "3.11", "requirements-file": "requirements.txt"}
        config: dict[str, Any] = {}
        if inputs:
            config = {
                "inputs": [{"data.csv": "DATA"}, "requirements.txt"],
                "env": {"python": {**python, "local-paths": ["package"]}},
            }
        return NewJobGeneration(emulator, client, NAME, store, config=config, folder=tmp_path)

    return begin


def all_is_uploaded(generation: NewJobGeneration) -> None:
    """What the job was made for is stored, byte for byte."""
    (job,) = generation.jobs
    files = [*job.job_parameters.input_files, *job.job_parameters.env.python_env.local_modules]
    for file in files:
        stored = generation.emulator.state.storage.path(job.project_id, file.sha256).read_bytes()
        assert (hashlib.sha256(stored).hexdigest(), len(stored)) == (file.sha256, file.size_bytes)


STEPS = [
    "before Create",
    "Create answered",
    "created",
    "first upload",
    "uploaded",
    "before Execute",
    "Execute answered",
]


def die_at(step: str, client: DataSphereClient, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Have the next try die at this step; returns arguments of the try."""

    def die(*_: Any, **__: Any) -> None:
        raise Crash

    if step in ("created", "uploaded"):
        return {step: die}
    real, put = client.channels.unary, HttpClient.put

    def unary(service: Any, method: str, *arguments: Any, **options: Any) -> Any:
        if step == f"before {method}":
            raise Crash
        answer = real(service, method, *arguments, **options)
        if step == f"{method} answered":
            raise Crash
        return answer

    def dying_put(*arguments: Any, **options: Any) -> None:
        put(*arguments, **options)
        raise Crash

    if step == "first upload":
        patch.setattr(HttpClient, "put", dying_put)
    else:
        patch.setattr(client.channels, "unary", unary)
    return {}


@pytest.mark.usefixtures("idempotency")
@pytest.mark.parametrize("inputs", [False, True], ids=["no-inputs", "inputs"])
@pytest.mark.parametrize("step", STEPS)
def test_a_try_may_die_anywhere(
    begin: Begin, emulator: Emulator, client: DataSphereClient, monkeypatch: pytest.MonkeyPatch, step: str, inputs: bool
) -> None:
    if step == "first upload" and not inputs:
        pytest.skip("nothing is uploaded")
    generation = begin(ENDLESS, inputs=inputs)
    with monkeypatch.context() as patch, pytest.raises(Crash):
        generation.try_once(**die_at(step, client, patch))
    handle = generation.try_once().handle
    assert handle.operation_id == emulator.operation_of(handle.job_id)
    generation.one_job_ran_once(handle.job_id)
    all_is_uploaded(generation)


@pytest.mark.usefixtures("idempotency")
@pytest.mark.parametrize("store", [False], indirect=True, ids=["list"])
def test_a_try_may_die_in_a_project_of_two_thousand_jobs(
    begin: Begin, emulator: Emulator, client: DataSphereClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2000):
        emulator.create_scripted_job(QUICK, name=f"other {number}")
    for number, step in enumerate(("created", "first upload", "Execute answered")):
        generation = begin(ENDLESS)
        generation.source = f"{NAME} {number}"
        emulator.script_new_jobs(generation.source, ENDLESS)
        (generation.folder / "data.csv").write_text(step)  # nothing that is stored already
        generation.key = Key(("dag", "run", step), "dag.task run", 2, generation.key.since)
        with monkeypatch.context() as patch, pytest.raises(Crash):
            generation.try_once(**die_at(step, client, patch))
        handle = generation.try_once().handle
        generation.one_job_ran_once(handle.job_id)
        all_is_uploaded(generation)
    assert len(emulator.jobs()) == 2003


@pytest.mark.usefixtures("idempotency")
def test_a_create_whose_answer_got_lost(begin: Begin, emulator: Emulator) -> None:
    generation = begin(ENDLESS)
    emulator.faults.inject("Create", lost_answer=True, times=2)
    handle = generation.try_once().handle
    generation.one_job_ran_once(handle.job_id)
    all_is_uploaded(generation)


@pytest.mark.usefixtures("idempotency")
def test_a_success_is_adopted(begin: Begin, emulator: Emulator) -> None:
    generation = begin()
    first = generation.try_once().handle
    emulator.wait_job(first.job_id)
    assert generation.try_once().handle.job_id == first.job_id
    generation.one_job_ran_once()


def test_a_failed_program_is_followed_by_a_new_job(begin: Begin) -> None:
    generation = begin([Script(return_code=1), Script(return_code=0)])
    assert [generation.run() for _ in range(2)] == [1, 0]
    assert len(generation.jobs) == 2


def test_an_input_that_changed_is_another_job(begin: Begin, emulator: Emulator) -> None:
    """An ended job of other bytes isn't this one's result; one that runs is attached to."""
    generation = begin()
    first = generation.try_once().handle
    emulator.wait_job(first.job_id)
    (generation.folder / "data.csv").write_text("5,6")
    second = generation.try_once()
    assert second.handle.job_id != first.job_id
    (generation.folder / "package" / "main.py").write_text("print(2)")
    emulator.wait_job(second.handle.job_id)
    assert generation.try_once().handle.job_id not in (first.job_id, second.handle.job_id)


def test_the_same_modules_are_the_same_bytes(begin: Begin, emulator: Emulator) -> None:
    """On another worker they have other times; the job isn't taken for another one."""
    generation = begin()
    first = generation.try_once().handle
    emulator.wait_job(first.job_id)
    module = generation.folder / "package" / "main.py"
    module.write_text(module.read_text())
    (generation.folder / "package" / "__pycache__").mkdir()
    (generation.folder / "package" / "__pycache__" / "main.pyc").write_bytes(b"-")
    assert generation.try_once().handle.job_id == first.job_id


def test_what_changed_is_named(begin: Begin, caplog: pytest.LogCaptureFixture) -> None:
    generation = begin(ENDLESS)
    first = generation.try_once().handle
    generation.config["cmd"] = "another ${RANGE}"
    (generation.folder / "data.csv").write_text("5,6")
    with caplog.at_level(logging.INFO):
        assert generation.try_once(args={"RANGE": "2"}).handle.job_id == first.job_id
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    for name in ("cmd", "args['RANGE']", "vars['DATA']"):
        assert name in warning


def test_a_comment_is_no_other_job(begin: Begin) -> None:
    generation = begin(ENDLESS)
    digest = generation.request().comparable_arguments()
    generation.config["desc"] = ""
    assert generation.request().comparable_arguments() == digest


def test_a_fork_of_the_tasks_job_is_not_its_own(begin: Begin, emulator: Emulator) -> None:
    generation = begin(QUICK)
    first = generation.try_once().handle
    emulator.wait_job(first.job_id)
    job = emulator.job(first.job_id)
    request = service_pb2.CloneProjectJobRequest(source_job_id=job.id, desc=job.desc)
    emulator._run(lambda: emulator.state.job_service.clone("anybody", request, None))
    generation.store = None
    assert generation.try_once().handle.job_id == first.job_id


def test_a_search_that_can_not_be_finished_is_not_an_empty_one(begin: Begin, emulator: Emulator) -> None:
    generation = begin(ENDLESS)
    first = generation.try_once().handle
    if generation.store is not None:
        generation.store.entry = {"token": generation.key.token, "job_id": None}
    fault = emulator.faults.inject("List", code="PERMISSION_DENIED")
    with pytest.raises(JobInfrastructureError, match="no new one is created"):
        generation.try_once()
    emulator.faults.remove(fault)
    assert generation.try_once().handle.job_id == first.job_id
    generation.one_job_ran_once()


def test_a_retry_attaches_though_its_inputs_are_gone(begin: Begin, emulator: Emulator) -> None:
    """The job has them; a worker without them must not lose it."""
    generation = begin(ENDLESS)
    first = generation.try_once().handle
    (generation.folder / "data.csv").unlink()
    assert generation.try_once().handle.job_id == first.job_id
    generation.one_job_ran_once()


@pytest.mark.parametrize("visible", ["at_once", "when_done"])
def test_a_job_is_visible_when_its_create_is_done(begin: Begin, emulator: Emulator, visible: str) -> None:
    emulator.settings.update({"new_jobs_visible": visible, "clone_seconds": 0.5})
    generation = begin(ENDLESS)
    handle = generation.try_once().handle
    generation.one_job_ran_once(handle.job_id)
    assert generation.jobs[0].status != jobs_pb2.CREATING


def test_no_room_is_waited_for(begin: Begin, emulator: Emulator) -> None:
    emulator.faults.inject("Create", code="RESOURCE_EXHAUSTED", times=2)
    emulator.faults.inject("Execute", code="RESOURCE_EXHAUSTED", times=1)
    generation = begin(ENDLESS)
    generation.one_job_ran_once(generation.try_once().handle.job_id)
