"""Wrong configurations: each is refused before a job is made, and the message says file, line and what to write."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_datasphere.client.connection.settings import Settings
from airflow_provider_datasphere.client.errors import JobRequestError
from airflow_provider_datasphere.client.sync_client import DataSphereClient
from datasphere_emulator import Emulator

PYTHON = "env:\n  python:\n    type: manual\n    version: '3.11'\n    requirements-file: {file}\n    local-paths: []\n"

#: Name -> text of the configuration; the lines that are told, without the file's name where it is the configuration's.
WRONG: dict[str, tuple[str, list[str]]] = {
    "nothing": ("", ["config.yaml: the configuration is empty: it needs at least cmd."]),
    "a list": ("- cmd\n", ["config.yaml:1: this is a list: a configuration is a mapping"]),
    "a text": ("cmd\n", ["config.yaml:1: this is text: a configuration is a mapping"]),
    "not YAML": ("cmd: [\n", ["config.yaml:2: this is not YAML:"]),
    "a tab": ("cmd: x\nargs:\n\tA: 1\n", ["config.yaml:3: this is not YAML:", "indented with spaces"]),
    "an unquoted template": ("cmd: x\nname: {{ ds }}\n", ["config.yaml:2: "]),
    "no command": ("name: x\n", ["config.yaml:1: cmd is missing"]),
    "an empty command": ("cmd:\n", ["config.yaml:1: cmd: this is empty"]),
    "a command of blanks": ("cmd: '  '\n", ["config.yaml:1: cmd: this is empty"]),
    "a command as a list": ("cmd: [a, b]\n", ["config.yaml:1: cmd: this is a list: give the command as one text"]),
    "an unknown reference": ("cmd: echo\n  ${X}\n", ["config.yaml:1: cmd: ${X} is neither", "write $X"]),
    "the shell's own": ("cmd: cd ${HOME}\nargs: {A: b}\n", ["write $HOME. Known are A."]),
    "the disk without the flag": ("cmd: ls ${DS_PROJECT_HOME}\n", ["add 'flags: [attach-project-disk]'"]),
    "an unknown key": ("cmd: x\nouputs: []\n", ["config.yaml:2: unknown key 'ouputs'; did you mean 'outputs'?"]),
    "a known mistake": ("cmd: x\ndescription: y\n", ["config.yaml:2: unknown key 'description'; did you mean 'desc'?"]),
    "an argument's key": ("cmd: x\nproject-id: y\n", ["config.yaml:2: 'project-id' is not a key", "project_id"]),
    "a merge key": ("cmd: x\nargs:\n  <<: {A: b}\n  B: c\nfoo: {}\n", ["config.yaml:5: unknown key 'foo'"]),
    "an unknown key below": (
        "cmd: x\nenv:\n  variables: []\n",
        ["config.yaml:3: env: unknown key 'variables'; did you mean 'vars'?"],
    ),
    "a key twice": ("cmd: x\nname: a\nname: b\n", ["config.yaml:3: 'name' stands here and in line 2: keep one"]),
    "args as a list": (
        "cmd: x\nargs: [A]\n",
        ["config.yaml:2: args: this is a list, not a mapping: write NAME: value"],
    ),
    "an arg with a list": ("cmd: x\nargs:\n  A: [1]\n", ["config.yaml:3: args.A: this is a list"]),
    "inputs as a mapping": (
        "cmd: x\ninputs:\n  data.csv: A\n",
        ["config.yaml:3: inputs: this is a mapping, not a list"],
    ),
    "an empty input": ("cmd: x\ninputs:\n  -\n", ["config.yaml:3: inputs[0]: an entry is empty"]),
    "two paths in one": (
        "cmd: x\ninputs:\n  - data.csv: A\n    more.csv: B\n",
        ["config.yaml:3: inputs[0]: one entry has 2 paths (data.csv, more.csv): begin each with '- '."],
    ),
    "a missing input": (
        "cmd: x\ninputs:\n  - none.csv\n",
        ["config.yaml:3: inputs[0]: 'none.csv' doesn't exist (looked"],
    ),
    "an absolute input": ("cmd: x\ninputs: [/etc/hosts]\n", ["is absolute, which needs a variable"]),
    "an input outside": ("cmd: x\ninputs: [../x]\n", ["leads out of the job's folder", "doesn't exist"]),
    "an input twice": (
        "cmd: x\ninputs:\n  - data.csv: A\n  - ./data.csv\n",
        ["config.yaml:4: inputs[1]: './data.csv' stands here and in line 3: keep one."],
    ),
    "overlapping inputs": (
        "cmd: x\ninputs:\n  - folder/a.txt\n  - folder: F\n",
        ["config.yaml:4: inputs[1]: 'folder' and 'folder/a.txt' in line 3 overlap"],
    ),
    "a bad variable": (
        "cmd: x\ninputs:\n  - data.csv: a b\n",
        ["config.yaml:3: inputs[0]: 'a b' can't name a variable"],
    ),
    "a reserved variable": ("cmd: x\noutputs:\n  - a: DS_PROJECT_HOME\n", ["DS_PROJECT_HOME is reserved"]),
    "a variable twice": (
        "cmd: x\ninputs:\n  - data.csv: A\noutputs:\n  - out.csv: A\n",
        ["config.yaml:5: outputs[0]: the name 'A' stands for an output here and for an input in line 3: rename one."],
    ),
    "a variable that is an argument": (
        "cmd: x\nargs: {A: b}\ninputs:\n  - data.csv: A\n",
        ["config.yaml:4: inputs[0]: the name 'A' stands for an input here and for an argument"],
    ),
    "a pattern": ("cmd: x\noutputs:\n  - 'a/*_last.pt'\n", ["config.yaml:3: outputs[0]: 'a/*_last.pt' is a pattern"]),
    "an output outside": ("cmd: x\noutputs: [../x]\n", ["leads out of the job's folder"]),
    "overlapping outputs": ("cmd: x\noutputs: [a, a/b]\n", ["'a/b' and 'a' in line 2 overlap: give the outer one"]),
    "a URI as output": ("cmd: x\noutputs:\n  - 's3://b/k': A\n", ["is a URI: give the path inside the job"]),
    "a URI as input without variable": ("cmd: x\ninputs: ['s3://b/k']\n", ["is a URI, which needs a variable"]),
    "too many outputs": (
        "cmd: x\noutputs:\n" + "".join(f"  - file-{n}\n" for n in range(101)),
        ["config.yaml:103: outputs: there are 101 entries, 100 are allowed"],
    ),
    "no id of a connector": ("cmd: x\ns3-mounts:\n  - bucket: B\n", ["'bucket' is no id of an S3 connector"]),
    "a variable of the environment": (
        "cmd: x\nenv:\n  vars:\n    - NOT_THERE\n",
        ["no variable NOT_THERE: write '- N"],
    ),
    "a plain password": (
        "cmd: x\nenv:\n  docker:\n    image: i\n    password: hunter2\n",
        ["config.yaml:5: env.docker.password: a password must not stand here in plain text"],
    ),
    "an image without name": ("cmd: x\nenv:\n  docker: {username: me}\n", ["env.docker: image is missing"]),
    "spark in an own image": (
        "cmd: x\nenv: {docker: i}\nspark: {connector: bt10123456789abcdefg}\n",
        ["Spark doesn't run in an image of one's own"],
    ),
    "an unknown flag": (
        "cmd: x\nflags: [attach-disk]\n",
        ["unknown flag 'attach-disk': there is one, attach-project-disk"],
    ),
    "a small storage": (
        "cmd: x\nworking-storage: {size: 99GB}\n",
        ["working-storage.size: 99GB is too small: at least 100GB"],
    ),
    "no size": ("cmd: x\nworking-storage: {type: SSD}\n", ["working-storage: size is missing"]),
    "a bad size": ("cmd: x\nworking-storage: {size: 1.5TB}\n", ["'1.5TB' is no size"]),
    "another storage": ("cmd: x\nworking-storage: {type: HDD, size: 100GB}\n", ["'HDD': DataSphere offers SSD"]),
    "a dataset without size": (
        "cmd: x\noutput-datasets:\n  - name: t\n    var: T\n",
        ["config.yaml:3: output-datasets[0]: size is missing"],
    ),
    "two datasets of a name": (
        "cmd: x\noutput-datasets:\n  - {name: t, var: T, size: 1GB}\n  - {name: t, var: U, size: 1GB}\n",
        ["config.yaml:4: output-datasets[1].name: there are two datasets named 't'"],
    ),
    "a bad duration": ("cmd: x\ngraceful-shutdown: {timeout: 3600}\n", ["'3600' is no duration: write it as 3600s."]),
    "a bad signal": ("cmd: x\ngraceful-shutdown: {signal: KILL}\n", ["'KILL' can't be sent: give one of SIGHUP,"]),
    "spark without id": ("cmd: x\nspark: {}\n", ["the connector's id is missing"]),
    "an automatic environment": (
        "cmd: python program.py\nenv:\n  python: auto\n",
        [
            "config.yaml:3: env.python: an automatic environment",
            "local-paths: [program.py, helper.py, package]}",
            "numpy",
        ],
    ),
    "automatic by its type": ("cmd: python -m package\nenv:\n  python: {type: auto}\n", ["local-paths: [package]}"]),
    "root paths": (
        "cmd: x\nenv:\n  python: {type: manual, version: '3.11', root-paths: [a.py]}\n",
        ["list what to ship in local-paths", "requirements-file and local-paths are missing"],
    ),
    "a bad version": (
        "cmd: x\n" + PYTHON.replace("'3.11'", "'2.7'").replace("{file}", "good.txt"),
        ["config.yaml:5: env.python.version: '2.7' is no version of Python 3"],
    ),
    "local paths as text": (
        "cmd: x\n" + PYTHON.replace("[]", "../.env").replace("{file}", "good.txt"),
        ["config.yaml:7: env.python.local-paths: this is text, not a list"],
    ),
    "no requirements file": (
        "cmd: x\n" + PYTHON.replace("{file}", "none.txt"),
        ["config.yaml:6: env.python.requirements-file: 'none.txt' doesn't exist"],
    ),
    "bad requirements": (
        "cmd: x\n" + PYTHON.replace("{file}", "bad.txt"),
        [
            "bad.txt:2: '-e ./lib' is an editable install",
            "bad.txt:3: 'git+https://…@host/x' is a path or URL",
            "bad.txt:4: './wheels/x.whl' is a path or URL",
            "bad.txt:5: pkg comes from a URL",
            "bad.txt:6: the option --find-links can't be passed",
            "bad.txt:7: 'two words' is no requirement",
            "bad.txt:8: -r none.txt: there is no file",
        ],
    ),
    "a fault in an included file": (
        "cmd: x\n" + PYTHON.replace("{file}", "including.txt"),
        ["bad.txt:7: 'two words' is no requirement"],
    ),
    "a capital True": (
        "cmd: x\n" + PYTHON.replace("{file}", "good.txt") + "    pip: {no-deps: True}\n",
        ["config.yaml:8: env.python.pip.no-deps: 'True' is taken for false by the official CLI: write 'true'."],
    ),
    "three faults": (
        "cmd: echo ${X}\nouputs: []\ninputs: [none.csv]\n",
        [
            "config.yaml:1: cmd: ${X}",
            "config.yaml:2: unknown key",
            "config.yaml:3: inputs[0]: 'none.csv' doesn't exist",
        ],
    ),
}


@pytest.fixture(scope="module")
def emulator() -> Iterator[Emulator]:
    with Emulator(tls=False) as running:
        yield running


@pytest.fixture
def project(tmp_path: Path) -> Path:
    texts = {
        "data.csv": "1",
        "more.csv": "2",
        "folder/a.txt": "a",
        "program.py": "import json, numpy, helper\nfrom package import part\n",
        "helper.py": "",
        "package/__init__.py": "",
        "package/__main__.py": "",
        "good.txt": "torch\n",
        "bad.txt": (
            "torch\n-e ./lib\ngit+https://me:secret@host/x\n./wheels/x.whl\npkg @ https://host/x.whl\n"
            "--find-links https://host\ntwo words\n-r none.txt\n"
        ),
        "including.txt": "-r bad.txt\n",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_configuration_makes_no_job(
    emulator: Emulator, project: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, told = WRONG[case]
    (project / "config.yaml").write_text(text)
    monkeypatch.chdir(project)
    client = DataSphereClient(Settings.from_extra(emulator.connection_extra()))
    with pytest.raises(JobRequestError) as caught:
        client.execute_job("config.yaml")
    message = str(caught.value)
    for part in told:
        assert part in message
    assert "hunter2" not in message
    assert "secret@" not in message
    assert emulator.journal.calls("Create") == []
    assert len(message.splitlines()) == 1 + len(
        [line for line in message.splitlines() if ".yaml" in line or ".txt" in line]
    )


def test_three_faults_are_three_lines(emulator: Emulator, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "config.yaml").write_text(WRONG["three faults"][0])
    monkeypatch.chdir(project)
    client = DataSphereClient(Settings.from_extra(emulator.connection_extra()))
    with pytest.raises(JobRequestError) as caught:
        client.execute_job("config.yaml")
    head, *lines = str(caught.value).splitlines()
    assert head == "The configuration of the job has 3 faults; nothing was sent."
    assert [line.split(": ")[0] for line in lines] == ["config.yaml:1", "config.yaml:2", "config.yaml:3"]


def test_a_file_that_is_too_large(emulator: Emulator, project: Path) -> None:
    for name, size in {"large": (5 << 30) + 1, "half": 5 << 30}.items():
        with (project / name).open("wb") as file:
            os.truncate(file.fileno(), size)
    (project / "config.yaml").write_text("cmd: x\ninputs: [large, half]\n")
    client = DataSphereClient(Settings.from_extra(emulator.connection_extra()))
    with pytest.raises(JobRequestError) as caught:
        client.execute_job(project / "config.yaml")
    assert "'large' has 5368709121 bytes: DataSphere takes at most 5368709120 (5 GiB) each." in str(caught.value)
    assert "10737418241 bytes together" in str(caught.value)
    assert emulator.journal.calls("Create") == []


#: Name -> arguments of ``execute_job``, and what is told.
WRONG_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown arg": ({"args": {"M": "1"}}, "args names 'M', which the configuration doesn't have; its arguments: N."),
    "unknown var": ({"vars": {"X": "a"}}, "vars names 'X', which the configuration doesn't have"),
    "number": ({"args": {"N": 1}}, "args['N'] is 1 (int): DataSphere takes strings; write '1'"),
    "empty path": ({"vars": {"DATA": ""}}, "vars['DATA'] is ''"),
    "missing path": ({"vars": {"DATA": "none"}}, "arguments: vars['DATA']: 'none' doesn't exist"),
    "pattern": ({"vars": {"OUT": "*.pt"}}, "'*.pt' is a pattern"),
    "URI as output": ({"vars": {"OUT": "s3://b/k"}}, "is a URI: give the path inside the job"),
    "types": ({"cloud_instance_types": "g1.1"}, "give a list, such as ['g1.1']"),
    "storage": ({"working_storage": {"size": "1GB"}}, "at least 100GB"),
    "docker": ({"docker": {"username": "me"}}, "'image' is needed"),
    "ttl": ({"data_ttl": 0}, "data_ttl is 0"),
    "project": ({"project_id": " "}, ""),
}


@pytest.mark.parametrize("case", WRONG_ARGUMENTS)
def test_a_wrong_argument_makes_no_job(emulator: Emulator, project: Path, case: str) -> None:
    arguments, told = WRONG_ARGUMENTS[case]
    extra = emulator.connection_extra() if case != "project" else {**emulator.connection_extra(), "project_id": ""}
    client = DataSphereClient(Settings.from_extra(extra))
    config = {"cmd": "x ${N}", "args": {"N": 1}, "inputs": [{"data.csv": "DATA"}], "outputs": [{"out": "OUT"}]}
    with pytest.raises(JobRequestError) as caught:
        client.execute_job(config, base_dir=project, **arguments)
    assert told in str(caught.value)
    assert emulator.journal.calls("Create") == []
