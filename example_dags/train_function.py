"""Run Python functions as DataSphere jobs: one on the day's table, and one on the model that it has made.

The functions' source is shipped with each job; they import inside what they use. Set the connection
``datasphere_default`` with its project ID. Needs no source job, and nothing beside this file and the folder ``train``.
"""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING

try:
    from airflow.sdk import DAG, task
except ImportError:  # Airflow 2
    from airflow import DAG
    from airflow.decorators import task

if TYPE_CHECKING:
    from pathlib import Path


@task.datasphere(
    inputs={"table": "train/data.csv"},
    outputs=["model.json"],
    cloud_instance_types=["c1.4"],
    deferrable=True,
    retries=2,
    retry_delay=timedelta(minutes=1),
)
def train(table: Path, rows: int = 168) -> dict[str, float]:
    """Fit a line to the last rows of a table of hours and temperatures; return it, and keep it as a file."""
    import csv
    import json

    from airflow_provider_datasphere.job import progress

    with table.open(newline="") as file:
        lines = list(csv.DictReader(file))[-rows:]
    progress(50, f"{len(lines)} rows read")
    hours, celsius = ([float(line[name]) for line in lines] for name in ("hour", "celsius"))
    mean_hour, mean_celsius = sum(hours) / len(hours), sum(celsius) / len(celsius)
    slope = sum((h - mean_hour) * (c - mean_celsius) for h, c in zip(hours, celsius, strict=True))
    slope /= sum((h - mean_hour) ** 2 for h in hours)
    model = {"slope": slope, "intercept": mean_celsius - slope * mean_hour}
    with open("model.json", "w") as file:
        json.dump(model, file)
    print("Model:", model)
    return model


@task.datasphere
def forecast(model: dict[str, float], hour: int) -> float:
    """Return the temperature that a model foretells."""
    from airflow_provider_datasphere.job import skip

    if hour < 0:
        skip("the hour has passed")
    return round(model["intercept"] + model["slope"] * hour, 2)


with DAG(
    dag_id="train_function",
    schedule="@daily",
    start_date=datetime(2026, 1, 1, tzinfo=timezone.utc),
    catchup=False,
):
    forecast(train(), hour=300)
