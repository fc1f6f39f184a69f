"""The next RPC of a poll or of a log stream, as a value: decided without I/O, made by whoever has the channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.connection.grpc_channel import Service


@dataclass(frozen=True)
class RpcCall:
    """One gRPC call.

    :param request: the request message.
    :param timeout: its deadline, seconds.
    """

    service: Service
    method: str
    request: Any
    timeout: float
