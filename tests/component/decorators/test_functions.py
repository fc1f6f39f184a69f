"""``@task.datasphere`` in one process: functions of DAG files run as jobs of the emulator."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_datasphere.compat import AirflowSkipException, TaskDeferred
from airflow_provider_datasphere.exceptions import JobFailedError, JobRequestError, MissingOutputsError, RemoteError
from airflow_side import connect, context_of
from datasphere_emulator import Emulator

HEAD = """\
from airflow.sdk import DAG, task
from airflow_provider_datasphere.decorators import datasphere
"""


@pytest.fixture(scope="module")
def running() -> Iterator[Emulator]:
    with Emulator(tls=False) as emulator:
        yield emulator


@pytest.fixture
def emulator(running: Emulator, monkeypatch: pytest.MonkeyPatch) -> Emulator:
    connect(running, monkeypatch)
    running.faults.clear()
    return running


Load = Callable[..., Any]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Imports a DAG file with this text; returns its module."""

    def load(text: str, head: str = HEAD) -> Any:
        name = f"dag_{uuid.uuid4().hex}"
        path = tmp_path / f"{name}.py"
        path.write_text(head + textwrap.dedent(text))
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module

    return load


def run(function: Any, *args: Any, context: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    """Call a decorated function in a DAG, and run its task."""
    return run_task(task_of(function, *args, **kwargs), context)


def task_of(function: Any, *args: Any, folder: Path | None = None, **kwargs: Any) -> Any:
    from airflow.sdk import DAG

    with DAG(f"dag_{uuid.uuid4().hex}", schedule=None) as dag:
        xcom = function(*args, **kwargs)
    if folder is not None:
        dag.fileloc = str(folder / "dag.py")
    task = xcom.operator
    task.poll_interval = 0.2
    return task


def run_task(task: Any, context: dict[str, Any] | None = None) -> Any:
    made = context_of(task)
    return task.execute({**made, **(context or {})})


def test_a_function_runs_as_a_job(
    emulator: Emulator, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    module = load(
        """
        @task.datasphere(name="training", deferrable=False)
        def train(rows, rate=0.5, *, label: str = "x", **more):
            # a comment
            text = '''
        # a line that begins with a hash, with less indentation than the code
        @task.datasphere
        '''
            print("rows", rows)
            return {"rows": rows, "rate": rate, "label": label, "more": more, "text": text}
        """
    )
    task = task_of(module.train, 10, label="y", extra=[1, None, True])
    context = context_of(task)
    value = task.execute(context)
    assert value == {
        "rows": 10,
        "rate": 0.5,
        "label": "y",
        "more": {"extra": [1, None, True]},
        "text": "\n# a line that begins with a hash, with less indentation than the code\n@task.datasphere\n",
    }
    xcoms = context["ti"].xcoms
    job = emulator.job(xcoms["job_id"])
    assert job.name == "training"
    assert "return_value" not in xcoms  # Airflow pushes what the task returns
    assert (xcoms["result"]["status"], xcoms["result"]["output_files"]) == ("SUCCESS", [])
    assert xcoms["operation_id"] == emulator.operation_of(job.id)
    assert list(tmp_path.glob("datasphere-*")) == []
    assert job.job_parameters.env.python_env.python_version == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert not job.job_parameters.env.vars


def test_the_function_stays_callable(load: Load) -> None:
    module = load(
        """
        @task.datasphere
        def double(number: int) -> int:
            from airflow_provider_datasphere.job import progress, skip

            progress(50, "half")
            skip("never outside of a job")
            return 2 * number
        """
    )
    assert module.double.function(21) == 42


#: Name -> text of a DAG file with a decorated function ``f`` without parameters, and what it returns.
FORMS: dict[str, tuple[str, Any]] = {
    "aliased decorator": (
        "from airflow.sdk import task as t\n@t.datasphere\ndef f():\n    return 1\n",
        1,
    ),
    "decorator's name in comment and string": (
        "@task.datasphere()\ndef f():\n    # @task.datasphere\n    return '@task.datasphere() def f(): pass'\n",
        "@task.datasphere() def f(): pass",
    ),
    "decorator over several lines": (
        "@task.datasphere(\n    env_vars={\n        'A': ')',\n    },\n)\ndef f():\n    import os\n\n"
        "    return os.environ['A']\n",
        ")",
    ),
    "stacked decorators": (
        "@task.run_if(lambda context: True)\n@task.skip_if(lambda context: False)\n@task.datasphere\ndef f():\n"
        "    return 'stacked'\n",
        "stacked",
    ),
    "a head over several lines": (
        "@task.datasphere\ndef f(\n    a: int = 1,  # one\n    *,\n    b: 'str' = 'x)',\n) -> dict[str, int]:\n\n"
        "    return [a, b]\n",
        [1, "x)"],
    ),
    "a body on the head's line": ("@task.datasphere\ndef f(): a = 1; return a + 1\n", 2),
    "a string that begins there": ("@task.datasphere\ndef f(): return '''a\nb\n  c'''\n", "a\nb\n  c"),
    "indented in a function": (
        "def outer():\n        @task.datasphere\n        def f():\n            x = '''\nleft\n'''\n"
        "            return x\n"
        "        return f\nf = outer()\n",
        "\nleft\n",
    ),
    "indented with tabs": ("if True:\n\t@task.datasphere\n\tdef f():\n\t\treturn 'tabs'\n", "tabs"),
    "within a DAG": ("with DAG('x', schedule=None):\n    @task.datasphere\n    def f():\n        return 'in'\n", "in"),
    "annotations and defaults that name globals": (
        "import decimal\nDEFAULT = 7\nclass Mine: pass\n@task.datasphere\n"
        "def f(a: Mine = None, b=DEFAULT, c: decimal.Decimal = decimal.Decimal('1.5')) -> Mine:\n"
        "    x: Mine = b\n    return [x, c]\n",
        None,
    ),
    "nested functions and closures of its own": (
        "@task.datasphere\ndef f():\n    base = 2\n\n    def add(x):\n        nonlocal base\n        base += x\n"
        "        return base\n\n"
        "    class A:\n        y: int = 3\n\n        def z(self):\n            return add(self.y)\n\n"
        "    return [A().z() for _ in range(2)]\n",
        [5, 8],
    ),
    "recursion and a global of its own": (
        "@task.datasphere\ndef f(n=5):\n    global seen\n    seen = n\n    return 1 if n < 2 else seen * f(n - 1)\n",
        120,
    ),
    "a docstring alone": ('@task.datasphere\ndef f():\n    """Nothing."""\n', None),
    "a nested decorated function first": (
        "@task.datasphere\ndef f():\n    @staticmethod\n    def g():\n        return 'g'\n\n    return g.__func__()\n",
        "g",
    ),
    "nothing": ("@task.datasphere\ndef f():\n    pass\n", None),
    "empty values": (
        "@task.datasphere\ndef f():\n    return ['', {}, [], 0, False, None]\n",
        ["", {}, [], 0, False, None],
    ),
    "sys.exit(0)": ("@task.datasphere\ndef f():\n    import sys\n\n    sys.exit()\n", None),
    "print and logging": (
        "@task.datasphere\ndef f():\n    import logging\n\n    logging.warning('logged')\n    print('printed')\n"
        "    return 'ок 🚀'\n",
        "ок 🚀",
    ),
    "another folder": (
        "@task.datasphere\ndef f():\n    import os\n\n    os.makedirs('deep')\n    os.chdir('deep')\n"
        "    return 'here'\n",
        "here",
    ),
    "positional only": (
        "@task.datasphere\ndef f(a=1, /, b=2, *rest, c=3):\n    return [a, b, list(rest), c]\n",
        [1, 2, [], 3],
    ),
    "a long function": (
        "@task.datasphere\ndef f():\n    total = 0\n" + "    total += 1\n" * 3000 + "    return total\n",
        3000,
    ),
}


@pytest.mark.parametrize("case", FORMS)
def test_forms_of_functions(emulator: Emulator, load: Load, case: str) -> None:
    from decimal import Decimal

    text, expected = FORMS[case]
    if case == "annotations and defaults that name globals":
        expected = [7, Decimal("1.5")]
    assert run(load(text).f) == expected


def test_annotations_of_the_future(emulator: Emulator, load: Load) -> None:
    text = (
        "@task.datasphere\ndef f(a: Nowhere = 1) -> NotHere:\n    def g(x: AlsoNot) -> Nope:\n        return x\n\n"
        "    return g(a)\n"
    )
    assert run(load(text, head=f"from __future__ import annotations\n{HEAD}").f) == 1


# What can't work ----------------------------------------------------------------------------------------------------

#: Name -> text of a DAG file, and what its import says.
REFUSED: dict[str, tuple[str, str]] = {
    "a global": (
        "import json as j\n@task.datasphere\ndef f():\n\n    return j.dumps(1)\n",
        r"f uses j \(line 7\), which comes from the DAG's file: import it inside the function, pass it as an argument, "
        r"or ship its module with modules=",
    ),
    "several globals": (
        "import json\nN = 1\n@task.datasphere\ndef f():\n    return json.dumps(N)\n",
        r"f uses (json \(line 7\), N \(line 7\)|N \(line 7\), json \(line 7\)), which come from",
    ),
    "a global in a nested function": (
        "N = 1\n@task.datasphere\ndef f():\n    def g():\n        return N\n\n    return g()\n",
        r"f uses N \(line 7\)",
    ),
    "a closure": (
        "def outer():\n    n = 1\n    @task.datasphere\n    def f():\n        return n\n    return f\nouter()\n",
        r"f uses n \(line 7\)",
    ),
    "a function of the file": (
        "def helper(): pass\n@task.datasphere\ndef f():\n    helper()\n",
        r"f uses helper \(line 6\)",
    ),
    "a lambda": ("f = task.datasphere(lambda: 1)\n", "takes no lambda"),
    "a partial": (
        "import functools\nf = task.datasphere(task_id='x')(functools.partial(print, 1))\n",
        "takes no functools.partial",
    ),
    "a method": ("class A:\n    def f(self): pass\nf = task.datasphere(A().f)\n", "takes no method"),
    "a function of a class": (
        "class A:\n    @task.datasphere\n    def f(this): pass\n",
        "A.f is defined in a class",
    ),
    "an async function": ("@task.datasphere\nasync def f(): pass\n", "f is an async function"),
    "a generator": ("@task.datasphere\ndef f():\n    yield 1\n", "f is a generator"),
    "a builtin": ("f = task.datasphere(task_id='x')(print)\n", "takes a function, not a builtin_function_or_method"),
    "a wrapped function": (
        "import functools\ndef deco(g):\n    @functools.wraps(g)\n    def w(*a): return g(*a)\n    return w\n"
        "@task.datasphere\n@deco\ndef f(): return 1\n",
        "f is wrapped by another decorator",
    ),
    "no source": (
        "scope = {}\nexec('def f(): return 1', scope)\nf = task.datasphere(scope['f'])\n",
        "The source of f isn't there",
    ),
    "the task instance": ("@task.datasphere\ndef f(ti=None): pass\n", "f takes 'ti', which exists on the worker only"),
    "the run": ("@task.datasphere\ndef f(dag_run): pass\n", "f takes 'dag_run', which exists on the worker only"),
    "an input without parameter": (
        "@task.datasphere(inputs={'tabel': 'x.csv'})\ndef f(table): pass\n",
        "inputs names 'tabel', and f has no such parameter; it has table",
    ),
    "newer syntax": (
        "@task.datasphere(python_version='3.9')\ndef f(x):\n    match x:\n        case 1:\n            return 1\n",
        r"Python 3.9 of the job can't parse f \(near line",
    ),
    "a version": (
        "@task.datasphere(python_version=3.11)\ndef f(): pass\n",
        "python_version is 3.11: give text such as",
    ),
    "a pattern": ("@task.datasphere(outputs=['*.pt'])\ndef f(): pass\n", r"outputs has '\*.pt', a pattern"),
    "requirements": ("@task.datasphere(requirements=[1])\ndef f(): pass\n", "requirements is"),
    "serializer": ("@task.datasphere(serializer='pickle')\ndef f(): pass\n", "give 'json' or 'cloudpickle'"),
    "a module as argument": (
        "import json\n@task.datasphere\ndef f(m): pass\nwith DAG('d', schedule=None): f(json)\n",
        "f: the argument m is a module, which can't be passed: import the module inside the function",
    ),
    "a set inside": (
        "@task.datasphere\ndef f(a, b): pass\nwith DAG('d', schedule=None): f(1, b={'x': [1, {2}]})\n",
        r"f: the argument b\['x'\]\[1\] is a set, which can't be passed: pass sorted\(value\)",
    ),
    "NaN": (
        "@task.datasphere\ndef f(a): pass\nwith DAG('d', schedule=None): f(float('nan'))\n",
        "a is nan, which JSON hasn't",
    ),
    "integer keys": (
        "@task.datasphere\ndef f(a): pass\nwith DAG('d', schedule=None): f({1: 2})\n",
        r"a has the key 1 \(int\)",
    ),
    "numpy": (
        "import numpy\n@task.datasphere\ndef f(a): pass\nwith DAG('d', schedule=None): f([numpy.float64(1)])\n",
        r"a\[0\] is a numpy.float64, which can't be passed: pass value.item\(\)",
    ),
    "pandas": (
        "import pandas\n@task.datasphere\ndef f(a): pass\nwith DAG('d', schedule=None): f(pandas.DataFrame())\n",
        r"a is a pandas.*DataFrame, which can't be passed: pass value.to_dict\('records'\)",
    ),
    "a pandas timestamp": (
        "import pandas\n@task.datasphere\ndef f(a): pass\n"
        "with DAG('d', schedule=None): f(pandas.Timestamp('2026-01-01'))\n",
        r"a is a pandas.*Timestamp, which can't be passed",
    ),
    "a default": (
        "@task.datasphere\ndef f(a={1}): pass\nwith DAG('d', schedule=None): f()\n",
        "the argument a is a set",
    ),
    "a missing argument": (
        "@task.datasphere\ndef f(a): pass\nwith DAG('d', schedule=None): f()\n",
        "missing a required argument",
    ),
    "an input given twice": (
        "@task.datasphere(inputs={'a': 'x'})\ndef f(a, b): pass\nwith DAG('d', schedule=None): f(1)\n",
        "f: 'a' is given by inputs and in the call",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_work_is_an_import_error(load: Load, case: str) -> None:
    text, message = REFUSED[case]
    with pytest.raises((JobRequestError, TypeError), match=message):
        load(text)


def test_a_changed_file_is_noticed(emulator: Emulator, load: Load) -> None:
    module = load("@task.datasphere\ndef f():\n    return 1\n")
    task = task_of(module.f)
    path = Path(module.__file__)
    path.write_text(path.read_text().replace("return 1", "return print(2)"))
    with pytest.raises(JobRequestError, match="isn't what runs"):
        run_task(task)


# Values -------------------------------------------------------------------------------------------------------------


def test_values_come_back_as_they_were(emulator: Emulator, load: Load) -> None:
    from datetime import date, datetime, timedelta, timezone
    from decimal import Decimal

    module = load(
        "@task.datasphere\ndef f(*values):\n    print([type(v).__name__ for v in values])\n    return list(values)\n"
    )
    values = [
        datetime(2026, 1, 2, 3, 4, 5, 6, timezone.utc),
        datetime(2026, 1, 2),
        date(2026, 1, 2),
        timedelta(days=-1, microseconds=5),
        Decimal("1.10"),
        Path("a/b"),
        uuid.uuid4(),
        b"\x00\xff",
        (1, (2,)),
        {"__datasphere__": "mine", "a": "ключ"},
        "line\nend\r\n",
        2**70,
        1e-300,
    ]
    assert run(module.f, *values) == values


def test_an_argument_of_a_mebibyte(emulator: Emulator, load: Load) -> None:
    assert run(load("@task.datasphere\ndef f(text):\n    return len(text)\n").f, "x" * 1024 * 1024) == 1024 * 1024


@pytest.mark.parametrize(("size", "fits"), [(64 * 1024 - 2, True), (64 * 1024 - 1, False)])
def test_a_return_value_has_a_limit(emulator: Emulator, load: Load, size: int, fits: bool) -> None:
    module = load("@task.datasphere\ndef f(n):\n    return 'x' * n\n")
    if fits:
        assert run(module.f, size) == "x" * size
        return
    with pytest.raises(RemoteError, match=r"The return value has 65537 bytes, and 65536 are allowed: .*outputs="):
        run(module.f, size)


def test_a_return_value_that_json_has_not(emulator: Emulator, load: Load) -> None:
    module = load("@task.datasphere\ndef f():\n    return {'a': [object()]}\n")
    with pytest.raises(RemoteError, match=r"the return value\['a'\]\[0\] is a object, which can't be passed"):
        run(module.f)


def test_lazy_results_of_a_mapped_task(emulator: Emulator, load: Load) -> None:
    from collections.abc import Sequence

    class Lazy(Sequence):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: Any) -> Any:
            return [10, 20, 30][index]

    task = task_of(load("@task.datasphere\ndef f(values):\n    return sum(values)\n").f, "{{ later }}")
    task.op_args = [Lazy()]
    assert run_task(task) == 60


def test_context_names_are_given(emulator: Emulator, load: Load) -> None:
    from datetime import datetime, timezone

    module = load(
        "@task.datasphere\ndef f(a, ds, run_id=None, params=None, logical_date=None):\n"
        "    return [a, ds, run_id, params, logical_date.year]\n"
    )
    context = {"ds": "2026-01-01", "params": {"x": 1}, "logical_date": datetime(2026, 1, 1, tzinfo=timezone.utc)}
    assert run(module.f, 5, context=context) == [5, "2026-01-01", "run", {"x": 1}, 2026]


def test_cloudpickle_carries_what_json_can_not(emulator: Emulator, load: Load) -> None:
    module = load("@task.datasphere(serializer='cloudpickle')\ndef f(a):\n    return {x * 2 for x in a}\n")
    task = task_of(module.f, {1, 2})
    assert run_task(task) == {2, 4}
    job = emulator.jobs()[-1]
    assert any(line.startswith("cloudpickle==") for line in job.job_parameters.env.python_env.requirements)


def test_cloudpickle_of_another_python_says_both(
    emulator: Emulator, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    from airflow_provider_datasphere.client.function import program

    monkeypatch.setattr(program, "WORKER_PYTHON", "3.1")
    module = load("@task.datasphere(serializer='cloudpickle')\ndef f(a):\n    return a\n")
    with pytest.raises(RemoteError, match=rf"the worker has 3.1, the job has 3.{sys.version_info.minor}"):
        run(module.f, {1})


def folder_of_python(version: str) -> Path | None:
    """The folder with another Python, wherever this machine has it; a version manager's may not be in the path."""
    folders = [*map(Path, os.environ["PATH"].split(os.pathsep)), *Path.home().glob(".pyenv/versions/*/bin")]
    for folder in folders:
        try:
            done = subprocess.run([folder / f"python{version}", "--version"], capture_output=True, text=True)
        except OSError:
            continue
        if done.returncode == 0 and version != f"{sys.version_info.major}.{sys.version_info.minor}":
            return folder
    return None


@pytest.mark.parametrize("version", ["3.8", "3.13"])
def test_another_python_in_the_job(
    emulator: Emulator, load: Load, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    folder = folder_of_python(version)
    if folder is None:
        pytest.skip(f"no other Python {version} on this machine")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    text = (
        "@task.datasphere(python_version='%s')\ndef f(a: list[int]):\n    import sys\n\n"
        "    from airflow_provider_datasphere.job import progress\n\n    progress(1)\n"
        "    return [a, '%%d.%%d' %% sys.version_info[:2]]\n"
    )
    value = {"when": datetime(2026, 1, 1, tzinfo=timezone.utc), "many": (1, b"2")}
    assert run(load(text % version).f, value) == [value, version]
    pickling = load(text.replace("(python", "(serializer='cloudpickle', python") % version)
    with pytest.raises(RemoteError, match=rf"the worker has .*, the job has {version}"):
        run(pickling.f, value)


# Inputs, outputs, modules -------------------------------------------------------------------------------------------


def test_inputs_are_paths_and_outputs_are_kept(emulator: Emulator, load: Load, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.csv").write_text("1\n2\n")
    module = load(
        """
        from pathlib import Path

        @task.datasphere(inputs={"table": "in/a.csv", "folder": Path("in")}, outputs=["out/model.txt"])
        def f(folder, rows: int, table):
            from pathlib import Path

            assert isinstance(table, Path)
            Path("out").mkdir()
            Path("out/model.txt").write_text(table.read_text() * rows)
            return sorted(path.name for path in folder.iterdir())
        """
    )
    task = task_of(module.f, rows=2, folder=tmp_path)
    context = context_of(task)
    assert task.execute(context) == ["a.csv"]
    (file,) = context["ti"].xcoms["result"]["output_files"]
    assert file["path"] == "out/model.txt"
    # Another job's file as an input.
    following = load(
        f"""
        @task.datasphere(inputs={{"model": "datasphere://{context["ti"].xcoms["job_id"]}/out/model.txt"}})
        def f(model):
            return model.read_text()
        """
    )
    assert run(following.f) == "1\n2\n1\n2\n"


def test_a_missing_input_is_named(emulator: Emulator, load: Load, tmp_path: Path) -> None:
    module = load("@task.datasphere(inputs={'table': 'none.csv'})\ndef f(table): pass\n")
    with pytest.raises(JobRequestError, match=r"inputs\['table'\] is 'none.csv': there is no such file or folder"):
        run_task(task_of(module.f, folder=tmp_path))


def test_a_missing_output_fails(emulator: Emulator, load: Load) -> None:
    module = load("@task.datasphere(outputs=['model.pt'])\ndef f(): return 1\n")
    with pytest.raises(MissingOutputsError, match=r"model\.pt"):
        run(module.f)


def test_modules_are_shipped(emulator: Emulator, load: Load, tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("def twice(x): return 2 * x\n")
    (tmp_path / "values").mkdir()  # a name that we have too
    (tmp_path / "values" / "__init__.py").write_text("SEVEN = 7\n")
    (tmp_path / "values" / "__pycache__").mkdir()
    module = load(
        """
        @task.datasphere(modules=["helper.py", "values"])
        def f():
            from helper import twice
            from values import SEVEN

            return twice(SEVEN)
        """
    )
    assert run_task(task_of(module.f, folder=tmp_path)) == 14


def test_requirements_are_lines_or_a_file(emulator: Emulator, load: Load, tmp_path: Path) -> None:
    (tmp_path / "reqs.txt").write_text("numpy==2.2.6  # pinned\n")
    module = load(
        "@task.datasphere(requirements=['torch==2.9.0', '--no-deps'], python_version='3.12')\ndef f(): return 1\n"
        "@task.datasphere(requirements='reqs.txt')\ndef g(): return 1\n"
        "@task.datasphere(docker='cr.yandex/x:1')\ndef h(): return 1\n"
    )
    environments = []
    for function in (module.f, module.g, module.h):
        run_task(task_of(function, folder=tmp_path))
        environments.append(emulator.jobs()[-1].job_parameters.env)
    first, second, third = environments
    assert list(first.python_env.requirements) == ["torch==2.9.0"]
    assert first.python_env.pip_options.no_deps
    assert first.python_env.python_version == "3.12"
    assert list(second.python_env.requirements) == ["numpy==2.2.6"]
    assert not third.HasField("python_env")
    assert third.docker_image_resource_id == "cr.yandex/x:1"


# Ends ---------------------------------------------------------------------------------------------------------------

RAISING = """
@task.datasphere
def f(kind):
    class Own(Exception):
        pass

    def deeper():
        if kind == "plain":
            raise ValueError("текст ошибки")
        try:
            {}["key"]
        except KeyError as error:
            new = Own("own text")
            if hasattr(new, "add_note"):
                new.add_note("a note")
            raise new from error

    deeper()
"""


def test_an_exception_comes_home(emulator: Emulator, load: Load) -> None:
    module = load(RAISING)
    with pytest.raises(RemoteError) as caught:
        run(module.f, "plain")
    message = str(caught.value)
    assert message.startswith("f raised ValueError: текст ошибки (in job bt1")
    assert "Traceback of the job:\nTraceback (most recent call last):" in message
    assert f'File "{module.__file__}", line 11, in deeper' in message
    assert 'raise ValueError("текст ошибки")' in message
    assert "driver.py" not in message
    assert isinstance(caught.value, JobFailedError)


def test_chains_notes_and_unknown_classes(emulator: Emulator, load: Load) -> None:
    with pytest.raises(RemoteError) as caught:
        run(load(RAISING).f, "chain")
    message = str(caught.value)
    assert "f raised f.<locals>.Own: own text" in message
    assert "KeyError: 'key'" in message
    assert "direct cause of the following exception" in message
    if sys.version_info >= (3, 11):
        assert "a note" in message


def test_an_exception_is_found_in_the_log_where_its_proof_is_not_stored(emulator: Emulator, load: Load) -> None:
    """Whether outputs of a failed job are stored is not documented."""
    emulator.settings.update({"outputs_after_error": "never"})
    try:
        with pytest.raises(RemoteError) as caught:
            run(load(RAISING).f, "chain")
    finally:
        emulator.settings.update({"outputs_after_error": "collected"})
    assert "Own: own text" in str(caught.value)
    assert "KeyError: 'key'" in str(caught.value)


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ("import sys; sys.exit(3)", JobFailedError, "return code 3"),
        ("import sys; sys.exit('words')", JobFailedError, "return code 1"),
        ("import os; os._exit(0)", JobFailedError, "ended with SUCCESS but left no proof that f ended"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", JobFailedError, "f was killed: out of memory?"),
    ],
)
def test_other_ends(emulator: Emulator, load: Load, body: str, error: type[Exception], message: str) -> None:
    module = load(f"@task.datasphere\ndef f():\n    {body}\n    return 1\n")
    with pytest.raises(error, match=message.replace("?", r"\?")) as caught:
        run(module.f)
    assert not isinstance(caught.value, RemoteError)


def test_a_skip_skips(emulator: Emulator, load: Load) -> None:
    module = load(
        """
        @task.datasphere
        def f():
            from airflow_provider_datasphere.job import skip

            try:
                skip("nothing to do")
            except Exception:
                pass
        """
    )
    with pytest.raises(AirflowSkipException, match="nothing to do"):
        run(module.f)


def test_progress_is_in_the_log(emulator: Emulator, load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    module = load(
        """
        @task.datasphere
        def f():
            import time
            from airflow_provider_datasphere.job import progress

            progress(50, "half way")
            time.sleep(1)
        """
    )
    run(module.f)
    assert "50 % half way" in capsys.readouterr().out


def test_it_defers_and_returns_its_value_afterwards(emulator: Emulator, load: Load) -> None:
    module = load("@task.datasphere(deferrable=True)\ndef f():\n    import time\n\n    time.sleep(1)\n    return [1]\n")
    task = task_of(module.f)
    context = context_of(task)
    with pytest.raises(TaskDeferred) as deferred:
        task.execute(context)
    fields = deferred.value.trigger.serialize()[1]
    emulator.wait_job(fields["job_id"])
    event = {
        "status": "ended",
        "job_id": fields["job_id"],
        "operation_id": fields["operation_id"],
        "try_number": 1,
    }
    resumed = task_of(module.f)
    assert resumed.resume_execution("execute_complete", {"event": event}, context) == [1]


def test_a_retry_takes_the_result_and_a_changed_function_runs_anew(emulator: Emulator, load: Load) -> None:
    module = load("@task.datasphere\ndef f(n):\n    return n + 1\n")
    before = len(emulator.jobs())
    task = task_of(module.f, 1)
    first = context_of(task, max_tries=1)
    first["ti"].dag_id = f"again_{uuid.uuid4().hex}"
    assert task.execute(first) == 2
    again = context_of(task, try_number=2, max_tries=1)
    again["ti"].dag_id = first["ti"].dag_id
    assert task.execute(again) == 2
    assert len(emulator.jobs()) == before + 1
    changed = task_of(load("@task.datasphere\ndef f(n):\n    return n + 2\n").f, 1)
    changed.task_id = task.task_id
    assert changed.execute(again) == 3
    assert len(emulator.jobs()) == before + 2


# Airflow's side -----------------------------------------------------------------------------------------------------


def test_mapping_and_overriding(load: Load) -> None:
    module = load(
        """
        @task.datasphere(cloud_instance_types=["g1.1"])
        def f(a, b=1): pass

        defaults = {"project_id": "bt1default", "poll_interval": 3.0, "retries": 4}
        with DAG("d", schedule=None, default_args=defaults):
            one = f.override(task_id="other", cloud_instance_types=["g2.1"], deferrable=True)(1)
            mapped = f.partial(b=2).expand(a=[1, 2])
            plain = f(3)
        """
    )
    one, mapped, plain = module.one.operator, module.mapped.operator, module.plain.operator
    assert (one.task_id, one.cloud_instance_types, one.deferrable) == ("other", ["g2.1"], True)
    assert (plain.project_id, plain.poll_interval, plain.retries) == ("bt1default", 3.0, 4)
    assert mapped.partial_kwargs["cloud_instance_types"] == ["g1.1"]
    assert type(plain).custom_operator_name == "@task.datasphere"
    with pytest.raises(TypeError):
        module.f(wait=1)


def test_templates_of_the_decorator(load: Load) -> None:
    module = load(
        """
        @task.datasphere(name="{{ ds }}", inputs={"a": "s3://x@b/{{ ds }}.csv"}, outputs=["{{ ds }}.pt"],
                         requirements=["torch=={{ params.v }}"], env_vars={"D": "{{ ds }}"})
        def f(a, b): pass

        with DAG("d", schedule=None):
            x = f(b="{{ ds }}")
        """
    )
    task = module.x.operator
    task.render_template_fields({"ds": "2026-01-01", "params": {"v": "2"}})
    assert task.name == "2026-01-01"
    assert task.inputs == {"a": "s3://x@b/2026-01-01.csv"}
    assert task.outputs == ["2026-01-01.pt"]
    assert task.requirements == ["torch==2"]
    assert task.op_kwargs["b"] == "2026-01-01"


def test_what_is_shipped_runs_on_python_3_8() -> None:
    import ast

    package = Path(sys.modules["airflow_provider_datasphere"].__file__ or "").parent
    for name in ("job.py", "client/function/driver.py", "client/function/values.py"):
        ast.parse((package / name).read_text(), feature_version=(3, 8))


def test_editors_find_the_decorator() -> None:
    from airflow.sdk import task

    import airflow_provider_datasphere.decorators as ours

    assert ours.task is task
    assert (Path(ours.__file__).with_suffix(".pyi")).exists()
    with pytest.raises(AttributeError):
        ours.nothing  # noqa: B018
