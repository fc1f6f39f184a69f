"""Canaries in every credential field; each credential in every mode, to every end, with debug logs; then a search.

What is searched is in ``leak_search``: logs, output of the components, all tables, the API, the service's side.
"""

from __future__ import annotations

import asyncio
import json
import pickle
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_datasphere.client.async_client import AsyncDataSphereClient
from airflow_provider_datasphere.client.connection.channels import AsyncChannels
from airflow_provider_datasphere.client.connection.settings import Settings
from airflow_provider_datasphere.client.sync_client import DataSphereClient
from airflow_provider_datasphere.hooks.datasphere import DataSphereHook
from datasphere_emulator import Emulator, Script
from harness import NEWEST, RealAirflow
from leak_search import answers, collect, files, leaks, service, tables

DAGS = """
from datetime import datetime

try:
    from airflow.sdk import DAG, ObjectStoragePath, task
except ImportError:
    from airflow.decorators import task
    from airflow.io.path import ObjectStoragePath
    from airflow.models.dag import DAG

from airflow_provider_datasphere.hooks.datasphere import DataSphereHook
from airflow_provider_datasphere.operators.jobs import CancelJobOperator, ForkJobOperator
from airflow_provider_datasphere.operators.results import DownloadJobResultsOperator
from airflow_provider_datasphere.sensors.jobs import DataSphereJobSensor

JOBS = {jobs!r}
MODES = {{"blocking": {{}}, "deferred": {{"deferrable": True}}}}
SENSOR_MODES = [{{"deferrable": True}}, {{"mode": "poke"}}, {{"mode": "reschedule"}}]


def dag(dag_id):
    return DAG(dag_id, schedule=None, start_date=datetime(2024, 1, 1), default_args={{"retries": 0}})


def fork(task_id, conn_id, source, **options):
    return ForkJobOperator(
        task_id=task_id, datasphere_conn_id=conn_id, source_job_id=source, poll_interval=0.5, **options
    )


with dag("leaks"):
    for number, conn_id in enumerate({working!r}):
        for mode, options in MODES.items():
            fork(f"{{conn_id}}_{{mode}}_success", conn_id, JOBS[conn_id], **options)
            fork(f"{{conn_id}}_{{mode}}_killed", conn_id, JOBS["endless"], **options)
        # Every credential, every mode and both ends, but not all of them crossed.
        fork(f"{{conn_id}}_failure", conn_id, JOBS["failing"], **MODES["deferred" if number % 2 else "blocking"])
        options = SENSOR_MODES[number % 3]
        end = "failed" if number % 2 else "ended"
        DataSphereJobSensor(
            task_id=f"{{conn_id}}_sensor_{{end}}",
            datasphere_conn_id=conn_id, job_id=JOBS[end], poke_interval=1, **options
        )
    for conn_id in {broken!r}:
        fork(f"{{conn_id}}_blocking", conn_id, JOBS["failing"])
    DataSphereJobSensor(
        task_id="refused_token_sensor", datasphere_conn_id="refused_token", job_id=JOBS["ended"], deferrable=True
    )
    first = fork("files", {working!r}[0], JOBS["files"], vars={{"DATA": __file__}})
    DownloadJobResultsOperator(
        task_id="download", datasphere_conn_id={working!r}[0], job_id=first.output, destination="{folder}/results"
    )

    @task
    def read(job_id):
        print(DataSphereHook({working!r}[0]).get_conn().get_job(job_id))
        return ObjectStoragePath(f"datasphere://{working[0]}@{{job_id}}/result.txt").read_text()

    read(first.output)
"""

#: Connections that work, by their credential, and those that don't.
WORKING = ["key_json", "iam_token", "key_path", "oauth", "impersonated", "metadata"]
BROKEN = ["refused_token", "damaged_key", "other_key", "not_json", "refused_oauth", "forbidden"]

#: Generous, seconds.
PATIENCE = 240.0


@dataclass
class Stage:
    """The service with its accounts, connections of every kind to it, and what must not be seen anywhere."""

    emulator: Emulator
    connections: dict[str, dict[str, Any]]
    planted: set[str]
    jobs: dict[str, str]

    @classmethod
    def set_up(cls, emulator: Emulator, folder: Path) -> Stage:
        iam, project = emulator.iam, emulator.project_id
        user, other, forbidden = iam.add_user("u"), iam.add_service_account("o"), iam.add_service_account("f")
        for account in (user, other):
            iam.set_role(account, project, "developer")
        iam.allow_impersonation(emulator.service_account_id, other)
        keys = [iam.create_key(emulator.service_account_id) for _ in range(4)]
        (folder / "key.json").write_text(json.dumps(keys[1]))
        damaged = {**keys[2], "private_key": keys[2]["private_key"].replace("\n", " ")}
        oauth = iam.add_oauth_token(user)
        connections: dict[str, dict[str, Any]] = {
            "key_json": {"service_account_json": json.dumps(keys[0])},
            "iam_token": {"iam_token": emulator.iam_token},
            "key_path": {"service_account_json_path": str(folder / "key.json")},
            "oauth": {"oauth": oauth},
            "impersonated": {"service_account_json": keys[0], "impersonate_service_account_id": other},
            "metadata": {},
            "refused_token": {"iam_token": "t1.CanaryOfARefusedToken"},
            "damaged_key": {"service_account_json": json.dumps(damaged)},
            "other_key": {"service_account_json": {"id": "aje1", "secret": "CanaryOfAStaticKeyOfAWrongKind"}},
            "not_json": {"service_account_json": keys[3]["private_key"]},
            "refused_oauth": {"oauth": "y0_CanaryOfARefusedOAuthToken"},
            "forbidden": {"service_account_json": json.dumps(keys[0]), "impersonate_service_account_id": forbidden},
        }
        planted = {emulator.iam_token, oauth}
        planted |= {"CanaryOfARefusedToken", "CanaryOfAStaticKeyOfAWrongKind", "CanaryOfARefusedOAuthToken"}
        planted |= {line for key in keys for line in key["private_key"].splitlines() if len(line) > 60}
        iam.delete_key(keys[3]["id"])

        jobs = {name: Script(executing_seconds=0.5) for name in WORKING}
        jobs["failing"] = Script(executing_seconds=0.5, return_code=3)
        jobs["endless"] = Script(never_ends=True)
        ids = {name: emulator.create_scripted_job(script) for name, script in jobs.items()}
        ids["ended"] = emulator.create_scripted_job(Script(executing_seconds=0.1), execute=True)
        ids["failed"] = emulator.create_scripted_job(Script(executing_seconds=0.1, return_code=1), execute=True)
        ids["files"] = emulator.create_job(
            "cp ${DATA} result.txt", files={"data.txt": "old"}, inputs=[("data.txt", "DATA")], outputs=["result.txt"]
        )
        extras = {
            name: emulator.connection_extra(**{"iam_token": None, **extra}) for name, extra in connections.items()
        }
        return cls(emulator, extras, planted, ids)

    @property
    def secrets(self) -> set[str]:
        """What was planted, and every token that was handed out so far."""
        return self.planted | set(self.emulator.iam.to_json()["tokens"])


def kill(airflow: RealAirflow, run_id: str, task_id: str) -> None:
    """End a running task as a person does, or, for one of them, as the machine's memory guard does."""
    if task_id == "iam_token_blocking_killed":
        airflow.task_process("leaks", run_id, task_id).kill()
    else:
        airflow.set_task_state("leaks", run_id, task_id, "failed")


@pytest.mark.airflow
@pytest.mark.long
@pytest.mark.parametrize(
    ("version", "working"),
    [(NEWEST, WORKING), ("2.11.2", ["key_json", "iam_token"])],
)
def test_nothing_leaks(version: str, working: list[str], tmp_path: Path) -> None:
    environment = {
        "AIRFLOW__LOGGING__LOGGING_LEVEL": "DEBUG",
        "AIRFLOW__LOGGING__CELERY_LOGGING_LEVEL": "DEBUG",
        "GRPC_VERBOSITY": "debug",
        # Airflow's API hides fields by their names, and doesn't know this one (docs/connection.md).
        "AIRFLOW__CORE__SENSITIVE_VAR_CONN_NAMES": "oauth",
    }
    with Emulator() as emulator:
        stage = Stage.set_up(emulator, tmp_path)
        environment["YC_METADATA_ADDR"] = emulator.metadata_address
        with RealAirflow(version, env=environment, sqlite=True) as airflow:  # one file to search
            for name, extra in stage.connections.items():
                airflow.add_connection(name, conn_type="datasphere", extra=extra)
            source = DAGS.format(jobs=stage.jobs, working=working, broken=BROKEN, folder=tmp_path)
            airflow.add_dag("leaks", source)
            run_id = airflow.trigger("leaks")
            killed = {f"{name}_{mode}_killed" for name in working for mode in ("blocking", "deferred")}
            while_deferred = play(airflow, run_id, killed)
            check_that_all_was_played(airflow, run_id, killed, working)
            everything = collect(
                *(files(airflow), tables(airflow), answers(airflow, [("leaks", run_id)]), service(emulator))
            )
        secrets = stage.secrets
        # What is searched is what is meant.
        assert len(secrets) > 100
        assert b"'datasphere_conn_id': 'key_json'" in while_deferred["table trigger.kwargs"] or (
            b'"datasphere_conn_id": "key_json"' in while_deferred["table trigger.kwargs"]
        )
        assert b"debug" in everything["file scheduler.out"].lower()
        assert any(
            b"source_job_id" in text for name, text in everything.items() if name.startswith("table serialized_dag.")
        )
        assert leaks(while_deferred, secrets) | leaks(everything, secrets) == set()
        # Links to files are signed themselves; a token has no business there.
        assert {call.token for call in emulator.journal.calls() if call.method.startswith("storage.")} == {""}


def busy(airflow: RealAirflow, run_id: str, task_ids: set[str]) -> set[str]:
    """Those of the tasks that watch a job now."""
    states = {task_id: state for (task_id, _), state in airflow.task_states("leaks", run_id).items()}
    return {
        task_id
        for task_id in task_ids
        if states[task_id] == ("deferred" if "_deferred_" in task_id else "running")
        and airflow.xcom("leaks", run_id, task_id, "operation_id")
    }


def play(airflow: RealAirflow, run_id: str, killed: set[str]) -> dict[str, bytes]:
    """Wait until each endless task runs, look into the tables, and kill them one by one."""
    waiting = set(killed)
    while_deferred: dict[str, bytes] = {}
    while waiting:
        now = partial(busy, airflow, run_id, waiting)
        found: set[str] = airflow.until(now, PATIENCE, f"busy one of {sorted(waiting)}")
        if not while_deferred and any("_deferred_" in task_id for task_id in found):
            while_deferred = collect(tables(airflow))
        for task_id in found:
            kill(airflow, run_id, task_id)
        waiting -= found
    airflow.wait_run("leaks", run_id, PATIENCE)
    return while_deferred


def check_that_all_was_played(airflow: RealAirflow, run_id: str, killed: set[str], working: list[str]) -> None:
    states = {task_id: state for (task_id, _), state in airflow.task_states("leaks", run_id).items()}
    expected = dict.fromkeys(states, "failed")
    expected |= {f"{name}_{mode}_success": "success" for name in working for mode in ("blocking", "deferred")}
    sensors = [task_id for task_id in states if task_id.endswith("_sensor_ended")]
    expected |= dict.fromkeys([*sensors, "files", "download", "read"], "success")
    assert killed <= set(states)
    assert states == expected


# Without Airflow -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with Emulator() as emulator:
        yield Stage.set_up(emulator, tmp_path_factory.mktemp("keys"))


@pytest.mark.parametrize("name", [*WORKING, *BROKEN])
def test_exceptions_and_reprs_tell_nothing(name: str, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a job that isn't there, of a service that refuses; in what is printed of an error, its causes included."""
    emulator = stage.emulator
    monkeypatch.setenv("YC_METADATA_ADDR", emulator.metadata_address)
    monkeypatch.setenv(
        "AIRFLOW_CONN_" + name.upper(), json.dumps({"conn_type": "datasphere", "extra": stage.connections[name]})
    )
    hook = DataSphereHook(name)
    told = [repr(hook), *map(str, hook.test_connection())]

    def tell(error: Exception) -> None:
        told.append(f"{error!r} {error.args} {vars(error)}")
        told.extend(traceback.format_exception(error))

    async def ask(settings: Settings) -> None:
        channels = AsyncChannels(settings)
        try:
            await AsyncDataSphereClient(channels, settings).get_job("bt1nothing")
        finally:
            await channels.close()

    for attempt in (
        lambda: hook.settings,
        lambda: hook.get_conn().get_job("bt1nothing"),
        lambda: hook.get_conn().fork_job("bt1nothing"),
        lambda: asyncio.run(ask(hook.settings)),
    ):
        try:
            told.append(repr(attempt()))
        except Exception as error:
            tell(error)
    told.append(repr(pickle.loads(pickle.dumps(hook)).__dict__))
    try:
        settings = hook.settings
        told += [str(settings), settings.fingerprint, settings.description, repr(DataSphereClient(settings))]
        pickle.dumps(settings)
    except Exception as error:
        tell(error)
    assert len(told) > 5
    assert leaks({"what was told": "\n".join(told).encode()}, stage.secrets) == set()
