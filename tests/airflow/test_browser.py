"""A person at the screen: Chromium on a real Airflow's pages and on the emulator's.

``SCREENSHOTS=<folder>`` keeps pictures of the way; those in docs/images were made so.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect, sync_playwright

from airflow_provider_datasphere.get_provider_info import CONNECTION_FIELDS
from datasphere_emulator import Emulator
from form_digest import form_digest
from harness import RealAirflow

#: Chromium by any of the names that distributions give it.
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = [
    *("--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]
#: Generous, in milliseconds: pages of a busy machine take their time.
PATIENCE = 90_000

pytestmark = [
    pytest.mark.airflow,
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None, reason="no Chromium here: apt-get install chromium (as root, `make test` does that itself)"
    ),
]

#: The contract's fields, and which of them must not be readable over a shoulder.
FIELDS = {
    "iam_token": "secret",
    "service_account_json": "secret",
    "service_account_json_path": "",
    "oauth": "secret",
    "impersonate_service_account_id": "",
    "project_id": "",
    "endpoint": "",
    "operation_endpoint": "",
    "iam_endpoint": "",
    "ui_endpoint": "",
    "root_certificates": "",
    "insecure": "switch",
}

PROGRAM = """
import sys, time
from pathlib import Path

rows = int(sys.argv[1])
for row in range(rows):
    print(f"row {{row + 1}} of {{rows}}")
while not Path({flag!r}).exists():
    time.sleep(0.1)
Path("result.txt").write_text("done")
print("wrote result.txt")
"""

DAG = """
from datetime import datetime

try:
    from airflow.sdk import DAG
except ImportError:
    from airflow.models.dag import DAG

from airflow_provider_datasphere.operators.jobs import ForkJobOperator

with DAG("by_hand", schedule=None, start_date=datetime(2024, 1, 1), default_args={{"retries": 0}}):
    ForkJobOperator(
        task_id="fork", source_job_id="{source}", args={{"ROWS": "5"}}, poll_interval=1, datasphere_conn_id="by_hand"
    )
"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Browser, tmp_path: Path) -> Iterator[Page]:
    context = chromium.new_context(viewport={"width": 1100, "height": 850}, locale="en-US", color_scheme="light")
    context.set_default_timeout(PATIENCE)
    expect.set_options(timeout=PATIENCE)
    page = context.new_page()
    yield page
    # pytest keeps the folders of the last runs: what was on the screen when a test failed.
    page.screenshot(path=tmp_path / "last.png")
    context.close()


@pytest.fixture
def emulator() -> Iterator[Emulator]:
    with Emulator(tls=False) as emulator:
        yield emulator


@pytest.fixture
def flag(tmp_path: Path) -> Path:
    """The program ends when this file appears."""
    return tmp_path / "end"


def photograph(page: Page, name: str) -> None:
    """Keep a picture, if asked."""
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(folder, f"{name}.png"), animations="disabled")
        # What it shows is noted, so that a picture that is older than the form can be told.
        notes = Path(folder, "screenshots.json")
        taken = json.loads(notes.read_text()) if notes.exists() else {}
        notes.write_text(json.dumps({**taken, name: form_digest()}, indent=2, sort_keys=True) + "\n")


def create_source_job(emulator: Emulator, flag: Path) -> str:
    return emulator.create_job(
        "python main.py ${ROWS}",
        files={"main.py": PROGRAM.format(flag=str(flag))},
        outputs=[("result.txt", "RESULT")],
        args={"ROWS": "1"},
        name="count-rows",
    )


def see_the_job(task_page: Page, emulator: Emulator, status: str) -> Page:
    """Click the task's button, and see the job's page of that status."""
    with task_page.expect_popup() as opened:
        task_page.get_by_role("link", name="DataSphere job").click()
    job_page = opened.value
    (job,) = [job for job in emulator.jobs() if job.parent_job_id]
    assert job_page.url == (
        f"{emulator.url}/communities/{emulator.community_id}/projects/{emulator.project_id}/job/{job.id}"
    )
    expect(job_page.get_by_role("heading", name="count-rows")).to_be_visible()
    expect(job_page.locator("#status")).to_have_text(status)
    expect(job_page.locator("[data-log=stdout]")).to_contain_text("row 5 of 5")
    return job_page


# Airflow 3 ---------------------------------------------------------------------------------------------------------


def open_form(page: Page, airflow: RealAirflow, conn_id: str) -> Locator:
    """*Admin → Connections → Add Connection*, this id, our type."""
    page.goto(f"http://127.0.0.1:{airflow.home.port}/connections")
    page.get_by_role("button", name="Add Connection").click()
    form = page.get_by_role("dialog")
    form.get_by_label("Connection ID").fill(conn_id)
    form.get_by_role("combobox").fill("datasphere")
    page.get_by_role("option", name="Yandex DataSphere").click()
    return form


def fold_out(form: Locator) -> None:
    form.get_by_role("button", name="Extra Fields", exact=True).click()
    expect(form.get_by_text("Project ID")).to_be_visible()


def field(form: Locator, name: str) -> Locator:
    return form.locator(f"[name=element_{name}]")


def repair_test_button(page: Page, airflow: RealAirflow) -> None:
    """Airflow 3.3.1 and 3.3.2 refuse to test any saved connection without a port: their page says that it is 0, and
    their API takes that for a change of the address (apache/airflow#73298)."""

    def say_that_there_is_none(route: Route) -> None:
        route.continue_(post_data=json.dumps(json.loads(route.request.post_data or "") | {"port": None}))

    if airflow.version in ("3.3.1", "3.3.2"):
        page.route("**/api/v2/connections/test", say_that_there_is_none)


def test_the_form(page: Page, airflow3: RealAirflow) -> None:
    form = open_form(page, airflow3, "just_looking")
    expect(form.get_by_text("Description", exact=True)).to_be_visible()
    for label in ("Host", "Login", "Password", "Port", "Schema"):
        expect(form.get_by_text(label, exact=True)).to_have_count(0)
    fold_out(form)
    inputs = form.locator("[name^=element_]")
    assert {input.get_attribute("name") for input in inputs.all()} == {f"element_{name}" for name in FIELDS}
    for name, kind in FIELDS.items():
        described = CONNECTION_FIELDS[name]
        expect(form.get_by_text(described["label"], exact=True)).to_be_visible()
        expect(form.get_by_text(described["description"])).to_be_visible()
        type_ = {"secret": "password", "switch": "checkbox"}.get(kind)
        if type_ is None:
            expect(field(form, name)).not_to_have_attribute("type", re.compile("password|checkbox"))
        else:
            expect(field(form, name)).to_have_attribute("type", type_)


def test_from_the_form_to_the_jobs_page(page: Page, airflow3: RealAirflow, emulator: Emulator, flag: Path) -> None:
    # The connection.
    form = open_form(page, airflow3, "by_hand")
    fold_out(form)
    field(form, "project_id").fill(emulator.project_id)
    field(form, "service_account_json").fill(json.dumps(emulator.service_account_key(), indent=2))
    field(form, "endpoint").fill(emulator.endpoint)
    field(form, "ui_endpoint").fill(emulator.url)
    form.locator("label", has=page.locator("[name=element_insecure]")).click()
    expect(field(form, "insecure")).to_be_checked()
    field(form, "project_id").focus()
    photograph(page, "connection-form")
    form.get_by_role("button", name="Save").click()
    expect(form).to_be_hidden()

    # Its test.
    repair_test_button(page, airflow3)
    row = page.get_by_role("row", name="by_hand")
    row.get_by_role("button", name="Test Connection").click()
    message = page.get_by_text("Connected as service account")
    expect(message).to_contain_text(f"Project 'emulator' ({emulator.project_id}) exists")
    photograph(page, "connection-test")
    emulator.iam.set_role(emulator.service_account_id, emulator.project_id, None)
    row.get_by_role("button", name="Test Connection").click()
    expect(page.get_by_text(f"has no role in project {emulator.project_id}: add it as Developer")).to_be_visible()
    emulator.iam.set_role(emulator.service_account_id, emulator.project_id, "developer")

    # The task.
    airflow3.add_dag("by_hand", DAG.format(source=create_source_job(emulator, flag)))
    page.goto(f"http://127.0.0.1:{airflow3.home.port}/dags/by_hand")
    page.get_by_role("button", name="Trigger").first.click()
    page.get_by_role("dialog").get_by_role("button", name="Trigger").click()
    page.wait_for_url("**/dags/by_hand/runs/**")
    run_id = page.url.rpartition("/")[2]
    page.locator("a[href*='/runs/'][href$='/tasks/fork']").first.click()
    expect(page.get_by_text("row 5 of 5")).to_be_visible()
    page.get_by_role("link", name="Details", exact=True).click()
    expect(page.get_by_role("link", name="DataSphere job")).to_be_visible()
    photograph(page, "job-link")
    see_the_job(page, emulator, "EXECUTING").close()

    # Its end.
    flag.touch()
    assert airflow3.wait_run("by_hand", run_id) == "success"
    page.reload()
    job_page = see_the_job(page, emulator, "SUCCESS")
    photograph(job_page, "job-page")
    job_page.close()
    page.get_by_role("link", name="Logs", exact=True).click()
    expect(page.get_by_text("wrote result.txt")).to_be_visible()
    expect(page.get_by_text("Job status: SUCCESS")).to_be_visible()
    photograph(page, "task-log")


def test_a_jobs_page_follows_the_job(page: Page, emulator: Emulator, flag: Path) -> None:
    job_id = emulator.create_job(
        "python main.py ${ROWS}",
        files={"main.py": PROGRAM.format(flag=str(flag))},
        outputs=[("result.txt", "RESULT")],
        args={"ROWS": "5"},
        env_vars={"PASSWORD": "SecretOfTheJob"},
        name="count-rows",
        execute=True,
    )
    page.goto(f"{emulator.url}/projects")
    page.get_by_role("link", name="emulator").click()
    page.get_by_role("link", name="count-rows").click()
    expect(page.locator("#status")).to_have_text("EXECUTING")
    flag.touch()
    emulator.wait_job(job_id)
    # Nobody reloads it.
    expect(page.locator("#status")).to_have_text("SUCCESS")
    expect(page.locator("[data-log=stdout]")).to_contain_text("wrote result.txt")
    expect(page.get_by_text("PASSWORD")).to_be_visible()
    assert "SecretOfTheJob" not in page.content()
    with page.expect_download() as download:
        page.get_by_role("link", name="result.txt").click()
    assert download.value.path().read_text() == "done"


# Airflow 2 ---------------------------------------------------------------------------------------------------------


def test_airflow_2(page: Page, airflow2: RealAirflow, emulator: Emulator, flag: Path) -> None:
    base = f"http://127.0.0.1:{airflow2.home.port}"
    page.goto(f"{base}/connection/add")
    page.locator("#conn_id").fill("by_hand")
    page.locator("[aria-labelledby=select2-conn_type-container] .select2-selection__arrow").click()
    page.locator(".select2-results__option", has_text="Yandex DataSphere").click()
    for name, kind in FIELDS.items():
        shown = page.locator(f"#extra__datasphere__{name}")
        expect(shown).to_be_visible()
        expect(shown).to_have_attribute("type", {"secret": "password", "switch": "checkbox"}.get(kind, "text"))
        expect(page.locator("tr", has=shown)).to_contain_text(CONNECTION_FIELDS[name]["label"])
        expect(page.locator("tr", has=shown)).to_contain_text(CONNECTION_FIELDS[name]["description"])
    for name in ("host", "schema", "login", "password", "port", "extra"):
        expect(page.locator(f"#{name}")).to_be_hidden()
    expect(page.get_by_placeholder("bt1…")).to_be_visible()

    page.locator("#extra__datasphere__project_id").fill(emulator.project_id)
    page.locator("#extra__datasphere__service_account_json").fill(json.dumps(emulator.service_account_key(), indent=2))
    page.locator("#extra__datasphere__endpoint").fill(emulator.endpoint)
    page.locator("#extra__datasphere__ui_endpoint").fill(emulator.url)
    page.locator("#extra__datasphere__insecure").check()
    page.get_by_role("button", name="Test").click()
    expect(page.get_by_text("Connected as service account")).to_contain_text(f"({emulator.project_id}) exists")
    photograph(page, "connection-form-2")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_text("Added Row")).to_be_visible()

    airflow2.add_dag("by_hand", DAG.format(source=create_source_job(emulator, flag)))
    run_id = airflow2.trigger("by_hand")
    airflow2.until(lambda: airflow2.xcom("by_hand", run_id, "fork", "operation_id"), PATIENCE / 1000, "job")
    page.goto(f"{base}/dags/by_hand/grid?dag_run_id={run_id}&task_id=fork")
    see_the_job(page, emulator, "EXECUTING").close()
    flag.touch()
    assert airflow2.wait_run("by_hand", run_id) == "success"
    page.goto(f"{base}/dags/by_hand/grid?dag_run_id={run_id}&task_id=fork&tab=logs")
    expect(page.get_by_text("wrote result.txt")).to_be_visible()
    page.get_by_role("tab", name="Details").click()
    see_the_job(page, emulator, "SUCCESS").close()
