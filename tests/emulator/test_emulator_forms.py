"""The forms the emulator comes in: in-process, command, pytest plugin, control client; TLS and plaintext."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import yandexcloud
from yandex.cloud.datasphere.v2.jobs import project_job_service_pb2, project_job_service_pb2_grpc
from yandex.cloud.endpoint import api_endpoint_service_pb2, api_endpoint_service_pb2_grpc

from datasphere_emulator import Emulator, Script, Settings
from datasphere_emulator.__main__ import main
from datasphere_emulator.control_client import ControlClient
from stub_client import Client, raises_status

pytest_plugins = ["pytester"]


def test_plaintext() -> None:
    with Emulator(tls=False) as emulator:
        assert emulator.root_certificates is None
        assert emulator.url.startswith("http://localhost:")
        extra = emulator.connection_extra(project_id=None, endpoint="x:1")
        assert extra == {
            "iam_token": emulator.iam_token,
            "endpoint": "x:1",
            "ui_endpoint": emulator.url,
            "insecure": True,
        }
        job_id = emulator.create_scripted_job(Script(), outputs=["o"])
        result = Client(emulator).run(job_id)
        assert len(Client(emulator).http(result.output_files[0].url)) == 16


def test_sdk_of_the_cloud_finds_everything_here(emulator: Emulator) -> None:
    assert emulator.root_certificates is not None
    sdk = yandexcloud.SDK(
        service_account_key=emulator.service_account_key(),
        endpoint=emulator.endpoint,
        root_certificates=emulator.root_certificates.read_bytes(),
    )
    job_id = emulator.create_job("true")
    stub = sdk.client(project_job_service_pb2_grpc.ProjectJobServiceStub)
    assert stub.Get(project_job_service_pb2.GetProjectJobRequest(job_id=job_id)).id == job_id
    (call,) = emulator.journal.calls("Get")
    assert call.subject == emulator.service_account_id


def test_endpoints_need_no_token(emulator: Emulator, client: Client) -> None:
    stub = api_endpoint_service_pb2_grpc.ApiEndpointServiceStub(client.channel)
    listed = stub.List(api_endpoint_service_pb2.ListApiEndpointsRequest()).endpoints
    addresses = {endpoint.id: endpoint.address for endpoint in listed}
    assert addresses["datasphere"] == addresses["operation"] == addresses["iam"] == emulator.endpoint
    found = stub.Get(api_endpoint_service_pb2.GetApiEndpointRequest(api_endpoint_id="iam"))
    assert found.address == emulator.endpoint
    with raises_status("NOT_FOUND", "'x'"):
        stub.Get(api_endpoint_service_pb2.GetApiEndpointRequest(api_endpoint_id="x"))


def test_asynchronous_client_in_the_same_process(emulator: Emulator) -> None:
    job_id = emulator.create_scripted_job(Script(executing_seconds=0.3, log=["x"]))
    assert emulator.root_certificates is not None
    credentials = grpc.ssl_channel_credentials(emulator.root_certificates.read_bytes())
    metadata = (("authorization", f"Bearer {emulator.iam_token}"),)

    async def read() -> list[bytes]:
        async with grpc.aio.secure_channel(emulator.endpoint, credentials) as channel:
            stub = project_job_service_pb2_grpc.ProjectJobServiceStub(channel)
            await stub.Execute(project_job_service_pb2.ExecuteProjectJobRequest(job_id=job_id), metadata=metadata)
            request = project_job_service_pb2.ReadProjectJobLogsRequest(job_id=job_id)
            return [
                message.content async for answer in stub.ReadLogs(request, metadata=metadata) for message in answer.logs
            ]

    assert asyncio.run(read()) == [b"x\n"]


def test_misuse_raises(emulator: Emulator) -> None:
    with pytest.raises(RuntimeError, match="already running"):
        emulator.start()
    with pytest.raises(ValueError, match="'nothing'"):
        emulator.create_job("true", inputs=["nothing"])
    with pytest.raises(TypeError, match="colour"):
        emulator.create_job("true", colour="red")
    with pytest.raises(ValueError, match="data_ttl"):
        emulator.create_job("true", data_ttl="soon")
    with pytest.raises(ValueError, match="empty"):
        emulator.create_scripted_job([])
    job_id = emulator.create_job("exit 1", execute=True)
    with pytest.raises(RuntimeError, match="ended with ERROR, not SUCCESS"):
        emulator.wait_job(job_id)
    sleeping = emulator.create_scripted_job(Script(never_ends=True), execute=True)
    with pytest.raises(TimeoutError, match="EXECUTING"):
        emulator.wait_job(sleeping, timeout=0.2)
    stopped = Emulator()
    with pytest.raises(RuntimeError, match="is not running"):
        stopped.jobs()
    stopped.close()


def test_a_port_in_use_is_an_error(emulator: Emulator) -> None:
    port = int(emulator.endpoint.rpartition(":")[2])
    second = Emulator(port=port)
    with pytest.raises(OSError, match=str(port)):
        second.start()
    second.close()


# Settings


def test_settings_are_checked() -> None:
    settings = Settings()
    with pytest.raises(AttributeError, match="no setting 'colour'"):
        settings.colour = 1
    with pytest.raises(ValueError, match="replace or merge"):
        settings.clone_env_vars = "both"
    with pytest.raises(ValueError, match="log_chunk_bytes=0"):
        settings.update({"seed": 5, "log_chunk_bytes": 0})
    assert settings.seed == 0
    for text in ("seed", "seed=x", "colour=1", "idempotency=1"):
        with pytest.raises(ValueError):
            settings.set_from_text(text)
    settings.set_from_text("clone_env_vars=merge")
    settings.set_from_text("max_running_jobs=null")
    settings.set_from_text('project_secrets={"A": "b"}')
    settings.set_from_text("log_delay_seconds=1")
    assert (settings.clone_env_vars, settings.project_secrets) == ("merge", {"A": "b"})
    assert Settings(**settings.to_json()) == settings


# Command


def test_command_needs_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["serve"]) == 2
    assert "pip install 'airflow-provider-datasphere[emulator]'" in capsys.readouterr().err


@pytest.mark.parametrize("assignment", ["seed=x", "colour=1", "seed"])
def test_command_refuses_wrong_settings(assignment: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--setting", assignment])
    assert assignment.partition("=")[0] in capsys.readouterr().err


def test_command_names_a_port_in_use(emulator: Emulator, capsys: pytest.CaptureFixture[str]) -> None:
    port = emulator.endpoint.rpartition(":")[2]
    assert main(["serve", "--port", port, "--http-port", "0"]) == 1
    assert port in capsys.readouterr().err


def test_nothing_of_airflow_or_grpc_is_imported_by_the_plugin() -> None:
    program = "import sys, datasphere_emulator.pytest_plugin; print(*{'grpc', 'aiohttp', 'airflow'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output == "\n"


# Control from another process


@pytest.fixture
def control(emulator: Emulator) -> ControlClient:
    return emulator.control_client()


def test_control_client_does_what_the_emulator_does(control: ControlClient, emulator: Emulator) -> None:
    for name in ("endpoint", "project_id", "community_id", "service_account_id"):
        assert getattr(control, name) == getattr(emulator, name)
    source = control.create_job(
        "cat in.bin folder/x ${A}",
        files={"in.bin": b"\xff\x00", "folder/x": "text"},
        inputs=["folder"],
        args={"A": "in.bin"},
        local_modules={"m.py": b"1"},
        data_ttl=timedelta(days=2),
        graceful_shutdown=("SIGINT", 5),
        execute=True,
    )
    assert control.wait_job(source) == emulator.job(source)
    assert control.job(source).job_parameters.graceful_shutdown_parameters.signal == 2
    assert emulator.log_text(source)[-3][2] == b"\xff\x00text\xff\x00"
    assert control.operation(emulator.operation_of(source)) == emulator.operation(emulator.operation_of(source))
    assert control.executions(source) == 1
    assert control.operation_of(source) == emulator.operation_of(source)
    assert control.log_text(source) == emulator.log_text(source)
    assert control.log_text(source, limit=3) == emulator.log_text(source, limit=3) != emulator.log_text(source)
    project = control.add_project("further")
    assert emulator.state.projects[project].name == "further"
    scripted = control.create_scripted_job([Script(never_ends=True, log=["x"])], execute=True)
    assert [job.id for job in control.jobs()] == [source, scripted]
    assert control.jobs(parent=source) == []
    control.wait_job(scripted, "EXECUTING")
    control.cancel_job(scripted, reason="r")
    assert "r" in control.wait_job(scripted, "CANCELLED").status_details
    control.clear_data(source)
    assert emulator.job(source).data_cleared
    operation = emulator.operation_of(source)
    control.forget_operation(operation)
    with raises_status("NOT_FOUND"):
        Client(emulator).operation(operation)
    control.delete_job(source)
    assert [job.id for job in emulator.jobs()] == [scripted]


def test_control_client_raises_the_errors_of_the_emulator(control: ControlClient) -> None:
    with pytest.raises(LookupError, match="'nothing'"):
        control.job("nothing")
    with pytest.raises(ValueError, match="cmd"):
        control.create_job("")
    with pytest.raises(TypeError, match="colour"):
        control.create_job("true", colour="red")
    sleeping = control.create_scripted_job(Script(never_ends=True), execute=True)
    with pytest.raises(TimeoutError):
        control.wait_job(sleeping, timeout=0.1)
    with pytest.raises(RuntimeError, match="FAILED_PRECONDITION"):
        control.delete_job(sleeping)
    control.cancel_job(sleeping)
    with pytest.raises(RuntimeError, match="ended with CANCELLED"):
        control.wait_job(sleeping)
    with pytest.raises(AttributeError):
        control.colour  # noqa: B018


def test_control_client_reaches_journal_faults_settings_and_accounts(
    control: ControlClient, emulator: Emulator
) -> None:
    job_id = emulator.create_job("true")
    client = Client(emulator)
    fault = control.faults.inject("Get", code="INTERNAL", message="broken", times=1)
    assert [item["id"] for item in control.faults.active()] == [fault]
    with raises_status("INTERNAL", "broken"):
        client.call("Get", job_id=job_id)
    client.call("Get", job_id=job_id)
    assert [call.code for call in control.journal.calls("Get", job_id=job_id)] == ["INTERNAL", "OK"]
    assert control.journal.count("Get", code="OK") == 1
    control.journal.clear()
    assert emulator.journal.count() == 0
    other = control.faults.inject("Get", code="INTERNAL")
    control.faults.remove(other)
    control.faults.inject("List", code="INTERNAL")
    control.faults.clear()
    assert control.faults.active() == []
    control.settings.clone_env_vars = "merge"
    control.settings.update({"seed": 3, "max_running_jobs": 2})
    assert (emulator.settings.clone_env_vars, emulator.settings.seed, control.settings.max_running_jobs) == (
        "merge",
        3,
        2,
    )
    with pytest.raises(ValueError, match="replace or merge"):
        control.settings.clone_env_vars = "both"
    with pytest.raises(AttributeError, match="colour"):
        control.settings.colour  # noqa: B018
    account = control.iam.add_service_account("a")
    control.iam.set_role(account, control.project_id, "viewer")
    token = control.iam.issue_token(account, lifetime=60)
    assert Client(emulator, token).call("Get", job_id=job_id).id == job_id
    assert control.iam.revoke(token=token) == 1
    with raises_status("UNAUTHENTICATED"):
        Client(emulator, token).call("Get", job_id=job_id)
    key = control.iam.create_key(account)
    assert key["service_account_id"] == account
    control.iam.delete_key(key["id"])
    user = control.iam.add_user("u")
    assert emulator.iam.subject_of(emulator.iam.exchange_oauth(control.iam.add_oauth_token(user))) == user
    control.iam.allow_impersonation(user, account)
    assert emulator.iam.subject_of(emulator.iam.impersonate(user, account)) == account
    assert control.service_account_key()["service_account_id"] == emulator.service_account_id
    assert control.connection_extra()["root_certificates"] == str(emulator.root_certificates)


# Pytest plugin


def test_fixtures(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # importing the others takes seconds
    pytester.makepyfile(
        """
        seen = []

        def test_one(datasphere_emulator):
            assert datasphere_emulator.jobs() == []
            job_id = datasphere_emulator.create_job("echo hello", execute=True)
            datasphere_emulator.wait_job(job_id)
            seen.append(datasphere_emulator)

        def test_two(datasphere_emulator, datasphere_emulator_factory):
            assert datasphere_emulator.jobs() == []
            other = datasphere_emulator_factory(tls=False)
            assert other.endpoint != datasphere_emulator.endpoint
            assert not seen[0].state_dir.exists()
        """
    )
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-p", "datasphere_emulator")
    result.assert_outcomes(passed=2)


def test_no_call_of_a_burst_is_dropped(emulator: Emulator) -> None:
    # By default grpc rejects what exceeds its queues: 100 streams a connection, 1000 calls in all.
    job_id = emulator.create_scripted_job(Script(log=["x"]), execute=True)
    emulator.wait_job(job_id)
    assert emulator.root_certificates is not None
    credentials = grpc.ssl_channel_credentials(emulator.root_certificates.read_bytes())
    metadata = (("authorization", f"Bearer {emulator.iam_token}"),)
    options = [("grpc.use_local_subchannel_pool", 1)]

    async def read(stub: Any) -> int:
        request = project_job_service_pb2.ReadProjectJobLogsRequest(job_id=job_id)
        return len([answer async for answer in stub.ReadLogs(request, metadata=metadata)])

    async def burst() -> list[int]:
        channels = [grpc.aio.secure_channel(emulator.endpoint, credentials, options=options) for _ in range(15)]
        stubs = [project_job_service_pb2_grpc.ProjectJobServiceStub(channel) for channel in channels]
        found = await asyncio.gather(*[read(stub) for stub in stubs for _ in range(150)])
        for channel in channels:
            await channel.close()
        return found

    assert asyncio.run(burst()) == [1] * (15 * 150)


def test_every_setting_is_documented_with_its_default() -> None:
    text = (Path(__file__).parents[2] / "docs" / "emulator.md").read_text()
    documented = {}
    for line in text.partition("## Settings")[2].partition("\n## ")[0].splitlines():
        if line.startswith("| `"):
            names, default = line.split("|")[1:3]
            documented.update(dict.fromkeys(re.findall(r"`(\w+)`", names), json.loads(default.strip(" `"))))
    assert documented == json.loads(json.dumps(Settings().to_json()))
