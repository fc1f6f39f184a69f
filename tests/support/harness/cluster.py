"""A cluster as users run it, on one machine: Celery workers, two schedulers, two triggerers, remote logs."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import psycopg2
import requests

from harness import postgres, redis
from harness.airflow import RealAirflow
from harness.components import Components
from harness.home import AirflowHome
from harness.postgres import PostgresServer
from harness.redis import RedisServer
from harness.s3 import S3Server
from harness.venvs import NEWEST, celery_venv

WORKERS = ("worker@1", "worker@2")
TRIGGERERS = ("triggerer", "triggerer@2")
SCHEDULERS = ("scheduler", "scheduler@2")
#: Tasks that a worker runs at once.
CONCURRENCY = 2
BUCKET = "airflow-logs"
_JOB_TYPES = {"scheduler": "SchedulerJob", "triggerer": "TriggererJob"}
#: Seconds, for a busy machine.
_PATIENCE = 240.0
#: What a node calls itself: tasks and triggerers tell Airflow where their logs are served.
_NODE = "import os\n\n\ndef name():\n    return os.environ.get('CLUSTER_NODE', '127.0.0.1')\n"


def missing_programs() -> list[str]:
    """What a cluster needs and this machine doesn't have."""
    found = {"PostgreSQL": postgres.programs(), "Redis": redis.program()}
    return [name for name, program in found.items() if program is None]


@dataclass
class ClusterComponents(Components):
    """Each component as on a machine of its own: an address, a folder for logs.

    A worker's logs are served by "log-server@1", which dies with the worker only if a test kills both.
    """

    #: Whether one that has ended by itself is started again, as a service manager does.
    restarts: bool = False
    #: Sizes of the output files when the components were last started.
    _printed_before: Counter[str] = field(default_factory=Counter)

    @property
    def commands(self) -> dict[str, list[str]]:
        api_server = "webserver" if self.home.venv.version.startswith("2.") else "api-server"
        names = ("dag-processor", *SCHEDULERS, *TRIGGERERS, *WORKERS, "log-server@1", "log-server@2")
        return {"api-server": [api_server], **{name: [name.partition("@")[0]] for name in names}}

    def command(self, name: str) -> list[str]:
        if name.startswith("log-server"):
            return self._log_server(f"worker@{name[-1]}")
        words = [str(self.home.venv.bin / "airflow"), *self.commands[name]]
        if name.startswith("triggerer"):
            words.append("--skip-serve-logs")
        if name.startswith("worker"):
            number = name[-1]
            words = [words[0], "celery", "worker", "--skip-serve-logs", "--without-mingle", "--without-gossip"]
            words += ["--celery-hostname", f"w{number}@{self.address(name)}", "--concurrency", str(CONCURRENCY)]
            words += ["--queues", f"default,w{number}", "--pid", str(self.home.path / f"{name}.pid")]
        return words

    def _log_server(self, worker: str) -> list[str]:
        python, where = str(self.home.venv.bin / "python"), (self.address(worker), str(self.home.log_port))
        if self.home.venv.version.startswith("2."):
            application = "airflow.utils.serve_logs:create_app()"
            return [python, "-m", "gunicorn", "--bind", ":".join(where), "--workers", "1", application]
        application = "airflow.utils.serve_logs.log_server:get_app"
        return [python, "-m", "uvicorn", "--factory", application, "--host", where[0], "--port", where[1]]

    def address(self, name: str) -> str:
        """The address of the node that a component is on."""
        nodes = {"worker@1": 11, "worker@2": 12, "log-server@1": 11, "log-server@2": 12}
        nodes |= {"scheduler": 31, "scheduler@2": 32, "triggerer": 21, "triggerer@2": 22}
        return f"127.0.0.{nodes.get(name, 1)}"

    def own_environment(self, name: str) -> dict[str, str]:
        node = self.address(name)
        logs = self.home.path / "nodes" / node / "logs"
        return {"CLUSTER_NODE": node, "AIRFLOW__LOGGING__BASE_LOG_FOLDER": str(logs)}

    def start(self, name: str) -> None:
        output = self.output_file(name)
        self._printed_before[name] = output.stat().st_size if output.exists() else 0
        super().start(name)

    def printed(self, name: str) -> str:
        """What a component has printed since its last start."""
        return self.output_file(name).read_bytes()[self._printed_before[name] :].decode(errors="replace")

    def check(self) -> None:
        if not self.restarts:
            super().check()
            return
        for name in self.commands:
            if not self.alive(name):
                self.start(name)

    def session(self, name: str) -> list[psutil.Process]:
        """All processes of a component; a worker's tasks are in process groups of their own."""
        leader, found = self.running[name].pid, []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def kill_session(self, name: str) -> None:
        """Have all of a component die at once, as when its machine does."""
        # Twice: one that is about to start a child must not leave it behind.
        for _ in range(2):
            for process in self.session(name):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.running.pop(name).wait(timeout=60)

    def shut_down(self, name: str) -> None:
        """Have a worker end its tasks, and wait until all of it has gone.

        On Airflow 3 by Celery's cold shutdown. That one doesn't tell Airflow 2's tasks anything, so there it is what
        systemd does: SIGTERM to each process.
        """
        if self.home.venv.version.startswith("2."):
            for process in self.session(name):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.terminate()
        else:
            self.running[name].send_signal(signal.SIGQUIT)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and (self.running[name].poll() is None or self.session(name)):
            time.sleep(0.2)
        self.kill_session(name)

    def runner(self, name: str) -> psutil.Process:
        """The process of a triggerer in which the triggers run; Airflow 3."""
        children = psutil.Process(self.running[name].pid).children()
        (runner,) = [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]
        return runner


class Cluster(RealAirflow):
    """A running cluster, 2.11 or 3.x, as a context manager.

    PostgreSQL, Redis and the S3 server are its own, so that a test may stop and start them: :attr:`postgres`,
    :attr:`redis`, :attr:`s3`.

    :param version: an Airflow version; its environment is made when missing.
    :param env: further environment variables of all components.
    """

    components: ClusterComponents

    def __init__(self, version: str = NEWEST, *, env: Mapping[str, str] | None = None) -> None:
        super().__init__(version, venv=celery_venv(version), env=env)

    def _make_home(self, folder: Path, environment: dict[str, str]) -> AirflowHome:
        self.postgres, self.redis, self.s3 = PostgresServer(survives=True), RedisServer(), S3Server()
        for server in (self.postgres, self.redis, self.s3):
            server.start()
        self.s3.create_bucket(BUCKET)
        (folder / "config").mkdir()
        (folder / "config" / "cluster_node.py").write_text(_NODE)
        home = AirflowHome(celery_venv(self.version), folder, postgres=self.postgres)
        home.extra = self._settings(home) | environment
        return home

    def _settings(self, home: AirflowHome) -> dict[str, str]:
        settings = {
            ("core", "executor"): "CeleryExecutor",
            ("core", "hostname_callable"): "cluster_node.name",
            ("core", "parallelism"): 32,
            ("celery", "broker_url"): self.redis.url,
            ("celery", "result_backend"): f"db+{self.postgres.url(home.database_name)}",
            # A busy machine needs more than the defaults, a second and five.
            ("celery", "operation_timeout"): 20,
            ("workers", "execution_api_timeout"): 60,
            ("logging", "remote_logging"): True,
            ("logging", "remote_base_log_folder"): f"s3://{BUCKET}/logs",
            ("logging", "remote_log_conn_id"): "aws_logs",
            # Airflow 2 without it parses DAG files in each scheduler.
            ("scheduler", "standalone_dag_processor"): True,
            # Only runs that a test triggers; some examples are scheduled daily.
            ("scheduler", "use_job_schedule"): False,
            # A fresh triggerer on a busy machine stands still for longer than five seconds.
            ("triggerer", "triggerer_health_check_threshold"): 12,
            ("triggerer", "runner_health_check_threshold"): 10,
        }
        variables = {f"AIRFLOW__{section}__{key}".upper(): str(value) for (section, key), value in settings.items()}
        store = json.dumps(self.s3.connection)
        stores = {f"AIRFLOW_CONN_{name}": store for name in ("AWS_LOGS", "AWS_DEFAULT")}
        return {**variables, **stores, "PYTHONPATH": str(home.path / "config")}

    def _make_components(self) -> ClusterComponents:
        return ClusterComponents(self.home)

    def close(self) -> None:
        """End all processes and servers of this cluster, and remove their folders."""
        self.components.stop()
        for server in (self.postgres, self.redis, self.s3):
            server.stop()
        shutil.rmtree(self.home.path, ignore_errors=True)

    # ---- components ----

    def wait_healthy(self, timeout: float = _PATIENCE) -> None:
        super().wait_healthy(timeout)
        self.until(lambda: all(map(self.is_ready, self.components.running)), timeout, "components ready")

    def is_ready(self, name: str) -> bool:
        """Whether a component, since its last start, has told that it is at work."""
        if name in WORKERS:
            return " ready." in self.components.printed(name)
        if (kind := _JOB_TYPES.get(name.partition("@")[0])) is None:
            return True
        process = psutil.Process(self.components.running[name].pid)
        return bool(
            self.home.query(
                f"select id from job where {self._is_job(name, kind)} and extract(epoch from start_date) "
                f">= {process.create_time() - 1}"
            )
        )

    def _is_job(self, name: str, kind: str) -> str:
        return f"job_type = '{kind}' and state = 'running' and hostname = '{self.components.address(name)}'"

    def triggerer_id(self, name: str) -> int:
        """The id of a triggerer's newest job, by which its triggers name it."""
        kind = _JOB_TYPES["triggerer"]
        rows = self.home.query(f"select max(id) from job where {self._is_job(name, kind)}")
        return int(rows[0][0])

    def owners(self) -> Counter[int | None]:
        """How many triggers each triggerer has, by the id of its job."""
        return Counter(row[0] for row in self.home.query("select triggerer_id from trigger"))

    @contextlib.contextmanager
    def service_manager(self) -> Iterator[None]:
        """Start again what has ended by itself, whenever somebody waits for something, until all are well."""
        self.components.restarts = True
        try:
            yield
            self.wait_healthy()
        finally:
            self.components.restarts = False

    def until(self, condition: Any, timeout: float, what: str, interval: float = 0.25) -> Any:
        """As elsewhere; while a service manager is at work, no answer is no error."""

        def answered() -> Any:
            try:
                return condition()
            except (requests.RequestException, psycopg2.OperationalError):
                if not self.components.restarts:
                    raise
                return None

        return super().until(answered, timeout, what, interval)

    # ---- logs ----

    def stored_log(
        self, dag_id: str, run_id: str, task_id: str, try_number: int = 1, map_index: int = -1
    ) -> dict[str, list[str]]:
        """The parts of a try's log that are in S3, as lines: the worker's, and one of each triggerer."""
        mapped = [] if map_index < 0 else [f"map_index={map_index}"]
        path = [f"dag_id={dag_id}", f"run_id={run_id}", f"task_id={task_id}", *mapped, f"attempt={try_number}.log"]
        parts = self.s3.read(BUCKET, "/".join(["logs", *path]))
        return {key: [_event(line) for line in text.decode().splitlines()] for key, text in parts.items()}


def _event(line: str) -> str:
    """A line's text; Airflow 3 writes JSON."""
    try:
        return str(json.loads(line)["event"])
    except (ValueError, KeyError, TypeError):
        return line
