"""DataSphere Jobs on localhost: speaks the official protos and runs jobs as processes.

::

    from datasphere_emulator import Emulator

    with Emulator() as emulator:
        job_id = emulator.create_job("python main.py", files={"main.py": "print('hello')"})

Imports nothing heavy: the pytest plugin and the child runner import this file too.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasphere_emulator.emulator import Emulator
    from datasphere_emulator.script import LogLine, Progress, Script, ScriptedOutput
    from datasphere_emulator.settings import Settings

__all__ = ["Emulator", "LogLine", "Progress", "Script", "ScriptedOutput", "Settings"]

_HOMES = {
    "Emulator": "emulator",
    "LogLine": "script",
    "Progress": "script",
    "Script": "script",
    "ScriptedOutput": "script",
    "Settings": "settings",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
