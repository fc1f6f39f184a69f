"""The loggers that the client accepts."""

from __future__ import annotations

from typing import Any, Protocol


class LoggerLike(Protocol):
    """The used part of a logger: of ``logging``'s and of that of Airflow's tasks."""

    def debug(self, msg: str, /, *args: object) -> Any: ...

    def info(self, msg: str, /, *args: object) -> Any: ...

    def warning(self, msg: str, /, *args: object) -> Any: ...
