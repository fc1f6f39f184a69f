"""The official CLI forks, attaches to and cancels jobs of the emulator."""

from __future__ import annotations

import json

from yandex.cloud.datasphere.v2.jobs import jobs_pb2

from cli_stage import Stage, scenario, until

PROGRAM = """\
import json, os, pathlib, sys
data, folder, result, made, word, other = sys.argv[1:]
texts = sorted(path.name for path in pathlib.Path(folder).iterdir())
pathlib.Path(result).parent.mkdir(parents=True, exist_ok=True)
pathlib.Path(result).write_text(json.dumps(
    [pathlib.Path(data).read_text(), texts, word, other, os.environ.get("KEPT"), os.environ.get("NEW")]
))
pathlib.Path(made).mkdir()
pathlib.Path(made, "a.txt").write_text(word)
print("word", word)
"""


def source_job(stage: Stage) -> str:
    """A job with everything that a fork can change."""
    return stage.emulator.create_job(
        "python main.py ${DATA} ${FOLDER} ${RESULT} ${MADE} ${WORD} ${OTHER}",
        files={"main.py": PROGRAM, "data.csv": "old", "texts/old.txt": "x"},
        inputs=[("data.csv", "DATA"), ("texts", "FOLDER")],
        outputs=[("result.json", "RESULT"), ("made", "MADE")],
        args={"WORD": "old", "OTHER": "as-it-was"},
        env_vars={"KEPT": "no"},
        name="source",
        desc="described",
        cloud_instance_types=["c1.8"],
        project_id=stage.project_id,
    )


@scenario
def test_fork_with_all_overrides(stage: Stage) -> None:
    source = source_job(stage)
    stage.write({"in/new.csv": "new", "in/texts/one.txt": "1", "in/texts/two.txt": "2"})
    command = stage.run(
        *("project", "job", "fork", "--id", source),
        *("--arg", "WORD=a=b"),
        *("--var", "DATA=in/new.csv", "--var", "FOLDER=in/texts", "--var", "RESULT=deep/new.json"),
        *("--env-var", "NEW=1", "--env-var", "EMPTY="),
        *("--docker-image-id", "system-python-3-10"),
        *("--working-storage-type", "SSD", "--working-storage-size", "150GB"),
        *("--cloud-instance-type", "g2.1", "--cloud-instance-type", "g1.1"),
        *("--name", "child", "--desc", "a child"),
    )
    assert f"cloning job `{source}`" in command.stdout
    assert "uploading 2 files" in command.stdout
    assert "job completed successfully" in command.stdout
    assert command.log("stdout.txt") == "word a=b\n"
    assert "source job data will expire after" in command.stdout
    assert json.loads(stage.read("deep/new.json")) == ["new", ["one.txt", "two.txt"], "a=b", "as-it-was", None, "1"]
    assert stage.read("made/a.txt") == "a=b"

    child = stage.emulator.job(stage.only_job(parent=source))
    assert (child.status, child.parent_job_id) == (jobs_pb2.SUCCESS, source)
    assert (child.name, child.desc) == ("child", "a child")
    parameters = child.job_parameters
    assert [(file.desc.path, file.desc.var) for file in parameters.input_files] == [
        ("in/new.csv", "DATA"),
        ("in/texts", "FOLDER"),
        ("main.py", ""),
    ]
    assert [(desc.path, desc.var) for desc in parameters.output_files] == [
        ("deep/new.json", "RESULT"),
        ("made", "MADE"),
    ]
    assert {argument.name: argument.value for argument in parameters.arguments} == {"WORD": "a=b", "OTHER": "as-it-was"}
    assert dict(parameters.env.vars) == {"NEW": "1", "EMPTY": ""}
    assert parameters.env.docker_image_resource_id == "system-python-3-10"
    assert parameters.extended_working_storage.size_gb == 150
    assert [kind.name for kind in parameters.cloud_instance_types] == ["g2.1", "g1.1"]
    assert child.data_expires_at.seconds - child.created_at.seconds == 14 * 86400
    assert stage.emulator.journal.count("Clone", job_id=child.id) == 1
    # The source is as it was.
    assert stage.emulator.job(source).job_parameters.env.vars["KEPT"] == "no"


@scenario
def test_fork_async_and_fork_of_the_fork(stage: Stage) -> None:
    source = source_job(stage)
    child, operation_id = stage.ask_execution(
        *("fork", "--id", source, "--docker-image-url", "cr.example/image:1"),
        *("--docker-image-username", "user", "--docker-image-password-secret-id", "my-secret"),
    )
    assert stage.emulator.operation_of(child) == operation_id
    image = stage.emulator.job(child).job_parameters.env.docker_image_spec
    assert (image.image_url, image.username, image.password_ds_secret_name) == (
        "cr.example/image:1",
        "user",
        "my-secret",
    )
    # Nothing else was changed, nothing was uploaded.
    job = stage.emulator.job(child)
    assert (job.name, job.desc) == ("source", "described")
    assert dict(job.job_parameters.env.vars) == {"KEPT": "no"}
    assert [kind.name for kind in job.job_parameters.cloud_instance_types] == ["c1.8"]
    stage.emulator.wait_job(child)
    grandchild, _ = stage.ask_execution("fork", "--id", child, "--arg", "WORD=third")
    stage.emulator.wait_job(grandchild)
    assert stage.emulator.job(grandchild).parent_job_id == child
    assert stage.emulator.job(grandchild).job_parameters.env.docker_image_spec.username == "user"
    assert stage.log(grandchild) == "word third\n"
    puts = [call.request or {} for call in stage.emulator.journal.calls("storage.put")]
    assert not [put for put in puts if put["project_id"] == stage.project_id]
    stage.run("project", "job", "download-files", "--id", grandchild)
    assert json.loads(stage.read("result.json")) == ["old", ["old.txt"], "third", "as-it-was", "no", None]


@scenario
def test_fork_is_refused(stage: Stage) -> None:
    source = source_job(stage)
    for arguments, message in (
        (("--arg", "NOPE=1"), "Argument with name 'NOPE' is not present in source job"),
        (("--var", "NOPE=1"), "No variable path in source job: NOPE"),
    ):
        assert message in stage.run("project", "job", "fork", "--id", source, *arguments, code=1).stderr
    stage.emulator.clear_data(source)
    cleared = stage.run("project", "job", "fork", "--id", source, code=1)
    assert "fork is unavailable – source job data is cleared" in cleared.stderr
    unknown = stage.run("project", "job", "fork", "--id", "bt1nothing", code=1)
    assert "RPC error occurred" in unknown.stdout
    assert "StatusCode.NOT_FOUND" in unknown.stderr
    assert stage.only_job() == source
    assert stage.emulator.journal.count("Clone", job_id=source) == 0


@scenario
def test_graceful_cancel_lets_the_program_finish(stage: Stage) -> None:
    source = stage.emulator.create_job(
        "trap 'echo saving; echo saved > saved.txt; exit 0' TERM; echo ready; while true; do sleep 0.05; done",
        outputs=["saved.txt"],
        graceful_shutdown=("SIGTERM", 60),
        project_id=stage.project_id,
    )
    job_id, _ = stage.ask_execution("fork", "--id", source)
    attached = stage.start("project", "job", "attach", "--id", job_id)
    until(lambda: stage.emulator.journal.count("ReadLogs", job_id=job_id))
    until(lambda: "ready" in stage.log(job_id))
    cancelled = stage.run("project", "job", "cancel", "-g", "--id", job_id)
    assert "job is canceled" in cancelled.stdout
    (cancel,) = stage.emulator.journal.calls("Cancel", job_id=job_id)
    assert (cancel.request or {})["graceful"] is True
    attached.end(1)
    assert "Operation error occurred" in attached.stdout
    assert "status=CANCELLED" in attached.stderr
    assert stage.log(job_id) == "ready\nsaving\n"
    assert stage.emulator.job(job_id).status == jobs_pb2.CANCELLED
    # What it saved is there.
    downloaded = stage.run("project", "job", "download-files", "--id", job_id)
    assert "was completed with error" in downloaded.stdout
    assert stage.read("saved.txt") == "saved\n"


@scenario
def test_cancel_kills_the_program(stage: Stage) -> None:
    source = stage.emulator.create_job(
        "trap 'echo never' TERM; echo early > early.txt; echo ready; while true; do sleep 0.05; done",
        outputs=["early.txt"],
        project_id=stage.project_id,
    )
    job_id, _ = stage.ask_execution("fork", "--id", source)
    until(lambda: "ready" in stage.log(job_id))
    stage.run("project", "job", "cancel", "--id", job_id)
    stage.emulator.wait_job(job_id, "CANCELLED")
    assert stage.log(job_id) == "ready\n"
    entity = stage.ask("project", "job", "get", "--id", job_id)
    assert entity["status"] == "CANCELLED"
    assert entity["finished_at"] != ""
    again = stage.run("project", "job", "cancel", "--id", job_id, code=1)
    assert "StatusCode.FAILED_PRECONDITION" in again.stderr


@scenario
def test_retries_of_the_cli_make_a_second_job_when_an_answer_is_lost(stage: Stage) -> None:
    # Its channel repeats calls that ended UNAVAILABLE, and sends no idempotency key.
    source = source_job(stage)
    account = stage.emulator.iam.add_service_account("with faults")
    stage.emulator.iam.set_role(account, stage.project_id, "developer")
    stage.emulator.faults.inject("Clone", code="UNAVAILABLE", lost_answer=True, times=1, subject=account)
    token = stage.emulator.iam.issue_token(account)
    stage.run("project", "job", "fork", "--id", source, "--async", environment={"YC_IAM_TOKEN": token})
    calls = stage.emulator.journal.calls("Clone", subject=account)
    assert [call.code for call in calls] == ["UNAVAILABLE", "OK"]
    assert "idempotency-key" not in calls[0].metadata
    first, second = stage.emulator.jobs(parent=source)
    assert (stage.emulator.executions(first.id), stage.emulator.executions(second.id)) == (0, 1)
