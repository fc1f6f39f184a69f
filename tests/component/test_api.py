"""Errors of calls that no repetition heals, though their code is that of a full quota."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from airflow_provider_datasphere.client.api import JobApi
from airflow_provider_datasphere.client.errors import JobRequestError
from airflow_provider_datasphere.client.rpc import is_message_too_large
from datasphere_emulator import Emulator
from emulated import settings_of


class Refusal(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode, details: str | None) -> None:
        super().__init__()
        self._code, self._details = code, details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str | None:
        return self._details


TOO_LARGE = [
    "Received message larger than max (5000000 vs. 4194304)",
    "SERVER: Received message larger than max (5000000 vs. 4194304)",
    "CLIENT: Sent message larger than max (5000000 vs. 4194304)",
    "grpc: received message larger than max (5000000 vs. 4194304)",
    "trying to send message larger than max (5000000 vs. 4194304)",
    "gRPC message exceeds maximum size 4194304: 5000000",
    "Error, message length too large: found 5000000 bytes, the limit is: 4194304 bytes",
]


@pytest.mark.parametrize("details", TOO_LARGE)
def test_a_message_that_is_too_large_is_known_by_its_text(details: str) -> None:
    assert is_message_too_large(Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, details))
    assert not is_message_too_large(Refusal(grpc.StatusCode.UNAVAILABLE, details))


@pytest.mark.parametrize(
    "details", ["Job execution quota exhausted", "too many requests", "The limit on maximum number of jobs", None, ""]
)
def test_a_full_quota_is_something_else(details: str | None) -> None:
    assert not is_message_too_large(Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, details))


def test_a_read_whose_answer_is_too_large_is_not_repeated(emulator: Emulator) -> None:
    job_id = emulator.create_job("true")
    service = JobApi(settings_of(emulator))
    emulator.faults.inject("Get", code="RESOURCE_EXHAUSTED", message=TOO_LARGE[0])
    with pytest.raises(JobRequestError, match="larger than one message may be"):
        service.get(job_id)
    assert emulator.journal.count("Get") == 1
    service.close()


def test_a_quota_is_waited_for(emulator: Emulator) -> None:
    job_id = emulator.create_job("true")
    service: Any = JobApi(settings_of(emulator))
    emulator.faults.inject("Get", code="RESOURCE_EXHAUSTED", message="too many requests", times=2)
    assert service.get(job_id).id == job_id
    assert emulator.journal.count("Get") == 3
    service.close()
