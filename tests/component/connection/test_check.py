"""Test Connection: who we are, which project, and what is missing."""

from __future__ import annotations

import pytest

from airflow_provider_datasphere.client.connection.check import check_connection
from datasphere_emulator import Emulator
from emulated import settings_of, with_key


def test_check_names_account_and_project(datasphere_emulator: Emulator) -> None:
    works, text = check_connection(with_key(datasphere_emulator))
    assert works, text
    assert f"Connected as service account {datasphere_emulator.service_account_id} (by its authorized key" in text
    assert datasphere_emulator.project_id in text
    assert datasphere_emulator.journal.calls("Project.Get")
    works, text = check_connection(with_key(datasphere_emulator, project_id=None))
    assert works, text
    assert "No project_id is set" in text
    assert datasphere_emulator.journal.calls("Get")[-1].subject == datasphere_emulator.service_account_id


def test_check_says_what_is_missing(datasphere_emulator: Emulator) -> None:
    account, project = datasphere_emulator.service_account_id, datasphere_emulator.add_project("mine")
    works, text = check_connection(with_key(datasphere_emulator, project_id=project))
    assert not works
    assert (
        f"service account {account} has no role in project {project}: add it as Developer in the project's Members tab"
        in text
    )
    works, text = check_connection(with_key(datasphere_emulator, project_id="bt1nosuchproject0000"))
    assert not works
    assert "project bt1nosuchproject0000 doesn't exist" in text


def test_check_tells_a_bad_token_from_a_silent_service(
    datasphere_emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    works, text = check_connection(settings_of(datasphere_emulator, iam_token="t1.canary"))
    assert not works
    assert "refuses the IAM token" in text
    assert "canary" not in text
    works, text = check_connection(settings_of(datasphere_emulator, endpoint="localhost:1"))
    assert not works
    assert text.startswith("localhost:1 doesn't answer (UNAVAILABLE: ")
    monkeypatch.setattr("airflow_provider_datasphere.client.connection.iam.FETCH_RETRY_SECONDS", 0.2)
    monkeypatch.setenv("YC_METADATA_ADDR", "127.0.0.1:1")
    works, text = check_connection(settings_of(datasphere_emulator, iam_token=None))
    assert not works
    assert "no credential, and the metadata service at 127.0.0.1:1, which" in text
