"""Proxy selection from the environment: one rule for gRPC and for HTTP. Pure."""

from __future__ import annotations

from base64 import b64encode
from urllib.parse import quote, unquote, urlsplit
from urllib.request import getproxies

from airflow_provider_datasphere.client.connection.errors import SettingsError
from airflow_provider_datasphere.client.connection.settings import is_loopback


def proxy_for(url: str) -> str | None:
    """Return the proxy for ``url``, by ``HTTPS_PROXY``, ``HTTP_PROXY``, ``ALL_PROXY`` and ``NO_PROXY``, as `requests`.

    gRPC itself reads the lower-case variables only, and ignores what it can't parse.

    :return: ``http://[user:password@]host:port``, user and password percent-encoded; None: connect directly, as always
        to this machine.
    :raises SettingsError: the proxy isn't supported.
    """
    host = urlsplit(url).netloc
    if is_loopback(host) or not getproxies():
        return None
    from requests.utils import get_environ_proxies, select_proxy

    named = select_proxy(url, get_environ_proxies(url))
    if not named:
        return None
    scheme, separator, rest = named.partition("://")
    # The last @: no part of a password may get into the message below.
    credentials, _, address = (rest if separator else named).rpartition("@")
    scheme = scheme.lower() if separator else "http"
    try:
        parts = urlsplit(f"//{address}")
        proxy_host, port = parts.hostname, parts.port or 80
    except ValueError:
        proxy_host = None
    if scheme != "http" or not proxy_host:
        raise SettingsError(
            f"The environment's proxy for {host} is {f'{scheme}://{address}'!r}: only a proxy of the form "
            "http://host:port is supported. Set HTTPS_PROXY to one, or add the host to NO_PROXY."
        )
    if credentials:
        credentials = ":".join(quote(unquote(part), safe="") for part in credentials.split(":", 1)) + "@"
    return f"http://{credentials}{f'[{proxy_host}]' if ':' in proxy_host else proxy_host}:{port}"


def proxy_headers(proxy: str) -> dict[str, str]:
    """Return the headers that authenticate a client to a proxy.

    :param proxy: as :func:`proxy_for` returns it.
    """
    credentials, _, _ = urlsplit(proxy).netloc.rpartition("@")
    if not credentials:
        return {}
    user, _, password = credentials.partition(":")
    # Not urllib3's function, which encodes Latin-1 only.
    return {"proxy-authorization": f"Basic {b64encode(f'{unquote(user)}:{unquote(password)}'.encode()).decode()}"}
