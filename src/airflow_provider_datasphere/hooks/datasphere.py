"""The hook: an Airflow connection made into a client of DataSphere Jobs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from airflow_provider_datasphere.compat import BaseHook
from airflow_provider_datasphere.exceptions import JobRequestError, translated

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.aio import AsyncDataSphereClient
    from airflow_provider_datasphere.client.jobs import DataSphereClient
    from airflow_provider_datasphere.client.settings import Settings


class DataSphereHook(BaseHook):
    """DataSphere Jobs by an Airflow connection of type ``datasphere`` (or ``yandexcloud``).

    Safe to construct anywhere: the connection is looked up, and the service connected to, with the first use.

    :param datasphere_conn_id: the connection's id.
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

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles know the connection's id; what was made of it holds secrets and sockets.
        return {**self.__dict__, "_settings": None, "_client": None}

    @classmethod
    def get_connection_form_widgets(cls) -> dict[str, Any]:
        """The form's fields, for Airflow below 3.2; newer ones read the provider's metadata."""
        from airflow_provider_datasphere.hooks._form import form_widgets

        return form_widgets()

    @classmethod
    def get_ui_field_behaviour(cls) -> dict[str, Any]:
        """The form's looks, for Airflow below 3.2."""
        from airflow_provider_datasphere.hooks._form import field_behaviour

        return field_behaviour()

    @property
    def settings(self) -> Settings:
        """The connection's fields, checked. Blocks: not for event loops (:meth:`aget_settings`).

        :raises JobRequestError: a field is wrong.
        """
        if self._settings is None:
            from airflow_provider_datasphere.hooks._masking import mask_secrets

            connection = self.get_connection(self.datasphere_conn_id)
            self._settings = self._read(connection)
            mask_secrets(self._settings.secrets)
        return self._settings

    async def aget_settings(self) -> Settings:
        """The same, for coroutines.

        :raises JobRequestError: a field is wrong.
        """
        if self._settings is None:
            import asyncio

            from airflow_provider_datasphere.hooks._masking import mask_secrets

            connection = await self._aget_connection()
            # In a thread: a key may be in a file, and the first import of gRPC and the stubs takes a while.
            self._settings = await asyncio.to_thread(self._read_and_load, connection)
            mask_secrets(self._settings.secrets)
        return self._settings

    def get_conn(self) -> DataSphereClient:
        """The client: methods as of the SDK's class (``fork_job``, ``get_job``, ``download_job_files``) and more.

        :raises JobRequestError: a field of the connection is wrong.
        """
        if self._client is None:
            from airflow_provider_datasphere.client.jobs import DataSphereClient

            self._client = DataSphereClient(self.settings, translated=translated)
        return self._client

    async def aget_client(self) -> AsyncDataSphereClient:
        """The client for coroutines. All of an event loop share their connections and token.

        :raises JobRequestError: a field of the connection is wrong.
        """
        settings = await self.aget_settings()
        from airflow_provider_datasphere.client.aio import AsyncDataSphereClient
        from airflow_provider_datasphere.client.channels import AsyncChannels

        return AsyncDataSphereClient(AsyncChannels.shared(settings), settings)

    def get_sdk(self) -> Any:
        """A real ``datasphere.SDK`` on this connection's channel and token, where that package is installed.

        Made without what ``SDK()`` does to its process: no change to logging, no folder of log files. Its ``wait()``
        ends when the job is out of sight instead of going on for ever.

        :raises JobRequestError: the package isn't there, or is too old; the message has the line that installs it.
        """
        from airflow_provider_datasphere.client.channels import Channels
        from airflow_provider_datasphere.client.official_sdk import make_sdk

        with translated():
            return make_sdk(Channels(self.settings))

    def test_connection(self) -> tuple[bool, str]:
        """Make a real, authorised call and tell who we are, which project, and what is missing.

        :return: whether it works, and the text for Airflow's "Test" button.
        """
        from airflow_provider_datasphere.client.check import check_connection

        try:
            settings = self.settings
        except JobRequestError as error:
            return False, str(error)
        return check_connection(settings)

    def _read_and_load(self, connection: Any) -> Settings:
        """Read the connection, and import all that a coroutine would otherwise stop the loop with."""
        from airflow_provider_datasphere.client import aio  # noqa: F401
        from airflow_provider_datasphere.client.transport import load_stubs

        load_stubs()
        return self._read(connection)

    def _read(self, connection: Any) -> Settings:
        from airflow_provider_datasphere.client.credentials import TokenSource
        from airflow_provider_datasphere.client.settings import Settings
        from airflow_provider_datasphere.hooks._masking import mask_token

        self._warn_of_unused(connection)
        with translated():
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
                f"connection {self.datasphere_conn_id!r}: its extra is not JSON. Write it anew, or use the form."
            ) from None
        if not isinstance(extra, dict):
            raise JobRequestError(f"connection {self.datasphere_conn_id!r}: its extra must be a JSON object.")
        return extra

    def _warn_of_unused(self, connection: Any) -> None:
        unused = [name for name in ("host", "port", "login", "password", "schema") if getattr(connection, name, None)]
        if unused and connection.conn_type != "yandexcloud":
            self.log.warning(
                "Connection %s: DataSphere makes no use of its %s; everything is in the extra fields (endpoint, …).",
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
