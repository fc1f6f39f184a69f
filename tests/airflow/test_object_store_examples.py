"""The example DAGs about files, on a real Airflow: a job's result as another's input, and results in S3."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from datasphere_emulator import Emulator
from harness.dagtest import run_dags
from harness.venvs import NEWEST, airflow_venv

if TYPE_CHECKING:
    from collections.abc import Iterator

EXAMPLES = Path(__file__).parents[2] / "example_dags"


@pytest.fixture(scope="module")
def emulator() -> Iterator[Emulator]:
    with Emulator(tls=False) as emulator:
        yield emulator


def example(name: str, dag: str) -> str:
    """An example's source; ``dag`` names a task of it, by which the DAG becomes a variable of the module."""
    return (EXAMPLES / f"{name}.py").read_text() + f"\ndag = {dag}.dag\n"


def connections(emulator: Emulator) -> dict[str, dict[str, Any]]:
    return {"datasphere_default": {"conn_type": "datasphere", "extra": emulator.connection_extra()}}


@pytest.mark.airflow
@pytest.mark.parametrize("version", [NEWEST, "2.11.2"])
def test_the_output_of_one_job_is_the_input_of_the_next(emulator: Emulator, version: str) -> None:
    first = emulator.create_job("echo the first result > result.txt", outputs=["result.txt"])
    second = emulator.create_job(
        "tr a-z A-Z < ${INPUT_DATA} > upper.txt",
        files={"placeholder.txt": "-"},
        inputs=[("placeholder.txt", "INPUT_DATA")],
        outputs=["upper.txt"],
    )
    emulator.journal.clear()
    (result,) = run_dags(
        example("output_files_for_other_job", "first"),
        venv=airflow_venv(version),
        connections=connections(emulator),
        env={"AIRFLOW_VAR_DATASPHERE_FIRST_JOB_ID": first, "AIRFLOW_VAR_DATASPHERE_SECOND_JOB_ID": second},
    ).values()
    assert result.state == "success", result.log
    job = emulator.job(result.xcoms["second_job", -1]["return_value"])
    stored = emulator.state.storage.path(emulator.project_id, job.output_files[0].sha256)
    assert stored.read_text() == "THE FIRST RESULT\n"
    # Both jobs are in one project: not a byte travelled through the workers.
    assert emulator.journal.calls("storage.*") == []


@pytest.mark.airflow
def test_results_go_to_s3_and_are_read_there(emulator: Emulator) -> None:
    import boto3
    from moto.server import ThreadedMotoServer

    source = emulator.create_job("mkdir d; echo 1 > d/x; echo results > r.csv", outputs=["r.csv", "d"])
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        endpoint = {"endpoint_url": f"http://{host}:{port}", "region_name": "us-east-1"}
        client = boto3.client("s3", aws_access_key_id="key", aws_secret_access_key="secret", **endpoint)
        client.create_bucket(Bucket="results")
        aws = {"conn_type": "aws", "login": "key", "password": "secret", "extra": endpoint}
        (result,) = run_dags(
            example("results_to_s3", "fork"),
            connections={**connections(emulator), "aws_default": aws},
            env={"AIRFLOW_VAR_DATASPHERE_SOURCE_JOB_ID": source, "AIRFLOW_VAR_RESULTS_BUCKET": "results"},
        ).values()
        keys = [entry["Key"] for entry in client.list_objects_v2(Bucket="results")["Contents"]]
    finally:
        server.stop()
    assert result.state == "success", result.log
    assert sorted(key.partition("/")[2] for key in keys) == ["d/x", "r.csv"]
    manifest = result.xcoms["download_results", -1]["return_value"]
    assert json.loads(json.dumps(manifest)) == manifest
    assert manifest[0]["uri"].startswith("s3://aws_default@results/")
    assert result.xcoms["count_bytes", -1]["return_value"] == len("results\n")
