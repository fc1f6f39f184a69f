"""Error messages about object stores that say what to do."""

from __future__ import annotations

from typing import Any

from airflow_provider_datasphere.client.errors import JobRequestError

_PACKAGES = {
    "s3": "apache-airflow-providers-amazon[s3fs]",
    "s3a": "apache-airflow-providers-amazon[s3fs]",
    "gs": "apache-airflow-providers-google",
    "gcs": "apache-airflow-providers-google",
    "abfs": "apache-airflow-providers-microsoft-azure",
    "abfss": "apache-airflow-providers-microsoft-azure",
    "adl": "apache-airflow-providers-microsoft-azure",
}


def unknown_store(uri: str, error: Exception) -> str:
    """Return what to do where no file system is installed for a URI.

    :param error: what ``ObjectStoragePath`` or its ``fs`` raised: ValueError or ImportError.
    """
    scheme = uri.partition("://")[0].lower()
    if scheme in _PACKAGES:
        return (
            f"{scheme}:// needs a package that this worker lacks: pip install '{_PACKAGES[scheme]}', then restart "
            f"Airflow ({error})."
        )
    return (
        f"this worker knows no store for such a URI ({error}). Give a local path, datasphere://…, or the URI of a "
        "store whose Airflow provider and file system are installed, such as s3://…"
    )


def missing_bucket(fs: Any, key: str) -> str | None:
    """Return the bucket (container, top folder) of a missing key, if it is the bucket that is missing.

    :param fs: an fsspec file system; ``None`` is returned for those that aren't object stores.
    """
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
    bucket = key.lstrip("/").partition("/")[0]
    if not bucket or not set(protocols) & set(_PACKAGES):
        return None
    try:
        return None if fs.exists(bucket) else bucket
    except Exception:  # stores raise errors of any class; then it is unknown
        return None


def check_key(field_name: str, uri: str) -> None:
    """Raise JobRequestError for URIs that clients of a store interpret differently.

    :raises JobRequestError: a version of an object, or a key with a step ``.`` or ``..``, which HTTP clients resolve
        although stores don't.
    """
    if "?versionid=" in uri.lower():
        raise JobRequestError(
            f"{field_name} is {uri!r}: versions of objects can't be named here. Leave out '?versionId=…' for the "
            "newest, or copy that version to a key of its own."
        )
    if {".", ".."} & set(uri.partition("://")[2].split("/")[1:]):
        raise JobRequestError(
            f"{field_name} is {uri!r}: a store knows no steps '.' and '..', they would be part of the key's name. "
            "Write the key without them."
        )
