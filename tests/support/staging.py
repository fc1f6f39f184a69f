"""Inputs of a fork made ready for upload, by variable."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from airflow_provider_datasphere.client.submission.fork_request import kept_paths
from airflow_provider_datasphere.client.transfer.inputs import InputSource, JobInput
from airflow_provider_datasphere.inputs import stage_inputs


def stage_vars(vars: Mapping[str, str], source_parameters: Any, client: Any, scratch: Path) -> list[JobInput]:
    """Stage inputs that replace those of a source job."""
    sources = [InputSource(var, place) for var, place in vars.items()]
    return stage_inputs(sources, kept_paths(source_parameters, vars), client, scratch)
