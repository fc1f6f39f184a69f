"""The class behind ``UPath("datasphere://…")``, and thus behind Airflow 3's ``ObjectStoragePath``.

It adds nothing. That there is one spares users the warning that the protocol is unknown, and universal_pathlib, which
loads this module first, takes the layout of the paths from the file system's own class.
"""

from __future__ import annotations

from fsspec import register_implementation
from upath import UPath

from airflow_provider_datasphere.filesystems.datasphere import DataSphereFileSystem

register_implementation("datasphere", DataSphereFileSystem, clobber=True)


class DataSpherePath(UPath):
    """A path ``<job_id>/<output path or var>`` of :class:`DataSphereFileSystem`."""

    __slots__ = ()
