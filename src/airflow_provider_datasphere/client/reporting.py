"""Where the client says what it does."""

from __future__ import annotations

from typing import Any, Protocol


class Reporter(Protocol):
    """The part of a logger that is used here: ``logging``'s has it, and so has that of Airflow's tasks."""

    def debug(self, msg: str, /, *args: object) -> Any: ...

    def info(self, msg: str, /, *args: object) -> Any: ...

    def warning(self, msg: str, /, *args: object) -> Any: ...
