"""gRPC channels: TLS, proxy, keepalive, message sizes, metadata and TLS errors."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

import grpc

from airflow_provider_datasphere import __version__
from airflow_provider_datasphere.client.connection.certificates import read_certificates
from airflow_provider_datasphere.client.connection.errors import (
    CredentialError,
    ServerCertificateError,
    SettingsError,
)
from airflow_provider_datasphere.client.connection.proxy import proxy_for
from airflow_provider_datasphere.client.connection.settings import is_loopback
from airflow_provider_datasphere.client.secret_detection import shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from airflow_provider_datasphere.client.connection.settings import Settings

Service = Literal["jobs", "operations", "projects", "iam", "endpoints"]
CallMetadata = tuple[tuple[str, str], ...]

CLIENT_VERSION = f"airflow-provider-datasphere={__version__}"
#: Limit of a response. A page of jobs has each job's whole configuration.
MAX_MESSAGE_BYTES = 64 * 1024 * 1024

_STUBS: dict[Service, tuple[str, str]] = {
    "jobs": ("yandex.cloud.datasphere.v2.jobs.project_job_service_pb2_grpc", "ProjectJobServiceStub"),
    "operations": ("yandex.cloud.operation.operation_service_pb2_grpc", "OperationServiceStub"),
    "projects": ("yandex.cloud.datasphere.v2.project_service_pb2_grpc", "ProjectServiceStub"),
    "iam": ("yandex.cloud.iam.v1.iam_token_service_pb2_grpc", "IamTokenServiceStub"),
    "endpoints": ("yandex.cloud.endpoint.api_endpoint_service_pb2_grpc", "ApiEndpointServiceStub"),
}

_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.primary_user_agent", CLIENT_VERSION.replace("=", "/")),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Retries are this package's decision, not that of a DNS record.
    ("grpc.service_config_disable_resolution", 1),
    # After an outage calls must not fail for two more minutes while gRPC backs off.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # A log stream may be silent for hours: keep it open in NAT gateways, and notice a dead peer. gRPC servers
    # reject pings at intervals below five minutes.
    ("grpc.keepalive_time_ms", 310_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
    # Between polls nothing keeps a connection alive: better a new one than one that a gateway has dropped.
    ("grpc.client_idle_timeout_ms", 120_000),
)
#: For a channel with a connection of its own: streams must not use up that of unary calls.
OWN_CONNECTION: tuple[tuple[str, Any], ...] = (("grpc.use_local_subchannel_pool", 1),)


def open_channel(settings: Settings, target: str, extra: Sequence[tuple[str, Any]] = ()) -> grpc.Channel:
    """Open a channel for threads. It connects on the first call.

    :param target: ``host:port``.
    :raises SettingsError: the root certificates or the environment's proxy are invalid.
    """
    options = (*_OPTIONS, *_proxy_options(target), *extra)
    if settings.insecure:
        return grpc.insecure_channel(_loopback(target), options=options)
    return grpc.secure_channel(target, _tls(settings), options=options)


def open_aio_channel(settings: Settings, target: str, extra: Sequence[tuple[str, Any]] = ()) -> grpc.aio.Channel:
    """Same as :func:`open_channel`, for the running event loop."""
    options = (*_OPTIONS, *_proxy_options(target), *extra)
    if settings.insecure:
        return grpc.aio.insecure_channel(_loopback(target), options=options)
    return grpc.aio.secure_channel(target, _tls(settings), options=options)


def load_stubs() -> None:
    """Import all generated stubs. Takes a while: call it in a thread, not in an event loop."""
    for module, _ in _STUBS.values():
        import_module(module)


def stub(service: Service, channel: Any) -> Any:
    """Return the generated stub of a service."""
    module, name = _STUBS[service]
    return getattr(import_module(module), name)(channel)


def call_metadata(token: str | None, idempotency_key: str | None = None) -> CallMetadata:
    """Return the metadata of a call."""
    metadata: list[tuple[str, str]] = [("x-client-version", CLIENT_VERSION)]
    if token is not None:
        metadata.append(("authorization", f"Bearer {token}"))
    if idempotency_key is not None:
        metadata.append(("idempotency-key", idempotency_key))
    return tuple(metadata)


def tls_problem(error: grpc.RpcError, settings: Settings, target: str) -> CredentialError | None:
    """Return a clear error if the call failed because of TLS; else None."""
    if error.code() != grpc.StatusCode.UNAVAILABLE:
        return None
    details = error.details() or ""
    if "CERTIFICATE_VERIFY_FAILED" in details or "certificate verify failed" in details:
        trusted = (
            f"a root certificate in {settings.root_certificates}"
            if settings.root_certificates
            else "a public authority"
        )
        return ServerCertificateError(
            f"{target} has a certificate that isn't signed by {trusted}: set the connection's root_certificates to a "
            f"PEM file with its authority, and check the endpoint. ({details})"
        )
    if "is not in peer certificate" in details or "Hostname Verification Check failed" in details:
        return ServerCertificateError(
            f"{target} has a certificate of another host: use the name in it as the endpoint. ({details})"
        )
    if "WRONG_VERSION_NUMBER" in details:
        return ServerCertificateError(
            f"{target} doesn't speak TLS: check the port of the endpoint; a service on this machine may be used "
            f"with insecure=true. ({details})"
        )
    return None


def _loopback(target: str) -> str:
    # The fields are checked already, but not an address from the discovery endpoint.
    if not is_loopback(target):
        raise SettingsError(
            f"insecure=true, but the service is at {shown(target)}: without TLS only localhost is allowed."
        )
    return target


def _tls(settings: Settings) -> grpc.ChannelCredentials:
    if settings.root_certificates is None:
        return grpc.ssl_channel_credentials()
    return grpc.ssl_channel_credentials(root_certificates=read_certificates(settings.root_certificates))


def _proxy_options(target: str) -> tuple[tuple[str, Any], ...]:
    proxy = proxy_for(f"https://{target}")
    return (("grpc.http_proxy", proxy),) if proxy else (("grpc.enable_http_proxy", 0),)
