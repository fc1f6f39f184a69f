"""The provider's metadata, as Airflow's provider manager reads it. Imports nothing."""

from __future__ import annotations

from typing import Any


def get_provider_info() -> dict[str, Any]:
    """Return what this provider offers, in the terms of Airflow's ``provider_info.schema.json``."""
    return {
        "package-name": "airflow-provider-datasphere",
        "name": "Yandex Cloud DataSphere Jobs",
        "description": "Fork, watch and collect DataSphere jobs.",
    }
