"""Service endpoints, fixed or discovered."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
from yandex.cloud.endpoint import api_endpoint_service_pb2

from airflow_provider_datasphere.client.connection.errors import SettingsError
from airflow_provider_datasphere.client.connection.grpc_channel import (
    Service,
    call_metadata,
    open_channel,
    stub,
    tls_problem,
)
from airflow_provider_datasphere.client.rpc import READ_DEADLINE_SECONDS
from airflow_provider_datasphere.client.secret_detection import shown

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.connection.settings import Settings

_known: dict[str, Endpoints] = {}
_lock = threading.Lock()


@dataclass(frozen=True)
class Endpoints:
    """``host:port`` of each service."""

    datasphere: str
    operation: str
    iam: str

    def of(self, service: Service) -> str:
        """Return the ``host:port`` of a service."""
        if service == "operations":
            return self.operation
        return self.iam if service == "iam" else self.datasphere


def known_endpoints(settings: Settings) -> Endpoints | None:
    """Return the endpoints if no request is needed; else None."""
    if settings.discovery_endpoint is None:
        return Endpoints(settings.endpoint, settings.operation_endpoint, settings.iam_endpoint)
    return _known.get(settings.fingerprint)


def find_endpoints(settings: Settings, *, timeout: float = READ_DEADLINE_SECONDS) -> Endpoints:
    """Return the endpoints; queries the discovery endpoint (RPC ``ApiEndpointService.List``) once per process.

    :param timeout: deadline of the query, seconds.
    :raises SettingsError: the discovery endpoint doesn't list DataSphere.
    :raises grpc.RpcError: it doesn't answer.
    """
    if endpoints := known_endpoints(settings):
        return endpoints
    target = settings.discovery_endpoint or ""
    with open_channel(settings, target) as channel:
        try:
            answer = stub("endpoints", channel).List(
                api_endpoint_service_pb2.ListApiEndpointsRequest(page_size=1000),
                timeout=timeout,
                metadata=call_metadata(None),
            )
        except grpc.RpcError as error:
            raise tls_problem(error, settings, target) or error from None
    addresses = {endpoint.id: endpoint.address for endpoint in answer.endpoints}
    missing = [name for name in ("datasphere", "operation", "iam") if not addresses.get(name)]
    if missing:
        raise SettingsError(
            f"endpoint={shown(target)}: this API has no service {' and no '.join(missing)}: DataSphere isn't "
            "offered there. Check the connection's endpoint."
        )
    endpoints = Endpoints(addresses["datasphere"], addresses["operation"], addresses["iam"])
    with _lock:
        return _known.setdefault(settings.fingerprint, endpoints)
