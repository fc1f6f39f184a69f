"""Apache Airflow provider for Yandex Cloud DataSphere Jobs."""

from __future__ import annotations

__version__ = "0.1.0"
