"""The light mode: ``dag.test()`` for many small DAGs in one process, without scheduler, triggerer and API server."""

from __future__ import annotations

import json
import subprocess
import tempfile
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.home import AirflowHome
from harness.venvs import AirflowVenv, airflow_venv

_MARK = "@@ harness "
_RUNNER = f'''

if __name__ == "__main__":

    def _run_all():
        import json
        import operator
        import os
        import sys

        try:
            from airflow.models.xcom import XComModel as XCom

            value_of = XCom.deserialize_value
        except ImportError:
            from airflow.models.xcom import XCom

            # Airflow 2 deserialises as it loads.
            value_of = operator.attrgetter("value")
        from airflow.utils.session import create_session

        values = [value for value in list(globals().values()) if not isinstance(value, type)]
        dags = [value for value in values if hasattr(value, "dag_id") and hasattr(value, "test")]
        for dag in {{dag.dag_id: dag for dag in dags}}.values():
            print("{_MARK}begin", dag.dag_id, flush=True)
            run = dag.test(run_conf=json.loads(os.environ["HARNESS_CONF"]))
            xcoms = {{}}
            with create_session() as session:
                found = session.query(XCom).filter(XCom.dag_id == dag.dag_id, XCom.run_id == run.run_id)
                for xcom in found:
                    xcoms.setdefault(f"{{xcom.task_id}}:{{xcom.map_index}}", {{}})[xcom.key] = value_of(xcom)
                found = run.get_task_instances(session=session)
                states = {{f"{{instance.task_id}}:{{instance.map_index}}": instance.state for instance in found}}
            sys.stdout.flush()
            result = {{"state": run.state, "states": states, "xcoms": xcoms}}
            print("\\n{_MARK}end", json.dumps(result, default=str), flush=True)

    _run_all()
'''


@dataclass(frozen=True)
class DagResult:
    """The end of one DAG's test run; tasks are keyed by (task id, map index)."""

    state: str
    states: dict[tuple[str, int], str | None]
    xcoms: dict[tuple[str, int], dict[str, Any]]
    log: str


def run_dags(
    source: str,
    *,
    venv: AirflowVenv | None = None,
    connections: Mapping[str, Mapping[str, Any]] | None = None,
    env: Mapping[str, str] | None = None,
    conf: Mapping[str, Any] | None = None,
    timeout: float = 280,
) -> dict[str, DagResult]:
    """Run each DAG of a file once with ``dag.test()``, one after the other, in one process.

    Costs 5 to 10 s once and about 0.1 s per DAG. What it does not show: kills, timeouts while deferred, retries, links;
    Airflow 3.3's ``dag.test()`` hands a resumed method only the event, not ``defer(kwargs=…)``, and Airflow 2.11's runs
    only the first of the mapped tasks that have no task before them.

    :param source: a DAG file whose DAGs are module variables (``with DAG(…) as first:``)
    :param venv: default: the development environment
    :param connections: connection id → its fields
    :return: DAG id → result
    :raises AssertionError: the process failed; with its output
    """
    variables = {f"AIRFLOW_CONN_{name.upper()}": json.dumps(fields) for name, fields in (connections or {}).items()}
    variables["HARNESS_CONF"] = json.dumps(dict(conf or {}))
    with tempfile.TemporaryDirectory(prefix="dagtest-") as folder:
        home = AirflowHome(venv or airflow_venv(), Path(folder).resolve(), variables | dict(env or {})).prepare()
        file = home.dags / "dags.py"
        file.write_text(textwrap.dedent(source) + _RUNNER)
        done = subprocess.run(
            [str(home.venv.bin / "python"), str(file)],
            env=home.environment(),
            cwd=home.path,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout,
        )
    assert done.returncode == 0, done.stdout
    results = {}
    for part in done.stdout.split(f"{_MARK}begin ")[1:]:
        dag_id, _, rest = part.partition("\n")
        log, _, answer = rest.partition(f"{_MARK}end ")
        end = json.JSONDecoder().raw_decode(answer)[0]
        results[dag_id] = DagResult(end["state"], _by_task(end["states"]), _by_task(end["xcoms"]), log)
    return results


def _by_task(values: Mapping[str, Any]) -> dict[tuple[str, int], Any]:
    keys = ((key.rpartition(":"), value) for key, value in values.items())
    return {(task_id, int(map_index)): value for (task_id, _, map_index), value in keys}
