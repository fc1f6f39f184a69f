"""The proxy that the environment names for an address: one rule for gRPC and for the HTTP of files. Pure."""

from __future__ import annotations

from base64 import b64encode
from urllib.parse import quote, unquote, urlsplit
from urllib.request import getproxies

from airflow_provider_datasphere.client.access_errors import SettingsError
from airflow_provider_datasphere.client.settings import is_loopback


def proxy_for(url: str) -> str | None:
    """What ``HTTPS_PROXY``, ``HTTP_PROXY``, ``ALL_PROXY`` and ``NO_PROXY`` say about ``url``, read as `requests` does.

    gRPC itself reads the lower-case variables only, and takes no notice of what it can't parse.

    :return: ``http://[user:password@]host:port``, user and password percent-encoded; None to connect directly, as to
        this very machine always.
    :raises SettingsError: that proxy can't be used.
    """
    host = urlsplit(url).netloc
    if is_loopback(host) or not getproxies():
        return None
    from requests.utils import get_environ_proxies, select_proxy

    named = select_proxy(url, get_environ_proxies(url))
    if not named:
        return None
    scheme, separator, rest = named.partition("://")
    # The last @, whatever the password has: nothing of it may end up in the message below.
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
            "http://host:port can be used. Set HTTPS_PROXY to such a one, or name the host in NO_PROXY."
        )
    if credentials:
        credentials = ":".join(quote(unquote(part), safe="") for part in credentials.split(":", 1)) + "@"
    return f"http://{credentials}{f'[{proxy_host}]' if ':' in proxy_host else proxy_host}:{port}"


def proxy_headers(proxy: str) -> dict[str, str]:
    """How a client introduces itself to a proxy.

    :param proxy: as :func:`proxy_for` gives it.
    """
    credentials, _, _ = urlsplit(proxy).netloc.rpartition("@")
    if not credentials:
        return {}
    user, _, password = credentials.partition(":")
    # Not urllib3's own function, which knows Latin letters only.
    return {"proxy-authorization": f"Basic {b64encode(f'{unquote(user)}:{unquote(password)}'.encode()).decode()}"}
