"""Runs a function in a job, and leaves proof of how it ended. Executed there, never imported here.

Shipped with each job as it is: standard library only, Python 3.8 and newer. Beside it lie ``values.py``, the function's
source, and ``program.json``.
"""

import base64
import importlib.util
import json
import linecache
import os
import sys
import traceback
from typing import Any

#: Of the return value, bytes of JSON.
MAX_RESULT_BYTES = 64 * 1024
#: Of the traceback in the proof, characters; the job's log has all of it.
MAX_TRACEBACK = 32 * 1024
HERE = os.path.dirname(os.path.abspath(__file__))


def load(name: str, path: str) -> Any:
    """Import a file by its path, whatever else is called like it."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def main() -> int:
    """Run the function; return the exit code."""
    with open(os.path.join(HERE, "program.json"), encoding="utf-8") as file:
        program = json.load(file)
    # The user's modules come first; this folder must not hide one of them.
    sys.path = [entry for entry in sys.path if os.path.abspath(entry or ".") != HERE]
    sys.path[:0] = [os.path.dirname(HERE), os.getcwd()]
    values = load("_datasphere_values", os.path.join(HERE, "values.py"))
    ours = os.path.join(os.path.dirname(HERE), "airflow_provider_datasphere")
    job = load("airflow_provider_datasphere.job", os.path.join(ours, "job.py"))
    job._in_function_job = True
    # Absolute, and now: the function may change its folder.
    place = os.path.abspath(program["proof"])
    proof: Any = {"python": "%d.%d" % sys.version_info[:2]}
    code = 0
    try:
        check_python(program)
        function = define(program)
        args, kwargs = arguments(program, values)
        proof["result"] = result_of(function(*args, **kwargs), program, values)
    except job.SkipTask as skipped:
        proof["skip"] = str(skipped)
        print("Skipping the task: %s" % skipped, flush=True)
    except SystemExit as ended:
        code = exit_code(ended)
        if code:
            proof["exit"] = code
        else:
            proof["result"] = None
    except BaseException as error:
        code = 1
        proof["error"] = describe(error)
        sys.stdout.flush()
        print(proof["error"]["traceback"], end="", file=sys.stderr, flush=True)
    write(place, proof)
    return code


def check_python(program: Any) -> None:
    """Pickles are read by the Python that wrote them."""
    wanted, here = program.get("pickle_python"), "%d.%d" % sys.version_info[:2]
    if wanted and wanted != here:
        raise RuntimeError(
            "serializer='cloudpickle' needs the same Python on both sides: the worker has %s, the job has %s. Set "
            "python_version=%r, or use serializer='json'." % (wanted, here, wanted)
        )


def define(program: Any) -> Any:
    """Return the function, with the lines and the name of the file that it comes from."""
    with open(os.path.join(HERE, "function.py"), encoding="utf-8", newline="") as file:
        source = file.read()
    name = program["filename"]
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    namespace = {"__name__": "__main__", "__file__": name, "__builtins__": __builtins__}
    exec(compile(source, name, "exec", flags=program["flags"], dont_inherit=True), namespace)
    return namespace[program["function"]]


def arguments(program: Any, values: Any) -> Any:
    """Return positional and named arguments; those of inputs are paths of this job."""
    from pathlib import Path

    if program["serializer"] == "cloudpickle":
        import cloudpickle

        with open(os.path.join(HERE, "arguments.pickle"), "rb") as file:
            args, kwargs = cloudpickle.load(file)
    else:
        args, kwargs = values.decode(program["arguments"])
    given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    paths = {name: Path(os.path.abspath(given[var])) for name, var in program["inputs"].items()}
    positional = [paths.get(name, value) for name, value in zip(program["positional"], args)]
    return [*positional, *args[len(positional) :]], {name: paths.get(name, value) for name, value in kwargs.items()}


def result_of(value: Any, program: Any, values: Any) -> Any:
    """Return the return value as the proof has it."""
    if program["serializer"] == "cloudpickle":
        import cloudpickle

        content = cloudpickle.dumps(value)
        size, result = len(content), {"pickle": base64.b64encode(content).decode()}
    else:
        result = values.encode(value, "the return value")
        size = len(json.dumps(result, ensure_ascii=False).encode())
    if size > MAX_RESULT_BYTES:
        raise ValueError(
            "The return value has %d bytes, and %d are allowed: write it to a file, name the file in outputs=[…], and "
            "return its path." % (size, MAX_RESULT_BYTES)
        )
    return result


def exit_code(ended: SystemExit) -> int:
    """Return the code of sys.exit(), which takes anything."""
    if ended.code is None:
        return 0
    if isinstance(ended.code, int):
        return ended.code & 0xFF or (1 if ended.code else 0)
    print(ended.code, file=sys.stderr, flush=True)
    return 1


def describe(error: BaseException) -> Any:
    """Return an exception in text: the task's side may not have its class."""
    kind = type(error)
    name = (
        kind.__qualname__
        if kind.__module__ in ("builtins", "__main__")
        else "%s.%s"
        % (
            kind.__module__,
            kind.__qualname__,
        )
    )
    try:
        text = str(error)
    except Exception:
        text = "(its text can't be made)"
    own = error.__traceback__.tb_next if error.__traceback__ is not None else None
    lines = traceback.format_exception(kind, error, own)
    shown = "".join(lines)
    if len(shown) > MAX_TRACEBACK:
        half = MAX_TRACEBACK // 2
        shown = "%s\n… %d characters left out …\n%s" % (shown[:half], len(shown) - 2 * half, shown[-half:])
    return {
        "type": name,
        "message": text[:MAX_TRACEBACK],
        "notes": [str(note) for note in getattr(error, "__notes__", ())],
        "traceback": shown,
    }


def write(path: str, proof: Any) -> None:
    """Write the proof as a whole or not at all."""
    temporary = path + ".part"
    with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
        json.dump(proof, file, ensure_ascii=True)
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())
