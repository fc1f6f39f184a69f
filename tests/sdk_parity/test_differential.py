"""The same forks through the official SDK and through us: equal Clone requests, equal uploads, equal refusals.

Where they differ, the SDK has a defect that is mended here: :data:`MENDED` lists them.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format

from airflow_provider_datasphere.client.connection.settings import Settings
from airflow_provider_datasphere.client.errors import DataSphereError
from airflow_provider_datasphere.client.sync_client import DataSphereClient
from cli_stage import environment_of
from datasphere_emulator import Emulator, Script
from harness.sdk_venv import PATIENCE, SdkVenv

RUNNER = Path(__file__).parents[1] / "support" / "harness" / "sdk_forks.py"
PRIVATE_IMAGE = {"image": "cr.yandex/x:1", "username": "me", "password": {"secret-id": "registry"}}

#: Name -> arguments of ``fork_job``, which both take or both refuse.
CASES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "args": {"args": {"RANGE": "1", "SEED": "приве́т"}},
    "empty arg": {"args": {"RANGE": ""}},
    "unknown arg": {"args": {"RAGNE": "1"}},
    "number as arg": {"args": {"RANGE": 1}},
    "file": {"vars": {"DATA": "new.csv"}},
    "file below a folder": {"vars": {"DATA": "./folder/../folder/a.txt"}},
    "absolute file": {"vars": {"DATA": "{here}/new.csv"}},
    "same content twice": {"vars": {"DATA": "new.csv", "MORE": "copy.csv"}},
    "folder": {"vars": {"DATA": "folder"}},
    "folder with slashes": {"vars": {"DATA": "./folder//"}},
    "absolute folder": {"vars": {"DATA": "{here}/folder"}},
    "empty folder": {"vars": {"DATA": "nothing"}},
    "file that is not there": {"vars": {"DATA": "nowhere.csv"}},
    "output": {"vars": {"RESULT": "other/out.csv"}},
    "absolute output": {"vars": {"RESULT": "/tmp/out.csv"}},
    "outputs trade places": {"vars": {"RESULT": "models/a", "MODEL": "out.csv"}},
    "output inside a kept one": {"vars": {"RESULT": "models/a/b"}},
    "output equal to a kept one": {"vars": {"RESULT": "models/a"}},
    "input equal to a kept one": {"vars": {"DATA": "more.csv"}},
    "input inside another": {"vars": {"DATA": "folder", "MORE": "folder/a.txt"}},
    "unknown var": {"vars": {"DATUM": "new.csv"}},
    "unnamed input": {"vars": {"main.py": "new.csv"}},
    "input and output": {"vars": {"DATA": "new.csv", "RESULT": "new/out.csv"}, "args": {"SEED": "2"}},
    "env_vars": {"env_vars": {"DEBUG": "1", "EMPTY": ""}},
    "name and desc": {"name": "my fork", "desc": "what it is for"},
    "image id": {"docker": "system-python-3-10"},
    "wrapped image": {"docker": {"docker": PRIVATE_IMAGE}},
    "wrapped image without password": {"docker": {"docker": {"image": "cr.yandex/x:1"}}},
    "plain password": {"docker": {"docker": {**PRIVATE_IMAGE, "password": "hunter2"}}},
    "working storage": {"working_storage": {"type": "SSD", "size": "100GB"}},
    "working storage rounded up": {"working_storage": {"size": str((150 << 30) + 1)}},
    "too small working storage": {"working_storage": {"size": "99GB"}},
    "working storage of another type": {"working_storage": {"type": "HDD", "size": "100GB"}},
    "working storage without size": {"working_storage": {"type": "SSD"}},
    "instance types": {"cloud_instance_types": ["g1.1", "c1.4"]},
    "everything": {
        "args": {"RANGE": "7"},
        "vars": {"DATA": "folder", "MORE": "new.csv", "RESULT": "made.csv"},
        "env_vars": {"A": "b"},
        "name": "n",
        "desc": "d",
        "docker": "bt10123456789abcdefg",
        "working_storage": {"size": "1TB"},
        "cloud_instance_types": ["g2.1"],
    },
}

#: Name -> arguments, and why the outcomes differ.
MENDED: dict[str, tuple[dict[str, Any], str]] = {
    "image": ({"docker": PRIVATE_IMAGE}, "the SDK drops a mapping that isn't wrapped in another one"),
    "empty file": (
        {"vars": {"DATA": "empty.csv"}},
        "the SDK uploads an empty file with Transfer-Encoding: chunked, which storages refuse",
    ),
    "uri as output": ({"vars": {"RESULT": "s3://bucket/out.csv"}}, "the SDK takes it for a path inside the job"),
}


@dataclass(frozen=True)
class Trace:
    """What one fork left behind, without what is random.

    :param error: what was said; None where a job runs.
    """

    error: str | None
    clone: Mapping[str, Any] | None
    parameters: Mapping[str, Any] | None
    uploads: tuple[tuple[str, int], ...]


class Service:
    """An emulator with the source job of all cases."""

    def __init__(self, emulator: Emulator) -> None:
        self.emulator = emulator
        self.source = emulator.create_scripted_job(
            Script(),
            files={"main.py": "pass", "in.csv": "1", "more.csv": "2"},
            inputs=["main.py", ("in.csv", "DATA"), ("more.csv", "MORE")],
            outputs=[("out.csv", "RESULT"), ("models/a", "MODEL"), "unnamed.txt"],
            args={"RANGE": "10", "SEED": "1"},
            env_vars={"DEBUG": "0"},
            name="template",
            desc="a template",
        )

    def traces(self, outcomes: list[dict[str, str]]) -> list[Trace]:
        """Cut the journal at each Clone and give each outcome its part."""
        clones = self.emulator.journal.calls("Clone")
        starts = [call.sequence for call in clones]
        puts: dict[int, list[tuple[str, int]]] = {start: [] for start in starts}
        for call in self.emulator.journal.calls("storage.put", code="OK"):
            clone = max(start for start in starts if start < call.sequence)
            assert call.request is not None
            puts[clone].append((call.request["sha256"], call.request["size"]))
        rest = iter(clones)
        traces = []
        for outcome in outcomes:
            if "error" in outcome and not self._cloned(outcome):
                traces.append(Trace(outcome["error"], None, None, ()))
                continue
            call = next(rest)
            assert call.request is not None
            request = {name: value for name, value in call.request.items() if name != "source_job_id"}
            parameters = None
            if "id" in outcome:
                assert outcome["id"] == call.job_id
                parameters = json_format.MessageToDict(self.emulator.job(call.job_id).job_parameters)
            traces.append(Trace(outcome.get("error"), request, parameters, tuple(sorted(puts[call.sequence]))))
        assert next(rest, None) is None
        return traces

    @staticmethod
    def _cloned(outcome: dict[str, str]) -> bool:
        """Whether a fork failed after its Clone: in the upload."""
        return "HTTPError" in outcome["error"]


@dataclass(frozen=True)
class Both:
    """Name of a case -> what it left behind."""

    sdk: Mapping[str, Trace]
    ours: Mapping[str, Trace]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    """All cases, through both, each with an emulator of its own, so that neither finds the other's files stored."""
    here = tmp_path_factory.mktemp("forks")
    for name, text in {"new.csv": "3,4", "copy.csv": "3,4", "more.csv": "5", "empty.csv": ""}.items():
        (here / name).write_text(text)
    (here / "folder" / "deep").mkdir(parents=True)
    (here / "nothing").mkdir()
    (here / "folder" / "a.txt").write_text("a")
    (here / "folder" / "deep" / "b.txt").write_text("b")
    for path in here.rglob("*"):
        os.utime(path, (1_700_000_000, 1_700_000_000))
    cases = {**CASES, **{name: arguments for name, (arguments, _) in MENDED.items()}}
    arguments = [json.loads(json.dumps(case).replace("{here}", str(here))) for case in cases.values()]
    with Emulator() as emulator:
        service = Service(emulator)
        sdk = service.traces(through_sdk(service, arguments, here))
    with Emulator() as emulator:
        service = Service(emulator)
        ours = service.traces(through_us(service, arguments, here))
    return Both(dict(zip(cases, sdk, strict=True)), dict(zip(cases, ours, strict=True)))


def through_sdk(service: Service, arguments: list[dict[str, Any]], folder: Path) -> list[dict[str, str]]:
    venv = SdkVenv().create()
    done = subprocess.run(
        [venv.python, RUNNER],
        input=json.dumps([{"source_job_id": service.source, **case} for case in arguments]),
        capture_output=True,
        text=True,
        cwd=folder,
        env={"PATH": os.defpath, "HOME": str(folder), "LANG": "C.UTF-8", **environment_of(service.emulator)},
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def through_us(service: Service, arguments: list[dict[str, Any]], folder: Path) -> list[dict[str, str]]:
    client = DataSphereClient(Settings.from_extra(service.emulator.connection_extra()))
    outcomes = []
    before = os.getcwd()
    os.chdir(folder)
    try:
        for case in arguments:
            try:
                outcomes.append({"id": client.fork_job(service.source, **case).id})
            except DataSphereError as error:
                outcomes.append({"error": str(error)})
    finally:
        os.chdir(before)
        client.close()
    return outcomes


@pytest.mark.parametrize("case", CASES)
def test_both_send_the_same(both: Both, case: str) -> None:
    sdk, ours = both.sdk[case], both.ours[case]
    assert ours.clone == sdk.clone
    assert ours.parameters == sdk.parameters
    assert ours.uploads == sdk.uploads
    assert (ours.error is None) == (sdk.error is None), (ours.error, sdk.error)


def test_the_cases_reach_both_ends(both: Both) -> None:
    """Neither are all of them refused, nor none."""
    refused = {case for case in CASES if both.ours[case].error is not None}
    assert refused == {
        "unknown arg",
        "number as arg",
        "file that is not there",
        "output inside a kept one",
        "output equal to a kept one",
        "input equal to a kept one",
        "input inside another",
        "unknown var",
        "unnamed input",
        "plain password",
        "too small working storage",
        "working storage of another type",
        "working storage without size",
    }
    assert any(both.ours[case].uploads for case in CASES)
    assert both.ours["everything"].clone is not None
    assert both.ours["everything"].clone["data_ttl"] == f"{14 * 86_400}s"


def test_a_described_image_is_not_dropped(both: Both) -> None:
    sdk, ours = both.sdk["image"], both.ours["image"]
    assert sdk.clone == both.sdk["nothing"].clone
    assert ours.clone == both.sdk["wrapped image"].clone


def test_an_empty_file_is_uploaded(both: Both) -> None:
    sdk, ours = both.sdk["empty file"], both.ours["empty file"]
    assert ours.clone == sdk.clone
    assert "411" in (sdk.error or "")
    assert ours.error is None
    assert [size for _, size in ours.uploads] == [0]


def test_a_uri_is_not_taken_for_a_path_inside_the_job(both: Both) -> None:
    assert both.sdk["uri as output"].error is None
    assert "path inside the job" in (both.ours["uri as output"].error or "")
    assert both.ours["uri as output"].clone is None
