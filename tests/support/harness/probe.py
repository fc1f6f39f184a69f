"""Run by an environment's own Python: what Airflow makes of the installed provider, as JSON on the last line.

Arguments: DAG files to import.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import sys
from pathlib import Path
from typing import Any

HEAVY = ("grpc", "datasphere", "yandexcloud", "yandex", "requests")


def heavy_modules() -> set[str]:
    return {name for name in HEAVY if name in sys.modules}


def metadata_imports() -> list[str]:
    """What is imported for the metadata alone, in an interpreter that has imported nothing."""
    before = set(sys.modules)
    importlib.import_module("airflow_provider_datasphere.get_provider_info")
    return sorted(name for name in set(sys.modules) - before if not name.startswith("airflow_provider_datasphere"))


def operator_imports() -> list[str]:
    """Heavy modules that our operators add to what every DAG file imports."""
    try:
        importlib.import_module("airflow.sdk").DAG, importlib.import_module("airflow.sdk").BaseOperator
    except ImportError:
        importlib.import_module("airflow.models.dag")
    before = heavy_modules()
    importlib.import_module("airflow_provider_datasphere.operators.jobs")
    return sorted(heavy_modules() - before)


def schema_errors(provider_info: dict[str, Any]) -> list[str]:
    import airflow
    import jsonschema

    schema = json.loads((Path(airflow.__file__).parent / "provider_info.schema.json").read_text())
    validator = jsonschema.validators.validator_for(schema)(schema)
    return [error.message for error in validator.iter_errors(provider_info)]


def public_classes(provider_info: dict[str, Any]) -> list[str]:
    """Classes of the modules that the metadata names; fails where one doesn't import."""
    found = set()
    for kind in ("hooks", "operators", "sensors", "triggers"):
        for part in provider_info[kind]:
            for name in part["python-modules"]:
                module = importlib.import_module(name)
                found.update(
                    class_name
                    for class_name, value in vars(module).items()
                    if inspect.isclass(value) and value.__module__ == name and not class_name.startswith("_")
                )
    return sorted(found)


def dag_errors(files: list[str]) -> dict[str, str]:
    try:
        from airflow.dag_processing.dagbag import DagBag
    except ImportError:
        from airflow.models.dagbag import DagBag
    errors = {}
    for file in files:
        bag = DagBag(dag_folder=file)
        errors.update(bag.import_errors)
        if not bag.dags:
            errors.setdefault(file, "holds no DAG")
        for dag in bag.dags.values():
            copy.deepcopy(dag)  # as dag.test() and partial_subset() do
    return errors


def main() -> None:
    result: dict[str, Any] = {"metadata imports": metadata_imports(), "operator imports": operator_imports()}
    from airflow.providers_manager import ProvidersManager

    manager = ProvidersManager()
    provider_info = manager.providers["airflow-provider-datasphere"].data
    hook = manager.hooks["datasphere"]
    result |= {
        "version": manager.providers["airflow-provider-datasphere"].version,
        "schema errors": schema_errors(provider_info),
        "hook": f"{hook.hook_class_name} {hook.hook_name}" if hook else None,
        "connection types": sorted(name for name in manager.hooks if name in {"datasphere", "yandexcloud"}),
        "classes": public_classes(provider_info),
        "links": sorted(name for name in manager.extra_links_class_names if "datasphere" in name),
        "dag errors": dag_errors(sys.argv[1:]),
    }
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    main()
