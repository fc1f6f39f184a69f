"""Connection test."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc

from airflow_provider_datasphere.client.connection.channels import Channels
from airflow_provider_datasphere.client.connection.credentials import InstanceMetadataCredential, ServiceAccountKey
from airflow_provider_datasphere.client.connection.errors import CredentialError
from airflow_provider_datasphere.client.connection.outage import CHECK_NETWORK, tls_hint
from airflow_provider_datasphere.client.errors import DataSphereError
from airflow_provider_datasphere.client.rpc import READ_DEADLINE_SECONDS, code_and_details, code_name

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.connection.settings import Settings

#: The id of no job: any answer about it proves that the token was accepted.
_NO_JOB = "bt100000000000000000"


def check_connection(settings: Settings) -> tuple[bool, str]:
    """Test a connection with an authorized call.

    With a project: ``ProjectService.Get`` and ``ProjectJobService.List``; without one: ``ProjectJobService.Get`` of a
    job that doesn't exist.

    :return: whether the connection works, and a message: the account, the project, what is missing.
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
        channels.unary("jobs", "Get", GetProjectJobRequest(job_id=_NO_JOB), timeout=READ_DEADLINE_SECONDS)
    except CredentialError:
        raise
    except grpc.RpcError as error:
        # Which of these an unknown job gets isn't documented; each means that the token was accepted.
        if code_name(error) not in ("NOT_FOUND", "PERMISSION_DENIED", "INVALID_ARGUMENT"):
            raise
    return True, (
        f"Connected as {channels.settings.description}. No project_id is set, so access to a project was not "
        "tested: set it to test that too."
    )


def _check_project(channels: Channels, project_id: str) -> tuple[bool, str]:
    from yandex.cloud.datasphere.v2.jobs.project_job_service_pb2 import ListProjectJobRequest
    from yandex.cloud.datasphere.v2.project_service_pb2 import GetProjectRequest

    who = channels.settings.description
    try:
        project = channels.unary(
            "projects", "Get", GetProjectRequest(project_id=project_id), timeout=READ_DEADLINE_SECONDS
        )
        channels.unary(
            "jobs", "List", ListProjectJobRequest(project_id=project_id, page_size=1), timeout=READ_DEADLINE_SECONDS
        )
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
                f"Authenticated as {who}, but project {project_id} doesn't exist or the account can't see it: check "
                "project_id, and add the account as Developer in the project's Members tab. "
                f"({error.details() or code_name(error)})"
            )
        raise
    return True, (
        f"Connected as {who}. Project {project.name!r} ({project_id}) exists and its jobs can be read; to run jobs "
        "the account must be a Developer in it, or more."
    )


def _account(settings: Settings) -> str:
    if settings.impersonate_service_account_id:
        return f"service account {settings.impersonate_service_account_id}"
    credential = settings.credential
    if isinstance(credential, ServiceAccountKey):
        return f"service account {credential.service_account_id}"
    if isinstance(credential, InstanceMetadataCredential):
        return "the service account of this machine (of the VM or Managed Airflow cluster)"
    return credential.description


def _failure(error: grpc.RpcError, settings: Settings) -> str:
    code = code_name(error)
    if code == "UNAUTHENTICATED":
        return f"DataSphere refuses the token of {settings.description}: {error.details() or 'no details'}"
    where = settings.discovery_endpoint or settings.endpoint
    if code in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
        return f"{where} doesn't answer ({code_and_details(error)}){tls_hint(error, settings)}. {CHECK_NETWORK}"
    return f"{where} answers {code_and_details(error)}"
