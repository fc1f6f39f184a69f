"""Places as they are written: URIs of jobs' files, folders, and what only looks like one."""

from __future__ import annotations

from pathlib import Path

import pytest

from airflow_provider_datasphere.client.errors import JobRequestError
from airflow_provider_datasphere.client.uri import check_job_file_uri, local_folder


@pytest.mark.parametrize(
    ("place", "folder"),
    [
        ("to", "to"),
        ("/to", "/to"),
        ("./a:/b", "./a:/b"),
        ("file:///to", "/to"),
        ("file:/to", "/to"),
        ("FILE:///to", "/to"),
        ("file://localhost/to", "/to"),
        ("~", str(Path.home())),
        ("~/to", f"{Path.home()}/to"),
        ("s3://conn@bucket/to", None),
        ("memory://to", None),
    ],
)
def test_a_folder_and_a_store_are_told_apart(place: str, folder: str | None) -> None:
    assert local_folder("destination", place) == folder


@pytest.mark.parametrize(
    "place", ["file://host/to", "file://to", "file:to", "file:", "s3:/bucket/to", "~nosuchuser/to"]
)
def test_what_is_neither_is_no_folder_of_that_name(place: str) -> None:
    with pytest.raises(JobRequestError, match=r"^destination is "):
        local_folder("destination", place)


@pytest.mark.parametrize("place", ["datasphere://None/a", "datasphere://conn@None/a", "datasphere:///None/a"])
def test_the_job_of_an_xcom_that_is_not_there(place: str) -> None:
    with pytest.raises(
        JobRequestError, match=r"^vars\['A'\] is '.*': the job id is the word None, .*`first >> second`"
    ):
        check_job_file_uri("vars['A']", place)


@pytest.mark.parametrize(
    "place", ["datasphere://bt1", "datasphere://bt1/", "datasphere://bt1/.", "datasphere://c@bt1/./"]
)
def test_a_job_without_a_file(place: str) -> None:
    with pytest.raises(JobRequestError, match="names a job but none of its files: write datasphere://bt1/<output"):
        check_job_file_uri("vars['A']", place)
