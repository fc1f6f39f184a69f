"""The official CLI makes jobs from a config.yaml in the emulator."""

from __future__ import annotations

import hashlib
import json

from yandex.cloud.datasphere.v2.jobs import jobs_pb2

from cli_stage import Stage, scenario, until

CONNECTOR = "bt10123456789abcdefg"

CONFIG = """\
name: every-key
desc: a job with everything
cmd: >
  python main.py --data ${DATA} --folder ${FOLDER} --number ${NUMBER} --result ${RESULT} --folder-out ${MADE}
  --bucket ${BUCKET} --home ${DS_PROJECT_HOME} --dataset ${TABLE} --go ${GO}
args:
  NUMBER: 7
  GO: %(go)s
inputs:
  - data.csv: DATA
  - texts:
      var: FOLDER
  - settings/plain.json
outputs:
  - result.txt: RESULT
  - made:
      var: MADE
  - reports/plain.txt
s3-mounts:
  - %(connector)s: BUCKET
output-datasets:
  - name: table
    description: what was learnt
    size: 1GB
    var: TABLE
env:
  vars:
    - COPIED
    - COLOUR: blue
  python:
    type: manual
    version: 3.11.4
    requirements-file: requirements.txt
    local-paths:
      - main.py
      - helpers
    pip:
      index-url: https://index.example
      no-deps: 'true'
flags:
  - attach-project-disk
cloud-instance-types:
  - g1.1
  - c1.8
working-storage:
  type: SSD
  size: 120GB
graceful-shutdown:
  signal: SIGINT
  timeout: 1m5s
"""

PROGRAM = """\
import argparse, json, os, pathlib, sys, time
from helpers.text import shout

parser = argparse.ArgumentParser()
for name in ("data", "folder", "result", "folder-out", "bucket", "home", "dataset", "go"):
    parser.add_argument(f"--{name}", type=pathlib.Path)
parser.add_argument("--number", type=int)
options = parser.parse_args()

print(shout("begin"))
print("an error line", file=sys.stderr)
with open(os.environ["JOB_PROGRESS_FILENAME"], "a") as progress:
    progress.write(json.dumps({"progress": 50, "message": "half"}) + "\\n")
while not options.go.exists():
    time.sleep(0.05)
print("went on")
texts = {path.relative_to(options.folder).as_posix(): path.read_text() for path in options.folder.rglob("*.txt")}
plain = json.loads(pathlib.Path("settings/plain.json").read_text())
options.result.write_text(json.dumps({
    "data": options.data.read_text(), "texts": texts, "plain": plain, "number": options.number,
    "colour": os.environ["COLOUR"], "copied": os.environ["COPIED"], "home": os.environ["DS_PROJECT_HOME"],
}))
(options.folder_out / "deep").mkdir(parents=True)
(options.folder_out / "deep" / "a.bin").write_bytes(bytes(range(256)))
(options.folder_out / "b.txt").write_text("b")
pathlib.Path("reports").mkdir()
pathlib.Path("reports/plain.txt").write_text("plain")
(options.bucket / "seen.txt").write_text("in the bucket")
(options.home / "seen.txt").write_text("at home")
(options.dataset / "rows.csv").write_text("1,2")
print("end")
"""

FILES = {
    "main.py": PROGRAM,
    "helpers/__init__.py": "",
    "helpers/text.py": "def shout(text):\n    return text.upper()\n",
    "requirements.txt": "requests>=2\n--no-deps\n",
    "data.csv": "a,b\n1,2\n",
    "texts/one.txt": "one",
    "texts/more/two.txt": "two",
    "settings/plain.json": "[1, 2]",
}


@scenario
def test_execute_runs_the_job_and_shows_its_log_live(stage: Stage) -> None:
    config = CONFIG % {"go": stage.go, "connector": CONNECTOR}
    stage.write({**FILES, "config.yaml": config})
    command = stage.start(
        "project", "job", "execute", "-p", stage.project_id, "-c", "config.yaml", environment={"COPIED": "from here"}
    )
    command.until("BEGIN")
    job_id = stage.only_job()
    assert stage.emulator.job(job_id).status == jobs_pb2.EXECUTING  # what was printed is live
    assert "went on" not in stage.log(job_id)
    stage.go.touch()
    command.end()

    # The terminal
    out = command.stdout
    assert "uploading 5 files" in out
    assert f"created job `{job_id}`" in out
    assert out.index("BEGIN") < out.index("went on") < out.index("end") < out.index("job completed successfully")
    assert "an error line" in command.stderr
    link = f"/communities/{stage.emulator.community_id}/projects/{stage.project_id}/job/{job_id}"
    assert f"job link: https://datasphere.yandex.cloud{link}" in out
    assert "Created datasets:" in out
    assert "(table) size: 1 Gb" in out
    assert command.log("stdout.txt") == "BEGIN\nwent on\nend\n"
    assert command.log("stderr.txt") == "an error line\n"
    assert "Program started." in command.log("system.log")
    assert json.loads(command.log("job_progress.jsonl").splitlines()[0]) == {"progress": 50, "message": "half"}

    # The files that came
    result = json.loads(stage.read("result.txt"))
    project_home = result.pop("home")
    assert result == {
        "data": "a,b\n1,2\n",
        "texts": {"one.txt": "one", "more/two.txt": "two"},
        "plain": [1, 2],
        "number": 7,
        "colour": "blue",
        "copied": "from here",
    }
    assert (stage.folder / "made/deep/a.bin").read_bytes() == bytes(range(256))
    assert stage.read("made/b.txt") == "b"
    assert stage.read("reports/plain.txt") == "plain"
    project = stage.emulator.state.registry.project_folder(stage.project_id)
    assert project_home == str(project / "home")
    assert (project / "home/seen.txt").read_text() == "at home"
    assert (project / "s3" / CONNECTOR / "seen.txt").read_text() == "in the bucket"

    # The job
    job = stage.emulator.job(job_id)
    assert job.status == jobs_pb2.SUCCESS
    assert (job.name, job.desc, job.config) == ("every-key", "a job with everything", config)
    assert job.data_expires_at.seconds - job.created_at.seconds == 14 * 86400
    assert job.actual_cloud_instance_type.name == "g1.1"
    parameters = job.job_parameters
    assert [kind.name for kind in parameters.cloud_instance_types] == ["g1.1", "c1.8"]
    assert dict(parameters.env.vars) == {"COPIED": "from here", "COLOUR": "blue"}
    assert parameters.env.python_env.python_version == "3.11"
    assert list(parameters.env.python_env.requirements) == ["requests>=2", "--no-deps"]
    assert parameters.env.python_env.pip_options.index_url == "https://index.example"
    assert parameters.env.python_env.pip_options.no_deps
    assert len(parameters.env.python_env.local_modules) == 2
    assert parameters.extended_working_storage.size_gb == 120
    assert parameters.graceful_shutdown_parameters.signal == 2
    assert parameters.graceful_shutdown_parameters.timeout.seconds == 65
    assert parameters.attach_project_disk
    assert list(parameters.s3_mount_ids) == [CONNECTOR]
    assert [dataset.desc.description for dataset in job.output_datasets] == ["what was learnt"]
    rows = project / "datasets" / job.output_datasets[0].id / "rows.csv"
    assert rows.read_text() == "1,2"

    # The calls
    journal = stage.emulator.journal
    assert [call.code for call in journal.calls("Create", job_id=job_id)] == ["OK"]
    assert journal.count("Execute", job_id=job_id) == 1
    (create,) = journal.calls("Create", job_id=job_id)
    assert create.subject == stage.emulator.service_account_id
    assert create.metadata["x-client-version"] == "datasphere=0.10.0"
    puts = [call for call in journal.calls("storage.put") if (call.request or {})["project_id"] == stage.project_id]
    assert [call.code for call in puts] == ["OK"] * 5
    digest = hashlib.sha256(b"a,b\n1,2\n").hexdigest()
    assert digest in [(call.request or {})["sha256"] for call in puts]


@scenario
def test_execute_async_then_attach(stage: Stage) -> None:
    # The single script of the job is an input; nothing is declared about its environment.
    stage.write({
        "main.py": """\
            import pathlib, sys, time
            print("before")
            while not pathlib.Path(sys.argv[1]).exists():
                time.sleep(0.05)
            print("after")
            pathlib.Path("out.txt").write_text("made")
        """,
        "config.yaml": f"""\
            cmd: python main.py ${{GO}}
            args: {{GO: "{stage.go}"}}
            inputs: [main.py]
            outputs: [out.txt]
        """,
    })  # fmt: skip
    job_id, operation_id = stage.ask_execution("execute", "-p", stage.project_id, "-c", "config.yaml")
    assert stage.emulator.operation_of(job_id) == operation_id
    stage.emulator.wait_job(job_id, "EXECUTING")
    until(lambda: "before" in stage.log(job_id))

    command = stage.start("project", "job", "attach", "--id", job_id)
    command.until("executing job")
    until(lambda: stage.emulator.journal.count("ReadLogs", job_id=job_id))
    (reading,) = stage.emulator.journal.calls("ReadLogs", job_id=job_id)
    assert int((reading.request or {})["offset"]) == -1
    entity = stage.ask("project", "job", "get", "--id", job_id)
    assert entity["status"] == "EXECUTING"
    assert entity["finished_at"] == ""
    early = stage.run("project", "job", "download-files", "--id", job_id)
    assert "is still running" in early.stdout
    stage.go.touch()
    command.end()
    assert command.log("stdout.txt") == "after\n"
    assert stage.read("out.txt") == "made"
    assert stage.emulator.executions(job_id) == 1
    assert stage.emulator.journal.count("Execute", job_id=job_id) == 2

    # Attached to once more, the ended job gives its result at once.
    (stage.folder / "out.txt").unlink()
    stage.run("project", "job", "attach", "--id", job_id)
    assert stage.read("out.txt") == "made"
    assert stage.emulator.executions(job_id) == 1


@scenario
def test_execute_ends_with_the_program_error(stage: Stage) -> None:
    stage.write({
        "config.yaml": """\
            name: fails
            cmd: echo made > made.txt; echo so sorry >&2; exit 3
            outputs:
              - made.txt
              - nowhere.txt
              - nothing: NOTHING
        """,
    })  # fmt: skip
    command = stage.run("project", "job", "execute", "-p", stage.project_id, "-c", "config.yaml", code=1)
    assert "Program error occurred" in command.stdout
    assert "ProgramError: Program returned code 3" in command.stderr
    assert "so sorry" in command.stderr
    assert "Some output files were not uploaded due to errors:" in command.stdout
    for path in ("nowhere.txt", "nothing"):
        assert f"  * {path} (File {path} is not found.)" in command.stdout
    assert stage.read("made.txt") == "made\n"
    assert not (stage.folder / "nowhere.txt").exists()
    job = stage.emulator.job(stage.only_job())
    assert job.status == jobs_pb2.ERROR
    assert [error.output_file_desc.path for error in job.file_errors] == ["nowhere.txt", "nothing"]
