"""Pages, control API and metadata service over real sockets."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web

from datasphere_emulator.access import Access
from datasphere_emulator.faults import Faults
from datasphere_emulator.http_app import TOKEN_PATH, build_app, build_metadata_app
from datasphere_emulator.journal import Journal
from datasphere_emulator.script import LogLine, Script
from datasphere_emulator.settings import Settings
from datasphere_emulator.state import EmulatorState

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SECRET = "open sesame"
GOOGLE = {"Metadata-Flavor": "Google"}


@dataclasses.dataclass
class Site:
    state: EmulatorState
    url: str
    metadata_url: str
    http: aiohttp.ClientSession

    @property
    def project_url(self) -> str:
        return f"{self.url}/communities/{self.state.community_id}/projects/{self.state.project_id}"

    async def page(self, url: str) -> tuple[int, str]:
        async with self.http.get(url) as response:
            return response.status, await response.text()

    async def control(self, method: str, path: str, body: Any = None, status: int = 200) -> Any:
        headers = {"Authorization": f"Bearer {SECRET}"}
        async with self.http.request(method, f"{self.url}/_control/{path}", json=body, headers=headers) as response:
            answer = await response.json()
            assert response.status == status, answer
            return answer


async def serve(app: web.Application) -> tuple[web.AppRunner, str]:
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return runner, f"http://127.0.0.1:{runner.addresses[0][1]}"


@pytest_asyncio.fixture
async def site(tmp_path) -> AsyncIterator[Site]:
    url = ""
    state = EmulatorState(
        tmp_path,
        Settings(),
        Journal(),
        Faults(),
        iam=None,
        url=lambda: url,
        endpoint=lambda: "127.0.0.1:1",
        owner=None,
    )
    access = Access(SECRET)
    runner, url = await serve(build_app(state, access))
    metadata_runner, metadata_url = await serve(build_metadata_app(state.iam, state.journal, state.faults, access))
    state.start()
    async with aiohttp.ClientSession() as http:
        yield Site(state, url, metadata_url, http)
    await state.stop(kill_programs=True)
    await runner.cleanup()
    await metadata_runner.cleanup()


class Links(HTMLParser):
    """The links of a page by their text, and whether the page is well-formed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: dict[str, str] = {}
        self._open: list[str] = []
        self._address: str | None = None
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self._open.append(tag)
        if tag == "a":
            self._address = dict(attributes)["href"]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag == "a":
            self._address = None

    def handle_data(self, data: str) -> None:
        if self._address is not None:
            self.links[data] = self._address


# Pages


async def test_from_the_projects_to_a_jobs_output_by_links_alone(site):
    job_id = site.state.create_scripted_job(
        Script(log=["hello <world>"], outputs={"out.txt": "42\n"}),
        cmd="python main.py ${DATA}",
        files={"data.csv": "1,2\n"},
        inputs=[("data.csv", "DATA")],
        outputs=["out.txt"],
        args={"EPOCHS": "5"},
        env_vars={"PASSWORD": "not for a page"},
        name="train & test",
        desc="nightly",
        execute=True,
    )
    await site.state.wait_job(job_id)
    async with site.http.get(site.url) as response:
        assert response.url.path == "/projects"
        projects = Links(await response.text())
    status, project = await site.page(site.url + projects.links["emulator"])
    assert status == 200
    status, page = await site.page(site.url + Links(project).links["train & test"])
    assert status == 200
    assert Links(project).links["train & test"].endswith(f"/projects/{site.state.project_id}/job/{job_id}")
    for expected in ("SUCCESS", "nightly", "python main.py ${DATA}", "hello &lt;world&gt;", "EPOCHS", "c1.4"):
        assert expected in page
    assert "not for a page" not in page
    assert "PASSWORD" in page
    assert 'http-equiv="refresh"' not in page
    links = Links(page).links
    async with site.http.get(urljoin(site.url, links["out.txt"])) as response:
        assert await response.read() == b"42\n"
    async with site.http.get(urljoin(site.url, links["data.csv"])) as response:
        assert await response.read() == b"1,2\n"


async def test_a_running_jobs_page_loads_itself_again_and_shows_the_end(site):
    job_id = site.state.create_scripted_job(Script(never_ends=True, log=["going on"]), execute=True)
    await site.state.wait_job(job_id, "EXECUTING")
    address = f"{site.project_url}/job/{job_id}"
    while "going on" not in (text := (await site.page(address))[1]):
        await asyncio.sleep(0.01)
    assert 'http-equiv="refresh"' in text
    assert "EXECUTING" in text
    assert 'http-equiv="refresh"' in (await site.page(site.project_url))[1]
    site.state.cancel_job(job_id, reason="enough")
    await site.state.wait_job(job_id, "CANCELLED")
    _, text = await site.page(address)
    assert "CANCELLED" in text
    assert "enough" in text
    assert 'http-equiv="refresh"' not in text


async def test_failed_jobs_forks_and_missing_outputs(site):
    parent = site.state.create_job("true")
    job_id = site.state.create_scripted_job(
        Script(return_code=3, missing_outputs=["model.bin"]), outputs=["model.bin"], execute=True
    )
    await site.state.wait_job(job_id, "ERROR")
    site.state.registry.find(job_id).job.parent_job_id = parent
    _, text = await site.page(f"{site.project_url}/job/{job_id}")
    assert "NOT_FOUND" in text
    assert "model.bin" in text
    assert Links(text).links[parent].endswith(f"/job/{parent}")


async def test_a_status_without_a_name_is_shown_as_a_number(site):
    job_id = site.state.create_job("true")
    site.state.registry.find(job_id).job.status = 77
    assert "77" in (await site.page(f"{site.project_url}/job/{job_id}"))[1]


async def test_cleared_data_have_no_links(site):
    job_id = site.state.create_scripted_job(Script(outputs={"out.txt": "42"}), outputs=["out.txt"], execute=True)
    await site.state.wait_job(job_id)
    site.state.clear_data(job_id)
    _, text = await site.page(f"{site.project_url}/job/{job_id}")
    assert "out.txt" in text
    assert "out.txt" not in Links(text).links
    assert "cleared" in text


async def test_a_long_log_shows_its_end_and_leads_to_all_of_it(site):
    text = "".join(f"line {number} ы\n" for number in range(20_000))
    job_id = site.state.create_scripted_job(
        Script(log=[LogLine(0, text), LogLine(0, "oops\n", "stderr"), LogLine(0, "7\n", "logs/train.log")]),
        execute=True,
    )
    await site.state.wait_job(job_id)
    _, page = await site.page(f"{site.project_url}/job/{job_id}")
    assert "line 19999 ы" in page
    assert "line 0 ы" not in page
    assert re.findall('data-log="([^"]+)"', page)[:2] == ["stdout", "stderr"]
    assert "oops" in page
    async with site.http.get(site.url + Links(page).links["Full log"]) as response:
        assert response.content_type == "text/plain"
        assert await response.text() == text
    status, log = await site.page(f"{site.project_url}/job/{job_id}/log/logs/train.log")
    assert (status, log) == (200, "7\n")
    assert (await site.page(f"{site.project_url}/job/{job_id}/log/other.log"))[0] == 404


async def test_unknown_pages(site):
    job_id = site.state.create_job("true")
    other = site.state.add_project("other")
    community = f"{site.url}/communities/{site.state.community_id}/projects"
    for address in (
        f"{site.project_url}/job/bt100000000000000000",
        f"{community}/bt100000000000000000",
        f"{community}/{other}/job/{job_id}",
        f"{site.url}/communities/bt100000000000000000/projects/{site.state.project_id}",
    ):
        status, text = await site.page(address)
        assert status == 404
        assert "Not found" in text
    status, text = await site.page(f"{community}/{other}")
    assert status == 200
    assert "No jobs yet" in text


# Control API


async def test_info_and_projects(site):
    info = await site.control("GET", "info")
    assert info["url"] == site.url
    assert info["project_id"] == site.state.project_id
    assert site.state.iam.subject_of(info["iam_token"]) == info["service_account_id"]
    made = await site.control("POST", "projects", {"name": "second"})
    listed = (await site.control("GET", "projects"))["projects"]
    assert {project["id"] for project in listed} == {site.state.project_id, made["id"]}


async def test_web_pages_cannot_use_the_control_api(site):
    headers = {"Origin": "https://example.com", "Content-Type": "text/plain", "Authorization": f"Bearer {SECRET}"}
    async with site.http.post(f"{site.url}/_control/jobs", data='{"cmd": "true"}', headers=headers) as response:
        assert response.status == 403
    assert site.state.jobs() == []


async def test_jobs_by_control(site):
    body = {
        "cmd": "cat data.bin > ${OUT}",
        "files": {"data.bin": {"base64": base64.b64encode(b"\xff\x00").decode()}},
        "outputs": [["out.bin", "OUT"]],
        "execute": True,
    }
    job_id = (await site.control("POST", "jobs", body))["id"]
    job = await site.control("POST", f"jobs/{job_id}/wait", {"timeout": 30})
    assert job["status"] == "SUCCESS"
    (output,) = job["output_files"]
    assert output["desc"] == {"path": "out.bin", "var": "OUT"}
    assert site.state.storage.path(site.state.project_id, output["sha256"]).read_bytes() == b"\xff\x00"
    executions = await site.control("GET", f"jobs/{job_id}/executions")
    assert executions["executions"] == 1
    operation = await site.control("GET", f"operations/{executions['operation_id']}")
    assert operation["done"] is True
    assert (await site.control("GET", f"jobs/{job_id}"))["id"] == job_id
    assert [job["id"] for job in (await site.control("GET", "jobs"))["jobs"]] == [job_id]
    assert (await site.control("GET", f"jobs?parent={job_id}"))["jobs"] == []
    await site.control("POST", f"jobs/{job_id}/clear-data")
    assert (await site.control("GET", f"jobs/{job_id}"))["data_cleared"] is True
    await site.control("DELETE", f"jobs/{job_id}")
    assert (await site.control("GET", f"jobs/{job_id}", status=404))["error"]["type"] == "NOT_FOUND"


async def test_scripted_jobs_by_control(site):
    body = {"script": [{"never_ends": True, "log": ["going on"]}], "name": "scripted", "execute": True}
    job_id = (await site.control("POST", "scripted-jobs", body))["id"]
    await site.control("POST", f"jobs/{job_id}/wait", {"status": "EXECUTING"})
    late = await site.control("POST", f"jobs/{job_id}/wait", {"timeout": 0.05}, status=408)
    assert late["error"]["type"] == "TimeoutError"
    running = await site.control("DELETE", f"jobs/{job_id}", status=400)
    assert running["error"]["type"] == "FAILED_PRECONDITION"
    await site.control("POST", f"jobs/{job_id}/cancel", {"reason": "enough"})
    await site.control("POST", f"jobs/{job_id}/wait", {"status": "CANCELLED"})
    wrong = await site.control("POST", f"jobs/{job_id}/wait", {"status": "SUCCESS"}, status=409)
    assert "CANCELLED" in wrong["error"]["message"]
    operation_id = site.state.operation_of(job_id)
    await site.control("DELETE", f"operations/{operation_id}")
    assert site.state.registry.operations.record(operation_id).forgotten
    await site.control("DELETE", "operations/unknown", status=404)


async def test_journal_by_control(site):
    async with site.http.get(site.metadata_url + TOKEN_PATH, headers=GOOGLE):
        pass
    async with site.http.get(site.metadata_url + TOKEN_PATH):
        pass
    assert len((await site.control("GET", "journal"))["calls"]) == 2
    (call,) = (await site.control("GET", "journal?method=metadata.token&code=OK&since=0"))["calls"]
    assert call["subject"] == site.state.service_account_id
    assert (await site.control("GET", "journal?job_id=other"))["calls"] == []
    await site.control("GET", "journal?color=red", status=400)
    await site.control("DELETE", "journal")
    assert site.state.journal.count() == 0


async def test_faults_by_control(site):
    first = await site.control("POST", "faults", {"method": "Get", "code": "UNAVAILABLE", "times": 3})
    await site.control("POST", "faults", {"method": "*", "delay": 0.5})
    faults = (await site.control("GET", "faults"))["faults"]
    assert [(fault["method"], fault.get("times")) for fault in faults] == [("Get", 3), ("*", None)]
    await site.control("DELETE", f"faults/{first['id']}")
    assert len(site.state.faults.active()) == 1
    await site.control("DELETE", f"faults/{first['id']}", status=404)
    await site.control("DELETE", "faults")
    assert site.state.faults.active() == []
    wrong = await site.control("POST", "faults", {"method": "Get", "code": "NOPE"}, status=400)
    assert "NOPE" in wrong["error"]["message"]
    await site.control("POST", "faults", {"method": "Get", "codes": "UNAVAILABLE"}, status=400)
    await site.control("POST", "faults", ["Get"], status=400)


async def test_settings_by_control(site):
    assert (await site.control("GET", "settings"))["clone_env_vars"] == "replace"
    changed = await site.control("PATCH", "settings", {"clone_env_vars": "merge", "url_lifetime_seconds": 5})
    assert (changed["clone_env_vars"], changed["url_lifetime_seconds"]) == ("merge", 5)
    assert site.state.settings.clone_env_vars == "merge"
    await site.control("PATCH", "settings", {"clone_env_vars": "both"}, status=400)
    await site.control("PATCH", "settings", {"no_such_setting": 1}, status=400)


async def test_accounts_by_control(site):
    iam, project_id = site.state.iam, site.state.project_id
    account = (await site.control("POST", "iam/service-accounts", {"name": "second"}))["id"]
    await site.control("PUT", "iam/roles", {"subject": account, "role": "viewer"})
    assert iam.role_of(account, project_id) == "viewer"
    token = await site.control("POST", "iam/tokens", {"subject": account, "lifetime": 60})
    assert iam.subject_of(token["token"]) == token["subject"] == account
    assert (await site.control("POST", "iam/revoke", {"subject": account})) == {"revoked": 1}
    with pytest.raises(Exception, match="revoked"):
        iam.subject_of(token["token"])
    key = await site.control("POST", "iam/keys", {"service_account_id": account})
    assert "BEGIN PRIVATE KEY" in key["private_key"]
    state = await site.control("GET", "iam")
    assert state["keys"] == [key["id"]]
    assert {"subject": account, "project_id": project_id, "role": "viewer"} in state["roles"]
    await site.control("DELETE", f"iam/keys/{key['id']}")
    await site.control("DELETE", f"iam/keys/{key['id']}", status=404)
    user = (await site.control("POST", "iam/users", {"name": "somebody"}))["id"]
    oauth = (await site.control("POST", "iam/oauth-tokens", {"user": user}))["token"]
    assert iam.subject_of(iam.exchange_oauth(oauth)) == user
    await site.control("POST", "iam/impersonations", {"service_account_id": account})
    assert iam.subject_of(iam.impersonate(site.state.service_account_id, account)) == account
    await site.control("PUT", "iam/roles", {"subject": account, "role": None})
    assert iam.role_of(account, project_id) is None
    own = await site.control("POST", "iam/tokens")
    assert own["subject"] == site.state.service_account_id
    await site.control("POST", "iam/tokens", {"subject": "nobody"}, status=404)


# Metadata service


async def test_the_metadata_service_gives_tokens_of_the_default_account(site):
    site.state.iam.token_lifetime = 600
    async with site.http.get(site.metadata_url + TOKEN_PATH, headers=GOOGLE) as response:
        assert response.status == 200
        answer = await response.json()
    assert site.state.iam.subject_of(answer["access_token"]) == site.state.service_account_id
    assert answer["token_type"] == "Bearer"
    assert 590 <= answer["expires_in"] <= 600
    (call,) = site.state.journal.calls("metadata.token")
    assert (call.code, call.effect) == ("OK", True)
    assert answer["access_token"] not in repr(call)


async def test_the_metadata_service_wants_its_header(site):
    async with site.http.get(site.metadata_url + TOKEN_PATH) as response:
        assert response.status == 403
    (call,) = site.state.journal.calls("metadata.token")
    assert (call.code, call.effect) == ("PERMISSION_DENIED", False)


async def test_faults_of_the_metadata_service(site):
    async def status() -> int:
        async with site.http.get(site.metadata_url + TOKEN_PATH, headers=GOOGLE) as response:
            return response.status

    site.state.faults.inject("metadata.token", code="UNAVAILABLE", times=1)
    assert await status() == 503
    site.state.faults.inject("metadata.*", status=500, times=1)
    assert await status() == 500
    site.state.faults.inject("metadata.token", rate_limit=1)
    assert [await status(), await status()] == [200, 429]
    site.state.faults.clear()
    site.state.faults.inject("metadata.token", hang=True)
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(status(), 0.2)
    site.state.faults.clear()
    assert await status() == 200
