"""A function with its arguments as a folder that is shipped with a job, and the proof that it leaves there."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_provider_datasphere.client.errors import JobRequestError
from airflow_provider_datasphere.client.function import values
from airflow_provider_datasphere.client.function.encoding import encoded
from airflow_provider_datasphere.client.transfer.local_modules import module_files

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.function.source import FunctionSource

#: The folder in the job, and the one in it that is ours.
FOLDER, OWN_FOLDER = "function", "_datasphere"
#: The output that shows how the function ended.
PROOF = "datasphere_function_result.json"
#: A fixed time of all files: the same function makes the same archive on every worker.
_TIME = 946_684_800.0
#: What pickles written here are read by.
WORKER_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
_PACKAGE = Path(__file__).resolve().parents[2]
_VAR = re.compile(r"[0-9A-Za-z_\-]{1,50}")


@dataclass(frozen=True)
class FunctionCall:
    """A function and what it is called with.

    :param args: positional arguments; those of inputs are placeholders.
    :param kwargs: named arguments, likewise.
    :param inputs: parameter -> local path or URI of an input.
    :param outputs: paths that the function writes.
    :param modules: files and folders to ship.
    :param serializer: ``json`` or ``cloudpickle``.
    """

    source: FunctionSource
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    inputs: Mapping[str, str] = field(default_factory=dict)
    outputs: Sequence[str] = ()
    modules: Sequence[Path] = ()
    serializer: str = "json"

    @property
    def input_vars(self) -> dict[str, str]:
        """Parameter -> the variable of its input: its own name, where that can be one."""
        return {name: name if _VAR.fullmatch(name) else f"INPUT_{number}" for number, name in enumerate(self.inputs)}

    @property
    def command(self) -> str:
        """The job's command."""
        words = ["python", f"{FOLDER}/{OWN_FOLDER}/driver.py"]
        for var in self.input_vars.values():
            words += [var, f"${{{var}}}"]
        return " ".join(words)

    def write(self, folder: Path) -> None:
        """Write the folder that is shipped.

        :param folder: an empty one, that becomes :data:`FOLDER` of the job.
        :raises JobRequestError: an argument can't be passed, or a module can't be read.
        """
        own = folder / OWN_FOLDER
        own.mkdir(parents=True)
        program = {
            "function": self.source.name,
            "filename": self.source.filename,
            "flags": self.source.flags,
            "positional": list(self.source.parameters[: len(self.args)]),
            "inputs": self.input_vars,
            "proof": PROOF,
            "serializer": self.serializer,
        }
        if self.serializer == "cloudpickle":
            program["pickle_python"] = WORKER_PYTHON
            (own / "arguments.pickle").write_bytes(pickled((list(self.args), dict(self.kwargs))))
        else:
            program["arguments"] = [self._encoded_args(), self._encoded_kwargs()]
        (own / "program.json").write_text(json.dumps(program, ensure_ascii=False, indent=1), "utf-8")
        with (own / "function.py").open("w", encoding="utf-8", newline="") as file:
            file.write(self.source.text)
        for name in ("driver.py", "values.py"):
            shutil.copyfile(Path(__file__).with_name(name), own / name)
        package = folder / _PACKAGE.name
        package.mkdir()
        (package / "__init__.py").write_text("")
        shutil.copyfile(_PACKAGE / "job.py", package / "job.py")
        self._copy_modules(folder)
        for path in folder.rglob("*"):
            os.utime(path, (_TIME, _TIME))

    def _encoded_args(self) -> list[Any]:
        names = [*self.source.parameters, *(f"argument {number}" for number in range(len(self.args)))]
        return [encoded(self.source.name, name, value) for name, value in zip(names, self.args, strict=False)]

    def _encoded_kwargs(self) -> dict[str, Any]:
        return {name: encoded(self.source.name, name, value) for name, value in self.kwargs.items()}

    def _copy_modules(self, folder: Path) -> None:
        for module in self.modules:
            for file, entry in module_files(module):
                target = folder / entry
                if target.exists() or entry.parts[0] in (OWN_FOLDER, _PACKAGE.name):
                    raise JobRequestError(f"modules has {str(entry)!r} twice, or it is a name of ours: rename it.")
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)


def pickled(value: Any) -> bytes:
    """Return a value as cloudpickle has it.

    :raises JobRequestError: it isn't installed here, or can't pickle the value.
    """
    try:
        import cloudpickle
    except ImportError as error:
        raise JobRequestError(
            "serializer='cloudpickle' needs the package on the worker too: pip install "
            "'airflow-provider-datasphere[cloudpickle]'."
        ) from error
    try:
        return bytes(cloudpickle.dumps(value))
    except Exception as error:
        raise JobRequestError(f"The arguments can't be pickled: {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Proof:
    """How a function ended.

    :param value: what it returned.
    :param error: type, message, notes and traceback of what it raised; ``None``: nothing.
    :param skip: why it asked to skip its task; ``None``: it didn't.
    """

    value: Any = None
    error: Mapping[str, Any] | None = None
    skip: str | None = None

    @classmethod
    def read(cls, content: bytes) -> Proof | None:
        """Return the proof of a job's file; ``None`` if it is none."""
        try:
            found = json.loads(content)
            if "skip" in found:
                return cls(skip=str(found["skip"]))
            if "error" in found:
                return cls(error={name: found["error"][name] for name in ("type", "message", "traceback")})
            if "exit" in found:
                return cls()
            return cls(_value_of(found["result"], str(found.get("python"))))
        except (ValueError, KeyError, TypeError, AttributeError):
            return None


def _value_of(result: Any, python: str) -> Any:
    if not (isinstance(result, dict) and set(result) == {"pickle"}):
        return values.decode(result)
    import base64

    import cloudpickle

    try:
        return cloudpickle.loads(base64.b64decode(result["pickle"]))
    except Exception as error:
        raise JobRequestError(
            f"The return value can't be unpickled here (Python {WORKER_PYTHON}; the job had {python}): "
            f"{type(error).__name__}: {error}. Return what JSON can hold, or a class that the worker has."
        ) from error


def last_traceback(log: str) -> Mapping[str, str] | None:
    """Return the last exception in a program's output, as :class:`Proof` has it; ``None``: there is none.

    The service may store no outputs of a failed job: then the log alone has it.
    """
    begin = log.rfind("Traceback (most recent call last):")
    if begin < 0:
        return None
    # Of a chain, from its first: "During handling of …" and "The above exception …" join them.
    joints = ("During handling of the above exception", "The above exception was the direct cause")
    while any(joint in log[max(0, begin - 200) : begin] for joint in joints):
        before = log.rfind("Traceback (most recent call last):", 0, begin)
        if before < 0:
            break
        begin = before
    text = log[begin:].rstrip() + "\n"
    last = log.rfind("Traceback (most recent call last):")
    heads = [line for line in log[last:].splitlines()[1:] if line and not line.startswith((" ", "\t"))]
    kind, _, message = (heads[0] if heads else "Exception").partition(": ")
    return {"type": kind, "message": message, "traceback": text}
