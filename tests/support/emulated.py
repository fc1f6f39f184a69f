"""Settings for an emulator, for tests of the client alone."""

from __future__ import annotations

from typing import Any

from yandex.cloud.datasphere.v2.project_service_pb2 import GetProjectRequest

from airflow_provider_datasphere.client.connection.channels import Channels
from airflow_provider_datasphere.client.connection.settings import Settings
from datasphere_emulator import Emulator


def settings_of(emulator: Emulator, **extra: Any) -> Settings:
    return Settings.from_extra(emulator.connection_extra(**extra))


def with_key(emulator: Emulator, **extra: Any) -> Settings:
    return settings_of(emulator, iam_token=None, service_account_json=emulator.service_account_key(), **extra)


def get_project(emulator: Emulator, channels: Channels, **options: Any) -> Any:
    request = GetProjectRequest(project_id=emulator.project_id)
    return channels.unary("projects", "Get", request, **{"timeout": 10, **options})
