"""The class behind ``UPath("datasphere://…")``, and thus behind Airflow 3's ``ObjectStoragePath``.

It adds nothing, but prevents the warning about an unknown protocol, and registers the file system's class, from which
universal_pathlib takes the layout of paths.
"""

from __future__ import annotations

from fsspec import register_implementation
from upath import UPath

from airflow_provider_datasphere.filesystems.datasphere import DataSphereFileSystem

register_implementation("datasphere", DataSphereFileSystem, clobber=True)


class DataSpherePath(UPath):
    """A path ``<job_id>/<output path or var>`` of :class:`DataSphereFileSystem`."""

    __slots__ = ()
