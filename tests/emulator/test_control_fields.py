"""What is wrong with a request to the control API: status 400, with the field named."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest

from datasphere_emulator import Emulator

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def plain() -> Iterator[Emulator]:
    with Emulator(tls=False) as emulator:
        yield emulator


def refused(emulator: Emulator, method: str, path: str, body: Any = None) -> str:
    """The message of a refusal."""
    data = body.encode() if isinstance(body, str) else None if body is None else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {emulator.control_secret}"}
    request = urllib.request.Request(f"{emulator.url}/_control/{path}", data, headers, method=method)
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=20)
    assert caught.value.code == 400
    return str(json.load(caught.value)["error"]["message"])


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "The field 'cmd' is missing"),
        ({"files": {}}, "The field 'cmd' is missing"),
        ({"cmd": " "}, "cmd: must not be empty"),
        ({"cmd": None}, "cmd=None: must be a string"),
        ({"cmd": "x", "arg": {}}, "There is no field 'arg'. Did you mean 'args'?"),
        ({"cmd": "x", "colour": 1}, "There is no field 'colour'. Fields: cmd, files"),
        ({"cmd": "x", "args": {"N": 1}}, "args['N']=1: must be a string"),
        ({"cmd": "x", "args": ["N"]}, "args=['N']: must be a mapping"),
        ({"cmd": "x", "env_vars": {"E": None}}, "env_vars['E']=None: must be a string"),
        ({"cmd": "x", "files": {"f": 1}}, "files['f']=1: must be text, or {'base64'"),
        ({"cmd": "x", "files": ["f"]}, "files=['f']: must be a mapping"),
        ({"cmd": "x", "files": {"f": {"text": "1"}}}, "files['f']={'text': '1'}: must be text, or {'base64'"),
        ({"cmd": "x", "files": {"f": {"base64": "?"}}}, "files['f']: invalid base64"),
        ({"cmd": "x", "local_modules": {"f": 1}}, "local_modules['f']=1"),
        ({"cmd": "x", "inputs": "f"}, "inputs='f': must be a list of paths"),
        ({"cmd": "x", "inputs": ["gone"]}, "inputs: 'gone' is neither a file nor a directory"),
        ({"cmd": "x", "outputs": [["a", "B", "c"]]}, "outputs[0]=['a', 'B', 'c']: must be a path, or a pair"),
        ({"cmd": "x", "outputs": [{"a": "B"}]}, "outputs[0]={'a': 'B'}: must be a path"),
        ({"cmd": "x", "cloud_instance_types": "g1.1"}, "cloud_instance_types='g1.1': must be a list of strings"),
        ({"cmd": "x", "requirements": [1]}, "requirements[0]=1: must be a string"),
        ({"cmd": "x", "data_ttl": "soon"}, "data_ttl='soon': must be seconds"),
        ({"cmd": "x", "data_ttl": [1]}, "data_ttl=[1]: must be seconds"),
        ({"cmd": "x", "graceful_shutdown": "SIGTERM"}, "graceful_shutdown='SIGTERM': must be a pair"),
        ({"cmd": "x", "graceful_shutdown": ["TERM", 1]}, "graceful_shutdown[0]='TERM': must be a signal"),
        ({"cmd": "x", "graceful_shutdown": ["SIGNOT", 1]}, "graceful_shutdown[0]='SIGNOT': must be a signal"),
        ({"cmd": "x", "docker": 1}, "docker=1: must be a mapping"),
        ({"cmd": "x", "docker": {"image": "i"}}, "docker"),
        ({"cmd": "x", "working_storage_gb": "100"}, "working_storage_gb='100': must be an integer or null"),
        ({"cmd": "x", "output_datasets": [1]}, "output_datasets=[1]: must be a list of mappings"),
        ({"cmd": "x", "output_datasets": [{"colour": 1}]}, "output_datasets"),
        ({"cmd": "x", "attach_project_disk": 1}, "attach_project_disk=1: must be true or false"),
        ({"cmd": "x", "execute": "yes"}, "execute='yes': must be true or false"),
        ({"cmd": "x", "name": 5}, "name=5: must be a string"),
        ([], "must be a JSON object"),
        ("{", "The body is not valid JSON"),
    ],
)
def test_wrong_fields_of_a_job(plain: Emulator, body: Any, words: str) -> None:
    assert words in refused(plain, "POST", "jobs", body)
    assert plain.jobs() == []


@pytest.mark.parametrize(
    ("method", "path", "body", "words"),
    [
        ("POST", "scripted-jobs", {}, "The field 'script' is missing"),
        ("POST", "scripted-jobs", {"script": {"returncode": 1}}, "no field returncode"),
        ("POST", "scripted-jobs", {"script": {"log": 3}}, "script: log=3: must be a list"),
        ("POST", "scripted-jobs", {"script": {"log": [3]}}, "script: LogLine=3: must be a mapping"),
        ("POST", "scripted-jobs", {"script": {"log": [{"txt": "x"}]}}, "Did you mean 'text'?"),
        ("POST", "scripted-jobs", {"script": {"return_code": "1"}}, "script: return_code='1': must be an integer"),
        ("POST", "scripted-jobs", {"script": {}, "arg": {}}, "Did you mean 'args'?"),
        ("POST", "faults", {}, "The field 'method' is missing"),
        ("POST", "faults", {"method": "Get", "cod": "INTERNAL"}, "There is no field 'cod'. Did you mean 'code'?"),
        ("POST", "faults", {"method": "Get", "delay": "long"}, "delay='long': must be a number"),
        ("POST", "faults", {"method": "Get", "times": True}, "times=True: must be an integer or null"),
        ("POST", "projects", {"title": "x"}, "There is no field 'title'"),
        ("POST", "projects", {"name": 1}, "name=1: must be a string"),
        ("POST", "iam/tokens", {"lifetime": "1 h"}, "lifetime='1 h': must be a number or null"),
        ("POST", "iam/users", {}, "The field 'name' is missing"),
        ("PUT", "iam/roles", {"subject": "x"}, "The field 'role' is missing"),
        ("POST", "jobs/x/wait", {"timeout": "1"}, "timeout='1': must be a number"),
        ("POST", "jobs/x/cancel", {"gracefull": True}, "Did you mean 'graceful'?"),
        ("PATCH", "settings", {"colour": 1}, "There is no setting 'colour'"),
        ("PATCH", "settings", {"seed": "x"}, "seed='x'"),
        ("GET", "jobs?parents=x", None, "Did you mean 'parent'?"),
        ("GET", "journal?since=noon", None, "since='noon': must be a number"),
        ("GET", "journal?methods=Get", None, "Did you mean 'method'?"),
        ("GET", "jobs/x/log?limit=all", None, "limit='all': must be a number"),
    ],
)
def test_wrong_fields_of_other_requests(plain: Emulator, method: str, path: str, body: Any, words: str) -> None:
    assert words in refused(plain, method, path, body)


def test_the_python_api_names_fields_too(plain: Emulator) -> None:
    with pytest.raises(TypeError, match="Did you mean 'args'"):
        plain.create_job("true", arg={})
    with pytest.raises(TypeError, match=r"args\['N'\]=1: must be a string"):
        plain.create_job("true", args={"N": 1})
    with pytest.raises(TypeError, match="Did you mean 'outputs'"):
        plain.control_client().create_job("true", output=["x"])
    job_id = plain.create_job("true", outputs=(path for path in ("a", "b")))
    assert [desc.path for desc in plain.job(job_id).job_parameters.output_files] == ["a", "b"]
