"""The provider's metadata and the connection form that Airflow makes of it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import airflow
import jsonschema
import pytest

from airflow_provider_datasphere import __version__
from airflow_provider_datasphere.client.connection.settings import FIELDS, Settings
from airflow_provider_datasphere.compat import AIRFLOW_V_3_0_PLUS
from airflow_provider_datasphere.get_provider_info import CONNECTION_FIELDS, HIDDEN_FIELDS, get_provider_info
from airflow_provider_datasphere.hooks.datasphere import DataSphereHook

AIRFLOW_VERSION = tuple(int(part) for part in airflow.__version__.split(".")[:2])
INFO = get_provider_info()
(TYPE,) = INFO["connection-types"]
SECRET_FIELDS = {"iam_token", "service_account_json", "oauth"}


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_imports_nothing() -> None:
    program = (
        "import sys; before = set(sys.modules)\n"
        "import airflow_provider_datasphere.get_provider_info as module\n"
        "module.get_provider_info()\n"
        "print(sorted(set(sys.modules) - before - sys.stdlib_module_names))"
    )
    assert run(program).strip() == "['airflow_provider_datasphere', 'airflow_provider_datasphere.get_provider_info']"


def test_it_suits_airflows_schema() -> None:
    schema = json.loads(Path(airflow.__file__).with_name("provider_info.schema.json").read_text())
    jsonschema.validate(INFO, schema)
    assert INFO["package-name"] == "airflow-provider-datasphere"
    assert INFO["versions"][0] == __version__


def test_what_it_names_exists() -> None:
    modules = [
        module
        for kind in ("operators", "sensors", "hooks", "triggers")
        for entry in INFO[kind]
        for module in entry["python-modules"]
    ]
    for module in [*modules, *INFO["filesystems"]]:
        assert importlib.util.find_spec(module), module
    for path in [TYPE["hook-class-name"], *INFO["extra-links"]]:
        module, _, name = path.rpartition(".")
        assert hasattr(import_module(module), name), path
    integrations = {entry["integration-name"] for entry in INFO["integrations"]}
    for kind in ("operators", "sensors", "hooks", "triggers"):
        assert {entry["integration-name"] for entry in INFO[kind]} <= integrations


def test_the_hook_agrees() -> None:
    assert TYPE["connection-type"] == DataSphereHook.conn_type == "datasphere"
    assert TYPE["hook-name"] == DataSphereHook.hook_name == "Yandex DataSphere"
    assert DataSphereHook.conn_name_attr == "datasphere_conn_id"
    assert DataSphereHook.default_conn_name == "datasphere_default"


def test_the_form_has_every_field_and_no_other() -> None:
    assert set(CONNECTION_FIELDS) == set(FIELDS)
    for name, field in CONNECTION_FIELDS.items():
        assert field["label"], name
        assert field["description"].endswith("."), name
        assert (field["schema"].get("format") == "password") == (name in SECRET_FIELDS), name
    assert {"schema", "login", "password", "port", "host"} <= set(HIDDEN_FIELDS)


def test_an_untouched_form_is_an_empty_connection() -> None:
    saved = {name: field["schema"].get("default") for name, field in CONNECTION_FIELDS.items()}
    assert Settings.from_extra(saved) == Settings.from_extra({})


def form_of_this_airflow() -> tuple[dict[str, Any], dict[str, Any]]:
    from airflow.providers_manager import ProvidersManager

    manager = ProvidersManager()
    assert manager.hooks["datasphere"] is not None
    prefix = "extra__datasphere__"
    widgets = {
        name.removeprefix(prefix): widget
        for name, widget in manager.connection_form_widgets.items()
        if name.startswith(prefix)
    }
    return widgets, dict(manager.field_behaviours["datasphere"])


@pytest.mark.skipif((3, 0) <= AIRFLOW_VERSION < (3, 2), reason="3.0 and 3.1 make the form in the API server")
def test_airflow_makes_the_form(recwarn: pytest.WarningsRecorder) -> None:
    widgets, behaviour = form_of_this_airflow()
    assert set(widgets) == set(FIELDS)
    assert behaviour["hidden_fields"] == HIDDEN_FIELDS
    assert behaviour["placeholders"]["extra__datasphere__endpoint"] == "datasphere.api.cloud.yandex.net:443"
    assert {name for name, widget in widgets.items() if widget.is_sensitive} == SECRET_FIELDS
    if not AIRFLOW_V_3_0_PLUS:
        names = {name: widget.field.field_class.__name__ for name, widget in widgets.items()}
        assert names["insecure"] == "BooleanField"
        assert {name for name, kind in names.items() if kind == "PasswordField"} == SECRET_FIELDS
    assert [str(warning.message) for warning in recwarn if "DataSphereHook" in str(warning.message)] == []


@pytest.mark.skipif(not AIRFLOW_V_3_0_PLUS, reason="Airflow 2 makes the form with widgets")
def test_airflows_api_serves_the_form() -> None:
    if AIRFLOW_VERSION == (3, 0):
        pytest.importorskip("flask_appbuilder", reason="3.0 shows no provider's fields without the FAB provider")
    from airflow.api_fastapi.core_api.services.ui.connections import HookMetaService

    (meta,) = [meta for meta in HookMetaService.hook_meta_data() if meta.connection_type == "datasphere"]
    assert meta.hook_name == "Yandex DataSphere"
    assert set(meta.extra_fields or {}) == set(FIELDS)
    for name, field in (meta.extra_fields or {}).items():
        schema = field["schema"]
        assert (schema.get("title"), field["description"]) == (
            CONNECTION_FIELDS[name]["label"],
            CONNECTION_FIELDS[name]["description"],
        )
        assert (schema.get("format") == "password") == (name in SECRET_FIELDS)
        assert ("boolean" in schema["type"]) == (name == "insecure")
    assert meta.standard_fields is not None
    for hidden in ("host", "port", "login", "password", "url_schema"):
        assert getattr(meta.standard_fields, hidden).hidden
