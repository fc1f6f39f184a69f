"""Parts of ``JobParameters`` that a fork and a new job have in common, and the size of a request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from airflow_provider_datasphere.client.errors import JobRequestError

if TYPE_CHECKING:
    from yandex.cloud.datasphere.v2.jobs import jobs_pb2

    from airflow_provider_datasphere.client.transfer.inputs import JobInput

#: What one request may have, bytes: the limit of a gRPC server that sets none. DataSphere documents no other.
MAX_REQUEST_BYTES = 4 * 1024 * 1024
#: Of that, what the rest of a request takes beside the parameters and texts.
_REQUEST_MARGIN_BYTES = 4096


def file_message(job_input: JobInput) -> jobs_pb2.File:
    """Return the description of a file to upload."""
    from yandex.cloud.datasphere.v2.jobs import jobs_pb2

    return jobs_pb2.File(
        desc=jobs_pb2.FileDesc(path=job_input.path, var=job_input.var),
        sha256=job_input.sha256,
        size_bytes=job_input.size_bytes,
        compression_type=cast("jobs_pb2.FileCompressionType.ValueType", job_input.compression_type),
    )


def set_docker(environment: jobs_pb2.Environment, docker: str | Mapping[str, Any] | None) -> None:
    """Set the image of an environment.

    :param docker: resource id or system image name, or ``{"image", "username", "password": {"secret-id"}}``.
    """
    if isinstance(docker, str):
        if docker:
            environment.docker_image_resource_id = docker
    elif docker is not None:
        environment.docker_image_spec.image_url = docker["image"]
        environment.docker_image_spec.username = docker.get("username") or ""
        if docker.get("password"):
            environment.docker_image_spec.password_ds_secret_name = docker["password"]["secret-id"]


def storage_message(size_gib: int | None) -> jobs_pb2.ExtendedWorkingStorage | None:
    """Return extended working storage of this size; ``None`` for the default disk."""
    from yandex.cloud.datasphere.v2.jobs import jobs_pb2

    if size_gib is None:
        return None
    return jobs_pb2.ExtendedWorkingStorage(type=jobs_pb2.ExtendedWorkingStorage.SSD, size_gb=size_gib)


def image_of(environment: jobs_pb2.Environment) -> str:
    """Return the image's id, name or address."""
    return environment.docker_image_resource_id or environment.docker_image_spec.image_url


def check_request_size(
    what: str, parameters_bytes: int, texts: Mapping[str, str], in_message: Mapping[str, str]
) -> None:
    """
    :param what: the request, to begin a message with: "The request to fork job bt1…".
    :param texts: label -> text of what is sent beside the parameters.
    :param in_message: the same of what is in them, for the message.
    :raises JobRequestError: it is more than one request can hold; names the largest part.
    """
    size = parameters_bytes + sum(len(text.encode()) for text in texts.values()) + _REQUEST_MARGIN_BYTES
    if size <= MAX_REQUEST_BYTES:
        return
    parts = {**texts, **in_message}
    largest = max(parts, key=lambda label: len(parts[label].encode()))
    raise JobRequestError(
        f"{what} would have {size} bytes, more than the {MAX_REQUEST_BYTES} that the service takes in one; the largest "
        f"part is {largest} with {len(parts[largest].encode())}. Give such a value to the program as an input file."
    )
