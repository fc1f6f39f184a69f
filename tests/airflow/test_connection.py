"""Every credential in a real Airflow with debug logs: the tasks run, the links lead to the jobs, and nothing leaks."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from datasphere_emulator import Emulator, LogLine, Script
from harness import NEWEST, RealAirflow

pytestmark = pytest.mark.airflow

DAGS = """
from datetime import datetime

try:
    from airflow.sdk import DAG
except ImportError:
    from airflow.models.dag import DAG

from airflow_provider_datasphere.operators.jobs import ForkJobOperator
from airflow_provider_datasphere.sensors.jobs import DataSphereJobSensor

JOBS = {jobs!r}


def fork(task_id, conn_id, source, **options):
    return ForkJobOperator(
        task_id=task_id, datasphere_conn_id=conn_id, source_job_id=JOBS[source], poll_interval=0.5, **options
    )


def dag(dag_id):
    # Few at once: each is a process or two.
    return DAG(dag_id, schedule=None, start_date=datetime(2024, 1, 1), max_active_tasks=4)


with dag("credentials"):
    for conn_id in {working!r}:
        fork(conn_id, conn_id, "quick")
        fork(conn_id + "_deferred", conn_id, "failing", deferrable=True)

with dag("refused"):
    fork("blocking", "refused", "quick")
    fork("deferred", "refused", "quick", deferrable=True)
    DataSphereJobSensor(task_id="sensor", datasphere_conn_id="refused", job_id=JOBS["quick"], deferrable=True)
    fork("wrong", "wrong", "quick")

with dag("sensors"):
    options = dict(datasphere_conn_id="key_json", job_id=JOBS["ended"], poke_interval=1)
    DataSphereJobSensor(task_id="poke", mode="poke", **options)
    DataSphereJobSensor(task_id="reschedule", **options)
    DataSphereJobSensor(task_id="deferred", deferrable=True, **options)

with dag("long"):
    fork("blocking", "key_json", "endless")
    fork("deferred", "key_path", "endless", deferrable=True)
    fork("revoked", "renewable", "slow", deferrable=True)

with dag("links"):
    fork("running", "key_json", "endless")
    fork("deferred", "key_json", "endless", deferrable=True)
    fork("failed", "key_json", "failing")
    ForkJobOperator.partial(
        task_id="mapped", datasphere_conn_id="key_json", source_job_id=JOBS["quick"], poll_interval=0.5
    ).expand(args=[{{}}, {{}}])
"""

WORKING = ["iam_token", "key_json", "key_path", "oauth", "impersonated", "metadata"]


@dataclass
class Stage:
    """A running Airflow, an emulator, and what must not be seen anywhere."""

    airflow: RealAirflow
    emulator: Emulator
    secrets: set[str]
    runs: dict[str, str] = field(default_factory=dict)

    def page(self, job_id: str) -> str:
        emulator = self.emulator
        return f"{emulator.url}/communities/{emulator.community_id}/projects/{emulator.project_id}/job/{job_id}"


@pytest.fixture(scope="module", params=[NEWEST, "2.11.2"])
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with Emulator() as emulator:
        iam, project = emulator.iam, emulator.project_id
        user, other, renewable = iam.add_user("person"), iam.add_service_account("o"), iam.add_service_account("r")
        for account in (user, other, renewable):
            iam.set_role(account, project, "developer")
        iam.allow_impersonation(emulator.service_account_id, other)
        key, second_key = emulator.service_account_key(), iam.create_key(renewable)
        path = tmp_path_factory.mktemp("key") / "key.json"
        path.write_text(json.dumps(key))
        oauth = iam.add_oauth_token(user)
        extras: dict[str, dict[str, Any]] = {
            "iam_token": {},
            "key_json": {"service_account_json": json.dumps(key)},
            "key_path": {"service_account_json_path": str(path)},
            "oauth": {"oauth": oauth},
            "impersonated": {"service_account_json": key, "impersonate_service_account_id": other},
            "metadata": {},
            "renewable": {"service_account_json": json.dumps(second_key)},
            "refused": {"iam_token": "t1.CanaryOfARefusedToken"},
            "wrong": {"service_account_json": json.dumps({**key, "private_key": "CanaryOfADamagedKey"})},
        }
        connections = {
            name: {
                "conn_type": "datasphere",
                "extra": emulator.connection_extra(**({} if name == "iam_token" else {"iam_token": None, **extra})),
            }
            for name, extra in extras.items()
        }
        jobs = {
            "quick": emulator.create_scripted_job(Script(executing_seconds=0.5, log=[LogLine(0.0, "a line\n")])),
            "failing": emulator.create_scripted_job(Script(executing_seconds=0.5, return_code=3)),
            "slow": emulator.create_scripted_job(Script(executing_seconds=8.0)),
            "endless": emulator.create_scripted_job(Script(never_ends=True)),
            "ended": emulator.create_scripted_job(Script(executing_seconds=0.1), execute=True),
        }
        lines = [line for text in (key, second_key) for line in text["private_key"].splitlines() if len(line) > 60]
        secrets = {emulator.iam_token, oauth, "CanaryOfARefusedToken", "CanaryOfADamagedKey", *lines}
        environment = {
            "YC_METADATA_ADDR": emulator.metadata_address,
            "AIRFLOW__LOGGING__LOGGING_LEVEL": "DEBUG",
            # No process dies here: tasks that a busy machine keeps from reporting are not to be given up.
            "AIRFLOW__SCHEDULER__SCHEDULER_ZOMBIE_TASK_THRESHOLD": "600",
            "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "600",
        }
        with RealAirflow(request.param, connections=connections, env=environment) as airflow:
            airflow.add_dag(
                "connection",
                DAGS.format(jobs=jobs, working=WORKING),
                ["credentials", "refused", "sensors", "long", "links"],
            )
            yield Stage(airflow, emulator, secrets)


def test_each_credential_runs_jobs(stage: Stage) -> None:
    airflow = stage.airflow
    run_id = stage.runs["credentials"] = airflow.trigger("credentials")
    airflow.wait_run("credentials", run_id, timeout=300)
    states = airflow.task_states("credentials", run_id)
    expected = {(name, -1): "success" for name in WORKING} | {(f"{name}_deferred", -1): "failed" for name in WORKING}
    wrong = [task_id for (task_id, _), state in states.items() if state != expected[task_id, -1]]
    assert not wrong, (wrong, airflow.task_log("credentials", run_id, wrong[0]))
    assert "a line" in airflow.task_log("credentials", run_id, "metadata")
    for name in WORKING:
        log = airflow.task_log("credentials", run_id, f"{name}_deferred")
        assert "JobFailedError" in log, log


def test_a_refused_credential_says_so(stage: Stage) -> None:
    airflow = stage.airflow
    run_id = stage.runs["refused"] = airflow.trigger("refused")
    assert airflow.wait_run("refused", run_id, timeout=300) == "failed"
    for task_id in ("blocking", "deferred"):
        assert "refuses the IAM token of the connection" in airflow.task_log("refused", run_id, task_id)
    assert "private_key has no line" in airflow.task_log("refused", run_id, "wrong")


def test_sensors(stage: Stage) -> None:
    run_id = stage.runs["sensors"] = stage.airflow.trigger("sensors")
    assert stage.airflow.wait_run("sensors", run_id, timeout=180) == "success"


def test_killed_tasks_and_a_revoked_token(stage: Stage) -> None:
    airflow, emulator = stage.airflow, stage.emulator
    run_id = stage.runs["long"] = airflow.trigger("long")
    for task_id, state in (("blocking", "running"), ("deferred", "deferred"), ("revoked", "deferred")):
        airflow.wait_task("long", run_id, task_id, state, timeout=240)
    airflow.until(lambda: airflow.xcom("long", run_id, "blocking", "operation_id"), 60, "job")
    # A deferral that no triggerer has taken on yet is ended without a word to anybody (docs/killing.md).
    job_id = airflow.xcom("long", run_id, "deferred", "job_id")
    airflow.until(lambda: emulator.journal.count("ReadLogs", job_id=job_id), 60, "trigger of the deferred task")
    (account,) = [account.id for account in emulator.iam.accounts() if account.name == "r"]
    assert emulator.iam.revoke(subject=account)
    for task_id in ("blocking", "deferred"):
        airflow.set_task_state("long", run_id, task_id, "failed")
    assert airflow.wait_task("long", run_id, "revoked", timeout=240) == "success"
    try:
        airflow.until(lambda: len(emulator.journal.calls("Cancel")) >= 2, 60, "Cancel of both jobs")
    except TimeoutError as error:
        logs = [airflow.task_log("long", run_id, task_id) for task_id in ("blocking", "deferred")]
        raise AssertionError(f"{error}\n{emulator.journal.calls('Cancel')}\n" + "\n\n".join(logs)) from None


def test_links(stage: Stage) -> None:
    airflow, emulator = stage.airflow, stage.emulator
    run_id = stage.runs["links"] = airflow.trigger("links")

    def link(task_id: str, map_index: int = -1) -> str | None:
        return airflow.links("links", run_id, task_id, map_index).get("DataSphere job")

    for task_id, state in (("running", "running"), ("deferred", "deferred")):
        airflow.wait_task("links", run_id, task_id, state, timeout=240)
        url = airflow.until(lambda task_id=task_id: link(task_id), 60, f"link of the task that is {state}")
        assert url.rpartition("/")[2] in {job.id for job in emulator.jobs()}
        assert url == stage.page(url.rpartition("/")[2])
    assert airflow.wait_task("links", run_id, "failed", timeout=240) == "failed"
    assert link("failed") == airflow.xcom("links", run_id, "failed", "job_url")
    urls = []
    for map_index in (0, 1):
        assert airflow.wait_task("links", run_id, "mapped", map_index=map_index, timeout=240) == "success"
        job_id = airflow.xcom("links", run_id, "mapped", map_index=map_index)
        urls.append(link("mapped", map_index))
        assert urls[-1] == stage.page(job_id)
    assert len(set(urls)) == 2
    for task_id in ("running", "deferred"):
        airflow.set_task_state("links", run_id, task_id, "failed")
    airflow.wait_run("links", run_id)


def test_nothing_leaks(stage: Stage) -> None:
    """After all of the above: logs, database, answers of the API, output of every component, the emulator's journal."""
    airflow, emulator = stage.airflow, stage.emulator
    assert set(stage.runs) == {"credentials", "refused", "sensors", "long", "links"}, "the tests before this one failed"
    secrets = stage.secrets | set(emulator.iam.to_json()["tokens"])
    assert len(secrets) > 30
    # What is buffered is written by now.
    time.sleep(1.0)
    places: dict[str, bytes] = {}
    for path in sorted(airflow.home.path.rglob("*")):
        if path.is_file() and not path.is_symlink():
            places[str(path.relative_to(airflow.home.path))] = path.read_bytes()
    for dag_id, run_id in stage.runs.items():
        for instance in airflow.api.task_instances(dag_id, run_id):
            name = f"{dag_id}.{instance['task_id']}[{instance['map_index']}]"
            where = (dag_id, run_id, instance["task_id"])
            answers: list[Any] = [instance, airflow.xcoms(*where, map_index=instance["map_index"])]
            answers.append(airflow.task_log(*where, map_index=instance["map_index"]))
            answers.append(airflow.rendered_fields(*where, map_index=instance["map_index"]))
            answers.append(airflow.links(*where, map_index=instance["map_index"]))
            places[f"API: {name}"] = json.dumps(answers).encode()
    for call in emulator.journal.calls():
        if not call.method.startswith("IamToken."):
            places.setdefault("journal", b"")
            places["journal"] += repr(call).encode()
    assert any(Path(name).suffix == ".log" and b"DEBUG" in text.upper() for name, text in places.items())
    leaks = {
        f"{secret[:12]}… in {name}" for name, text in places.items() for secret in secrets if secret.encode() in text
    }
    assert leaks == set()
