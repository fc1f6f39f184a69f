"""Which ``host:port`` each service is at."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
from yandex.cloud.endpoint import api_endpoint_service_pb2

from airflow_provider_datasphere.client.access_errors import SettingsError
from airflow_provider_datasphere.client.transport import Service, call_metadata, open_channel, stub, tls_problem

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.settings import Settings

#: Deadline of the look-up, seconds.
DISCOVERY_DEADLINE = 10.0

_known: dict[str, Endpoints] = {}
_lock = threading.Lock()


@dataclass(frozen=True)
class Endpoints:
    """``host:port`` of each service."""

    datasphere: str
    operation: str
    iam: str

    def of(self, service: Service) -> str:
        """Where this service is."""
        if service == "operations":
            return self.operation
        return self.iam if service == "iam" else self.datasphere


def known_endpoints(settings: Settings) -> Endpoints | None:
    """The endpoints, unless the network has to be asked."""
    if settings.discovery_endpoint is None:
        return Endpoints(settings.endpoint, settings.operation_endpoint, settings.iam_endpoint)
    return _known.get(settings.fingerprint)


def find_endpoints(settings: Settings, *, timeout: float = DISCOVERY_DEADLINE) -> Endpoints:
    """The endpoints; asks the discovery endpoint (RPC ``ApiEndpointService.List``) once per process.

    :param timeout: deadline of the look-up, seconds.
    :raises SettingsError: that host knows no DataSphere.
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
            f"endpoint={target!r}: this API has no service {' and no '.join(missing)}: DataSphere isn't offered there. "
            "Check the connection's endpoint."
        )
    endpoints = Endpoints(addresses["datasphere"], addresses["operation"], addresses["iam"])
    with _lock:
        return _known.setdefault(settings.fingerprint, endpoints)
