"""Does a connection work? Said so that a person knows what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc

from airflow_provider_datasphere.client.access_errors import CredentialError
from airflow_provider_datasphere.client.channels import Channels
from airflow_provider_datasphere.client.errors import DataSphereError
from airflow_provider_datasphere.client.identity import Metadata, ServiceAccountKey

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.settings import Settings

#: Deadline of each call, seconds.
CALL_SECONDS = 10.0
#: A job id that no job has: any answer about it proves that the service knows who asks.
_NO_JOB = "bt100000000000000000"


def check_connection(settings: Settings) -> tuple[bool, str]:
    """Make an authorised call.

    With a project: ``ProjectService.Get`` and ``ProjectJobService.List``; without one: ``ProjectJobService.Get`` of a
    job that doesn't exist.

    :return: whether the connection works, and what to tell: who we are, which project, what is missing.
    """
    channels = Channels(settings)
    try:
        if settings.project_id is None:
            return _check_account(channels)
        return _check_project(channels, settings.project_id)
    except CredentialError as error:
        return False, str(error)
    except grpc.RpcError as error:
        return False, _failure(error, settings)
    except DataSphereError as error:
        return False, str(error)
    finally:
        channels.close()


def _check_account(channels: Channels) -> tuple[bool, str]:
    from yandex.cloud.datasphere.v2.jobs.project_job_service_pb2 import GetProjectJobRequest

    try:
        channels.unary("jobs", "Get", GetProjectJobRequest(job_id=_NO_JOB), timeout=CALL_SECONDS)
    except CredentialError:
        raise
    except grpc.RpcError as error:
        # Which of these an unknown job gets isn't documented; each means that the token was good.
        if error.code().name not in ("NOT_FOUND", "PERMISSION_DENIED", "INVALID_ARGUMENT"):
            raise
    return True, (
        f"Connected as {channels.settings.description}. No project_id is set, so the access to a project was not "
        "checked: fill it in to have that tested too."
    )


def _check_project(channels: Channels, project_id: str) -> tuple[bool, str]:
    from yandex.cloud.datasphere.v2.jobs.project_job_service_pb2 import ListProjectJobRequest
    from yandex.cloud.datasphere.v2.project_service_pb2 import GetProjectRequest

    who = channels.settings.description
    try:
        project = channels.unary("projects", "Get", GetProjectRequest(project_id=project_id), timeout=CALL_SECONDS)
        channels.unary("jobs", "List", ListProjectJobRequest(project_id=project_id, page_size=1), timeout=CALL_SECONDS)
    except CredentialError:
        raise
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.PERMISSION_DENIED:
            return False, (
                f"Authenticated, but {_account(channels.settings)} has no role in project {project_id}: add it as "
                f"Developer in the project's Members tab. ({error.details() or 'PERMISSION_DENIED'})"
            )
        if error.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT):
            return False, (
                f"Authenticated as {who}, but there is no project {project_id}, or it can't be seen from there: check "
                "project_id, and add the account as Developer in the project's Members tab. "
                f"({error.details() or error.code().name})"
            )
        raise
    return True, (
        f"Connected as {who}. Project {project.name!r} ({project_id}) is there and its jobs can be read; to run jobs "
        "the account must be Developer in it, or more."
    )


def _account(settings: Settings) -> str:
    if settings.impersonate_service_account_id:
        return f"service account {settings.impersonate_service_account_id}"
    credential = settings.credential
    if isinstance(credential, ServiceAccountKey):
        return f"service account {credential.service_account_id}"
    if isinstance(credential, Metadata):
        return "the service account of this machine (of the VM or Managed Airflow cluster)"
    return credential.description


def _failure(error: grpc.RpcError, settings: Settings) -> str:
    code, details = error.code().name, error.details() or "no details"
    if code == "UNAUTHENTICATED":
        return f"DataSphere refuses the token of {settings.description}: {details}"
    where = settings.discovery_endpoint or settings.endpoint
    if code in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
        return (
            f"{where} doesn't answer ({code}: {details}). Check the endpoint, and that this machine may connect to it "
            "(NAT gateway, security group, proxy)."
        )
    return f"{where} answers {code}: {details}"
