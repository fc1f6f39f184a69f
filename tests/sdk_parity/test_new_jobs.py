"""The same configurations through the official CLI and through ExecuteJobOperator: equal jobs, equal uploads.

Where they differ, the CLI has a defect or a trap that is mended here: :data:`MENDED` lists them, and so does
``docs/new_jobs.md``.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import json_format

from airflow_provider_datasphere.client.submission.job_key import without_tag
from airflow_provider_datasphere.exceptions import JobRequestError
from airflow_provider_datasphere.operators.jobs import ExecuteJobOperator
from airflow_side import connect, context_of
from cli_stage import environment_of
from datasphere_emulator import Emulator
from harness.sdk_venv import PATIENCE, SdkVenv

RUNNER = Path(__file__).parents[1] / "support" / "harness" / "sdk_executions.py"
CONNECTOR, DATASET = "bt10123456789abcdefg", "bt1abcdefg0123456789"
LONG = " ".join(f"--option-{number} value-{number}" for number in range(250))

PYTHON = """\
env:
  python:
    type: manual
    version: 3.10
    requirements-file: plain.txt
    local-paths:
      - code.py
"""

#: Name -> the text of a config.yaml, which both take.
CASES: dict[str, str] = {
    "a command": "cmd: 'true'\n",
    "no line end": "cmd: 'true'",
    "name and desc": "name: a job\ndesc: what it is for\ncmd: 'true'\n",
    "unicode": "name: обучение\ndesc: модель «А» 🚀\ncmd: echo привет ${ИМЯ}\nargs:\n  ИМЯ: мир и труд\n",
    "integer args": "cmd: echo ${N} ${X} ${FLAG}\nargs: {N: 7, X: 0.10, FLAG: True}\n",
    "an empty arg": "cmd: echo ${N}\nargs:\n  N:\n",
    "inputs of all forms": """\
cmd: cat ${DATA} ${MORE} data.csv
inputs:
  - data.csv
  - copy.csv: DATA
  - other.csv:
      var: MORE
""",
    "null var": "cmd: 'true'\ninputs:\n  - x.nemo:\n",
    "a folder": "cmd: ls ${F}\ninputs:\n  - folder: F\n",
    "a folder with a slash": "cmd: ls\ninputs:\n  - folder/\n",
    "a path with dots": "cmd: cat ${A}\ninputs:\n  - ./folder/../data.csv: A\n",
    "names with blanks": "cmd: cat ${A}\ninputs:\n  - with blanks/a b.txt: A\n",
    "absolute input": "cmd: cat ${A}\ninputs:\n  - {here}/data.csv: A\n",
    "outputs of all forms": """\
cmd: "true"
outputs:
  - plain.txt
  - ckpt/
  - model.pt: MODEL
  - /tmp/result: RESULT
  - ../above.txt: ABOVE
""",
    "s3 and datasets": f"""\
cmd: ls ${{S3}} ${{{DATASET}}} ${{SET}}
s3-mounts:
  - {CONNECTOR}: S3
datasets:
  - {DATASET}: SET
""",
    "env vars as a list": "cmd: env\nenv:\n  vars:\n    - COLOUR: blue\n    - N: 12\n    - EMPTY: ''\n    - COPIED\n",
    "env vars as a mapping": "cmd: env\nenv:\n  vars:\n    COLOUR: blue\n    N: 12\n    EMPTY: ''\n",
    "system image": "cmd: 'true'\nenv:\n  docker: system-python-3-10\n",
    "private image": """\
cmd: "true"
env:
  docker:
    image: cr.yandex/x:1
    username: me
    password: {secret-id: registry}
""",
    "image without password": "cmd: 'true'\nenv:\n  docker:\n    image: cr.yandex/x/y:latest\n",
    "python": f"cmd: python code.py\n{PYTHON}",
    "python of a patch version": f"cmd: python code.py\n{PYTHON.replace('3.10', '3.11.4')}",
    "python with packages": f"cmd: python -m package.run\n{PYTHON}      - package\n      - folder/a.txt\n",
    "python with pip options": f"""\
cmd: python code.py
{PYTHON}    pip:
      index-url: https://index.example/simple
      extra-index-urls:
        - https://more.example/simple
        - https://other.example/simple
      trusted-hosts: [more.example]
      no-deps: 'true'
""",
    "python without no-deps": f"cmd: python code.py\n{PYTHON}    pip:\n      no-deps: 'false'\n",
    "inputs that overlap local paths": f"cmd: python code.py\ninputs:\n  - code.py\n{PYTHON}",
    "the project's disk": "cmd: ls ${DS_PROJECT_HOME}\nflags:\n  - attach-project-disk\n",
    "one instance type": "cmd: 'true'\ncloud-instance-types: g2.1\n",
    "instance types": "cmd: 'true'\ncloud-instance-types:\n  - gt4i.1\n  - g2.1\n  - c1.4\n",
    "old spelling": "cmd: 'true'\ncloud-instance-type: g1.1\n",
    "working storage": "cmd: 'true'\nworking-storage:\n  type: SSD\n  size: 1024Gb\n",
    "working storage in bytes": f"cmd: 'true'\nworking-storage:\n  size: {(150 << 30) + 1}\n",
    "output datasets": """\
cmd: ls ${TABLE} ${OTHER}
output-datasets:
  - name: table
    description: what was learnt
    size: 1537MB
    var: TABLE
    labels:
      team: vision
      year: 2026
  - name: other
    size: 1GB
    var: OTHER
""",
    "graceful shutdown": "cmd: 'true'\ngraceful-shutdown:\n  signal: SIGUSR1\n  timeout: 1d2h3m4s5ms\n",
    "graceful shutdown in seconds": "cmd: 'true'\ngraceful-shutdown:\n  timeout: 3600s\n",
    "graceful shutdown without timeout": "cmd: 'true'\ngraceful-shutdown:\n  signal: SIGINT\n",
    "spark": "cmd: 'true'\nspark:\n  connector: bt10123456789abcdefg\n",
    "spark with an id": "cmd: 'true'\nspark:\n  connector: {id: bt10123456789abcdefg}\n",
    "a long command": f"cmd: echo {LONG}\n",
    "a folded command": "cmd: >\n  echo\n  --lr 0.1\n  --out ${OUT}\noutputs:\n- a.txt: OUT\n",
    "a folded command with backslashes": "cmd: >\n  echo \\\n  --lr 0.1 \\\n  --name x\n",
    "a folded command, indented unequally": "cmd: >-\n  echo\n    --lr 0.1\n  --name x\n",
    "a literal command": "cmd: |\n  set -e\n  export HF_HOME=$HOME/hf\n  echo $((1 + 2)) $OTHER {{X}}\n",
    "anchors": "cmd: echo ${A}\nargs: {A: &x one}\nname: *x\n",
    "quotes and hashes": 'cmd: "echo \'#no comment\' \\"x\\"" # a comment\n',
    "everything": f"""\
name: all
desc: of it
cmd: python code.py ${{DATA}} ${{RESULT}} ${{N}} ${{S3}} ${{TABLE}} ${{DS_PROJECT_HOME}}
args: {{N: 1}}
inputs: [{{data.csv: DATA}}, folder]
outputs: [{{out.csv: RESULT}}]
s3-mounts: [{{{CONNECTOR}: S3}}]
flags: [attach-project-disk]
cloud-instance-types: [g1.1]
working-storage: {{size: 100GB}}
output-datasets: [{{name: t, var: TABLE, size: 2GB}}]
graceful-shutdown: {{timeout: 30s}}
{PYTHON}  vars: [A: b]
  docker: system-python-3-10
""",
}

#: Name -> a configuration; what stands in the CLI's outcome and in ours ("" for a job); and what is mended.
MENDED: dict[str, tuple[str, str, str, str]] = {
    "no local path": (
        "cmd: 'true'\n" + PYTHON.replace("local-paths:\n      - code.py", "local-paths: []"),
        "NoneType",
        "",
        "the CLI crashes on `local-paths: []`, which its documentation recommends",
    ),
    "comments in requirements": (
        "cmd: 'true'\n" + PYTHON.replace("plain.txt", "comments.txt"),
        "InvalidRequirement",
        "",
        "the CLI takes comments for requirements",
    ),
    "markers in requirements": (
        "cmd: 'true'\n" + PYTHON.replace("plain.txt", "markers.txt"),
        "markers are not supported",
        "",
        "the CLI refuses markers; here they are evaluated for the job's Python",
    ),
    "included requirements": (
        "cmd: 'true'\n" + PYTHON.replace("plain.txt", "including.txt"),
        "InvalidRequirement",
        "",
        "the CLI takes -r and -c for requirements",
    ),
    "options in requirements": (
        "cmd: 'true'\n" + PYTHON.replace("plain.txt", "options.txt"),
        "",
        "",
        "the CLI sends pip's options as requirements; here they become options of pip",
    ),
    "two null vars": (
        "cmd: 'true'\ninputs:\n  - x.nemo:\n  - data.csv:\n",
        "unique",
        "",
        "the CLI takes two entries without a variable for two variables of the same name",
    ),
    "two dots in a name": (
        "cmd: 'true'\ninputs:\n  - a..b.txt\n",
        "should be relative",
        "",
        "the CLI takes '..' within a name for a way out of the folder",
    ),
    "no env vars": (
        "cmd: env\nenv:\n  vars:\n",
        "should be a list",
        "",
        "the CLI wants a list, where an empty value is empty text",
    ),
    "an unknown key": (
        "cmd: 'true'\ndescription: x\n",
        "",
        "did you mean 'desc'?",
        "the CLI ignores unknown keys",
    ),
    "an unknown flag": ("cmd: 'true'\nflags: [attach-disk]\n", "", "unknown flag", "the CLI ignores unknown flags"),
    "a pattern": ("cmd: 'true'\noutputs: ['*.pt']\n", "", "is a pattern", "the service fails such a job at its end"),
    "an automatic environment": (
        "cmd: python code.py\nenv:\n  python: auto\n",
        "Main script",
        "write python: {type: manual",
        "the CLI imports the user's program",
    ),
    "an incomplete manual environment": (
        "cmd: python code.py\nenv:\n  python: {type: manual, version: 3.10}\n",
        "Main script",
        "requirements-file and local-paths are missing",
        "the CLI imports the user's program to find what is missing",
    ),
    "a key twice": ("cmd: 'false'\ncmd: 'true'\n", "", "line 1", "the CLI takes the last of two equal keys"),
    "a capital True": (
        "cmd: 'true'\n" + PYTHON + "    pip: {no-deps: True}\n",
        "",
        "write 'true'",
        "the CLI takes True for false",
    ),
    "a URI as output": (
        "cmd: 'true'\noutputs: ['s3://bucket/x': X]\n",
        "",
        "is a URI",
        "the CLI takes it for a path inside the job",
    ),
}


@dataclass(frozen=True)
class Trace:
    """The job that a configuration has led to, without what is random.

    :param error: what was said; None where a job runs.
    :param modules: content of the local modules' archives.
    """

    error: str | None
    job: Mapping[str, Any] | None = None
    config: str = ""
    modules: tuple[tuple[tuple[str, bytes], ...], ...] = ()
    uploads: frozenset[str] = frozenset()


def trace(emulator: Emulator, job_id: str) -> Trace:
    job = emulator.job(job_id)
    parameters = type(job.job_parameters)()
    parameters.CopyFrom(job.job_parameters)
    modules = []
    for module in parameters.env.python_env.local_modules:
        content = emulator.state.storage.path(job.project_id, module.sha256).read_bytes()
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            modules.append(tuple(sorted((name, archive.read(name)) for name in archive.namelist())))
        # The archive holds the time at which it was made, and the CLI sends the name of a temporary file.
        module.sha256 = module.desc.path = ""
        module.size_bytes = 0
    puts = {call.request["sha256"] for call in emulator.journal.calls("storage.put", code="OK") if call.request}
    uploads = frozenset(file.sha256 for file in parameters.input_files if file.sha256 in puts)
    for file in parameters.input_files:
        content = emulator.state.storage.path(job.project_id, file.sha256).read_bytes()
        assert hashlib.sha256(content).hexdigest() == file.sha256
    shown = {
        "parameters": json_format.MessageToDict(parameters),
        "name": job.name,
        "desc": without_tag(job.desc),
        "ttl": round((job.data_expires_at.seconds - job.created_at.seconds) / 60),
    }
    return Trace(None, shown, job.config, tuple(modules), uploads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("configs")
    texts = {
        "data.csv": "1,2",
        "copy.csv": "1,2",
        "other.csv": "3",
        "x.nemo": "x",
        "a..b.txt": "dots",
        "with blanks/a b.txt": "blanks",
        "folder/a.txt": "a",
        "folder/deep/b.txt": "b",
        "code.py": "print('hello')\n",
        "package/__init__.py": "",
        "package/run.py": "print('run')\n",
        "plain.txt": "torch==2.1\n\nnumpy>=1.26,<3\npandas[parquet] ~= 2.1\n",
        "comments.txt": "# what it needs\ntorch==2.1  # pinned\n\n",
        "markers.txt": "torch==2.1; python_version < '3.11'\nnumpy; sys_platform == 'win32'\n",
        "including.txt": "-r plain.txt\n-c pins/limits.txt\nscipy\n",
        "pins/limits.txt": "scipy==1.11.4\n",
        "options.txt": "--extra-index-url https://more.example/simple\n--trusted-host more.example\n--no-deps\ntorch\n",
    }
    for name, text in texts.items():
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(text)
    for number, text in enumerate([*CASES.values(), *(text for text, *_ in MENDED.values())]):
        (here / f"config-{number}.yaml").write_text(text.replace("{here}", str(here)))
    for path in here.rglob("*"):
        os.utime(path, (1_700_000_000, 1_700_000_000))
    return here


NAMES = [*CASES, *MENDED]


@pytest.fixture(scope="module")
def cli(folder: Path) -> dict[str, Trace]:
    """Name of a case -> what the CLI made of it."""
    venv = SdkVenv().create()
    with Emulator() as emulator:
        given = {"project_id": emulator.project_id, "configs": [f"config-{n}.yaml" for n in range(len(NAMES))]}
        environment = environment_of(emulator)
        done = subprocess.run(
            [venv.python, RUNNER],
            input=json.dumps(given),
            capture_output=True,
            text=True,
            cwd=folder,
            env={"PATH": os.defpath, "HOME": str(folder), "LANG": "C.UTF-8", "COPIED": "yes", **environment},
            timeout=PATIENCE,
        )
        assert done.returncode == 0, done.stderr
        outcomes = json.loads(done.stdout)
        return {
            name: trace(emulator, outcome["id"]) if "id" in outcome else Trace(outcome["error"])
            for name, outcome in zip(NAMES, outcomes, strict=True)
        }


def through_operator(folder: Path, *, as_mapping: bool) -> Iterator[tuple[str, Trace]]:
    with pytest.MonkeyPatch.context() as patch, Emulator() as emulator:
        connect(emulator, patch)
        patch.setenv("COPIED", "yes")
        for number, name in enumerate(NAMES):
            path = folder / f"config-{number}.yaml"
            given: Any = path
            if as_mapping:
                given = yaml.load(path.read_text(), Loader=yaml.BaseLoader)
            try:
                task = ExecuteJobOperator(
                    task_id=f"task-{number}", config=given, base_dir=folder, wait_for_completion=False
                )
                job_id = task.execute(context_of(task))
            except JobRequestError as error:
                yield name, Trace(str(error))
            else:
                yield name, trace(emulator, job_id)


@pytest.fixture(scope="module")
def as_file(folder: Path) -> dict[str, Trace]:
    return dict(through_operator(folder, as_mapping=False))


@pytest.fixture(scope="module")
def as_mapping(folder: Path) -> dict[str, Trace]:
    return dict(through_operator(folder, as_mapping=True))


@pytest.mark.parametrize("case", CASES)
def test_a_file_makes_the_same_job(cli: dict[str, Trace], as_file: dict[str, Trace], case: str) -> None:
    expected, made = cli[case], as_file[case]
    assert expected.error is None
    assert made == expected


@pytest.mark.parametrize("case", CASES)
def test_a_mapping_makes_the_same_job(cli: dict[str, Trace], as_mapping: dict[str, Trace], case: str) -> None:
    expected, made = cli[case], as_mapping[case]
    assert made.error is None
    assert (made.job, made.modules, made.uploads) == (expected.job, expected.modules, expected.uploads)
    stored = yaml.load(made.config, Loader=yaml.BaseLoader)
    assert stored == yaml.load(expected.config, Loader=yaml.BaseLoader)


@pytest.mark.parametrize("case", MENDED)
def test_what_differs_is_listed(
    cli: dict[str, Trace], as_file: dict[str, Trace], as_mapping: dict[str, Trace], case: str
) -> None:
    _, in_cli, in_ours, _ = MENDED[case]
    outcomes = [(cli[case], in_cli), (as_file[case], in_ours)]
    if case not in ("a key twice", "a capital True"):  # which a mapping can't have
        outcomes.append((as_mapping[case], in_ours))
    for outcome, text in outcomes:
        assert (outcome.error is None) == (not text), outcome.error
        assert text in (outcome.error or "")
    parameters = as_file[case].job
    if parameters is None:
        return
    python = parameters["parameters"].get("env", {}).get("pythonEnv", {})
    if case == "markers in requirements" or case == "comments in requirements":
        assert python["requirements"] == ["torch==2.1"]
    elif case == "included requirements":
        assert python["requirements"][-1] == "scipy==1.11.4"
    elif case == "options in requirements":
        assert python["requirements"] == ["torch"]
        assert python["pipOptions"] == {
            "extraIndexUrls": ["https://more.example/simple"],
            "trustedHosts": ["more.example"],
            "noDeps": True,
        }
        expected = cli[case].job
        assert expected is not None
        assert "--no-deps" in expected["parameters"]["env"]["pythonEnv"]["requirements"]
    elif case == "no local path":
        assert "localModules" not in python
