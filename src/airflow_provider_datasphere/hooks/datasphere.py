"""Hook: a client of DataSphere Jobs for an Airflow connection."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from contextlib import suppress
from hashlib import sha256
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from airflow_provider_datasphere.compat import AIRFLOW_V_3_0_PLUS, AirflowNotFoundException, BaseHook
from airflow_provider_datasphere.exceptions import JobRequestError, airflow_exceptions

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.async_client import AsyncDataSphereClient
    from airflow_provider_datasphere.client.connection.settings import Settings
    from airflow_provider_datasphere.client.sync_client import DataSphereClient

#: Minimum time between reloads of a connection, however many calls are refused.
REREAD_SECONDS = 3.0
#: Reloads per event loop and connection: start and result. A thousand triggers share one.
_rereadings: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, tuple[float, asyncio.Task[Settings | None]]]] = (
    WeakKeyDictionary()
)

#: How long coroutines of an event loop share one reading of a connection, seconds: a triggerer that starts has
#: thousands of triggers, and each reading is a request to Airflow.
SHARED_READING_SECONDS = 3.0
#: Per event loop and connection: when it was read, and the client. Of open loops alone: a client refers to its loop.
_clients: dict[asyncio.AbstractEventLoop, dict[str, tuple[float, asyncio.Future[AsyncDataSphereClient]]]] = {}

#: Pauses before each retry of reading a connection.
READ_RETRY_SECONDS = (0.5, 1.0, 2.0, 4.0)


class DataSphereHook(BaseHook):
    """Access to DataSphere Jobs with an Airflow connection of type ``datasphere`` (or ``yandexcloud``).

    Safe to construct anywhere: it reads the connection and connects to the service on first use.

    :param datasphere_conn_id: the connection's id. Default: ``datasphere_default``.
    """

    conn_name_attr = "datasphere_conn_id"
    default_conn_name = "datasphere_default"
    conn_type = "datasphere"
    hook_name = "Yandex DataSphere"

    def __init__(self, datasphere_conn_id: str = default_conn_name) -> None:
        super().__init__()
        self.datasphere_conn_id = datasphere_conn_id
        self._settings: Settings | None = None
        self._client: DataSphereClient | None = None
        self._read_digest = b""
        self._reread_at = float("-inf")

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles have the connection's id only, no secrets or sockets.
        return {**self.__dict__, "_settings": None, "_client": None, "_read_digest": b""}

    @classmethod
    def get_connection_form_widgets(cls) -> dict[str, Any]:
        """Return the form's fields, for Airflow below 3.2; newer ones read the provider's metadata."""
        from airflow_provider_datasphere.hooks._form import form_widgets

        return form_widgets()

    @classmethod
    def get_ui_field_behaviour(cls) -> dict[str, Any]:
        """Return the form's hidden fields and placeholders, for Airflow below 3.2."""
        from airflow_provider_datasphere.hooks._form import field_behaviour

        return field_behaviour()

    @property
    def settings(self) -> Settings:
        """The connection's settings, checked. Blocks; in event loops use :meth:`aget_settings`.

        :raises JobRequestError: a field is invalid.
        """
        if self._settings is None:
            from airflow_provider_datasphere.hooks._masking import mask_secrets

            connection = self._get_connection_with_retries()
            self._mask(connection)
            self._settings = self._read(connection)
            mask_secrets(self._settings.secrets)
        return self._settings

    async def aget_settings(self) -> Settings:
        """Return :attr:`settings`, for coroutines.

        :raises JobRequestError: a field is invalid.
        """
        if self._settings is None:
            from airflow_provider_datasphere.hooks._masking import mask_secrets

            connection = await self._aget_connection()
            self._mask(connection)
            # In a thread: a key may be in a file, and the first import of gRPC and the stubs takes a while.
            self._settings = await asyncio.to_thread(self._read_and_load, connection)
            mask_secrets(self._settings.secrets)
        return self._settings

    def _get_connection_with_retries(self) -> Any:
        """Return the connection; retries errors that may be transient, such as a database failover."""
        for pause in READ_RETRY_SECONDS:
            try:
                return self.get_connection(self.datasphere_conn_id)
            except (AirflowNotFoundException, ValueError):
                raise  # missing or invalid
            except Exception as error:
                self.log.warning(
                    "Failed to read connection %s: %s: %s; retrying.",
                    self.datasphere_conn_id,
                    type(error).__name__,
                    error,
                )
            time.sleep(pause)
        return self.get_connection(self.datasphere_conn_id)

    def get_conn(self) -> DataSphereClient:
        """Return the client. It has the methods of the SDK's class: ``fork_job``, ``get_job``, ``download_job_files``.

        :raises JobRequestError: a field of the connection is invalid.
        """
        if self._client is None:
            from airflow_provider_datasphere.client.sync_client import DataSphereClient

            self._client = DataSphereClient(
                self.settings,
                refresh_settings=self._reread_settings,
                connection=self.datasphere_conn_id,
                translate_errors=airflow_exceptions,
            )
        return self._client

    async def aget_client(self) -> AsyncDataSphereClient:
        """Return the client for coroutines: one for all that ask for it within :data:`SHARED_READING_SECONDS`.

        Those of one event loop share gRPC channels and token in any case; later ones share the client too, unless the
        connection has changed.

        :raises JobRequestError: a field of the connection is invalid.
        """
        loop = asyncio.get_running_loop()
        for closed in [known for known in _clients if known.is_closed()]:
            del _clients[closed]
        clients = _clients.setdefault(loop, {})
        began, client = clients.get(self.datasphere_conn_id, (float("-inf"), None))
        failed = client is not None and client.done() and (client.cancelled() or client.exception() is not None)
        if client is None or failed or (client.done() and time.monotonic() - began >= SHARED_READING_SECONDS):
            client = asyncio.create_task(self._make_client(None if failed or client is None else client.result()))
            clients[self.datasphere_conn_id] = (time.monotonic(), client)
        # Shielded: a cancelled trigger must not cancel it for the others.
        return await asyncio.shield(client)

    async def _make_client(self, known: AsyncDataSphereClient | None) -> AsyncDataSphereClient:
        """
        :param known: the client so far, returned if the connection hasn't changed.
        """
        settings = await self.aget_settings()
        from airflow_provider_datasphere.client.async_client import AsyncDataSphereClient
        from airflow_provider_datasphere.client.connection.reloading_channels import AsyncReloadingChannels

        if known is not None and known.settings.fingerprint == settings.fingerprint:
            return known
        return AsyncDataSphereClient(AsyncReloadingChannels(settings, self._areread_settings), settings)

    def get_sdk(self) -> Any:
        """Return a real ``datasphere.SDK`` on this connection's channel and token, if that package is installed.

        Created without the side effects of ``SDK()``: logging stays unchanged, no folder of log files. Its ``wait()``
        ends when the job can no longer be monitored, instead of waiting forever.

        :raises JobRequestError: the package is missing or too old; the message has the command to install it.
        """
        from airflow_provider_datasphere.client.connection.channels import Channels
        from airflow_provider_datasphere.client.official_sdk import make_sdk

        with airflow_exceptions():
            return make_sdk(Channels(self.settings))

    def test_connection(self) -> tuple[bool, str]:
        """Test the connection with an authorized call.

        :return: whether it works, and a message with account, project and what is missing.
        """
        from airflow_provider_datasphere.client.connection.check import check_connection

        try:
            settings = self.settings
        except JobRequestError as error:
            return False, str(error)
        return check_connection(settings)

    def _reread_settings(self) -> Settings | None:
        """Reload the connection, for a client that the service refuses; None: it can't be read."""
        from airflow_provider_datasphere.hooks._masking import mask_secrets

        if AIRFLOW_V_3_0_PLUS and threading.current_thread() is not threading.main_thread():
            return None  # only the main thread may use a task's channel to its supervisor
        if time.monotonic() - self._reread_at < REREAD_SECONDS:
            return None
        try:
            connection = self.get_connection(self.datasphere_conn_id)
            self._mask(connection)
            settings = self._read_changed(connection)
        except Exception as error:
            self._warn_of_reload_error(error)
            return None
        finally:
            self._reread_at = time.monotonic()
        mask_secrets(settings.secrets)
        self._settings = settings
        return settings

    async def _areread_settings(self) -> Settings | None:
        """Reload the connection, for coroutines: once for all hooks of the event loop with this connection."""
        readings = _rereadings.setdefault(asyncio.get_running_loop(), {})
        began, reading = readings.get(self.datasphere_conn_id, (float("-inf"), None))
        if reading is None or (reading.done() and time.monotonic() - began >= REREAD_SECONDS):
            reading = asyncio.create_task(self._aread_changed())
            readings[self.datasphere_conn_id] = (time.monotonic(), reading)
        # Shielded: a cancelled trigger must not cancel it for the others.
        return await asyncio.shield(reading)

    async def _aread_changed(self) -> Settings | None:
        from airflow_provider_datasphere.hooks._masking import mask_secrets

        try:
            connection = await self._aget_connection()
            self._mask(connection)
            settings = await asyncio.to_thread(self._read_changed, connection)
        except Exception as error:
            self._warn_of_reload_error(error)
            return None
        mask_secrets(settings.secrets)
        self._settings = settings
        return settings

    def _read_changed(self, connection: Any) -> Settings:
        """Return the settings of a reloaded connection, parsed only if it has changed, as parsing logs warnings."""
        # A key in a file may have changed under its name.
        from_file = "service_account_json_path" in (connection.extra or "")
        if self._settings is not None and not from_file and self._digest(connection) == self._read_digest:
            return self._settings
        return self._read(connection)

    def _warn_of_reload_error(self, error: Exception) -> None:
        # Only the type of foreign errors: their text may contain secrets.
        what = str(error) if isinstance(error, JobRequestError) else type(error).__name__
        self.log.warning(
            "DataSphere refused a call, and reloading connection %s failed: %s",
            self.datasphere_conn_id,
            what,
        )

    @staticmethod
    def _digest(connection: Any) -> bytes:
        return sha256(f"{connection.conn_type} {connection.extra}".encode()).digest()

    def _read_and_load(self, connection: Any) -> Settings:
        """Parse the connection, and import what would otherwise block the event loop."""
        from airflow_provider_datasphere.client import async_client  # noqa: F401
        from airflow_provider_datasphere.client.connection.grpc_channel import load_stubs

        load_stubs()
        return self._read(connection)

    def _mask(self, connection: Any) -> None:
        """Have Airflow mask what may be a secret before anything looks into it, and says what it finds."""
        from airflow_provider_datasphere.client.secret_detection import possible_secrets
        from airflow_provider_datasphere.hooks._masking import mask_secrets

        with suppress(JobRequestError):
            mask_secrets(possible_secrets(self._extra(connection)))

    def _read(self, connection: Any) -> Settings:
        from airflow_provider_datasphere.client.connection.settings import Settings
        from airflow_provider_datasphere.client.connection.token_source import TokenSource
        from airflow_provider_datasphere.hooks._masking import mask_token

        self._warn_of_unused(connection)
        self._read_digest = self._digest(connection)
        with airflow_exceptions():
            settings = Settings.from_extra(self._extra(connection), conn_type=connection.conn_type or self.conn_type)
        TokenSource.shared(settings).listen(mask_token)
        return settings

    def _extra(self, connection: Any) -> dict[str, Any]:
        # Not Airflow's extra_dejson: it speaks to the supervisor (not safe in a thread or loop of older versions), and
        # takes text that isn't JSON for an empty extra.
        text = connection.extra
        if not text:
            return {}
        try:
            extra = json.loads(text)
        except ValueError:
            # Not chained: that error holds the text.
            raise JobRequestError(
                f"connection {self.datasphere_conn_id!r}: its extra is not valid JSON. Fix it, or use the form."
            ) from None
        if not isinstance(extra, dict):
            raise JobRequestError(f"connection {self.datasphere_conn_id!r}: its extra must be a JSON object.")
        return extra

    def _warn_of_unused(self, connection: Any) -> None:
        unused = [name for name in ("host", "port", "login", "password", "schema") if getattr(connection, name, None)]
        if unused and connection.conn_type != "yandexcloud":
            self.log.warning(
                "Connection %s: its %s are ignored; set the extra fields (endpoint, …) instead.",
                self.datasphere_conn_id,
                " and ".join(unused),
            )

    async def _aget_connection(self) -> Any:
        from asgiref.sync import sync_to_async

        # Airflow 3.3.2 is the first that masks a connection's secrets without blocking the loop's line to the
        # supervisor, which is also when Connection.aextra_dejson came. Before, asgiref's threads are the ones from
        # which a trigger may use that line.
        try:
            from airflow.sdk import Connection

            masks_asynchronously = hasattr(Connection, "aextra_dejson")
        except ImportError:
            masks_asynchronously = False
        if masks_asynchronously:
            return await self.aget_connection(self.datasphere_conn_id)
        return await sync_to_async(self.get_connection, thread_sensitive=False)(self.datasphere_conn_id)
