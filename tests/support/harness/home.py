"""An AIRFLOW_HOME: quick settings for every version, and a migrated database without waiting for the migration."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.ports import free_port
from harness.postgres import PostgresServer
from harness.venvs import CACHE, AirflowVenv, locked

_SECRET = "dGVzdHMtb25seS10ZXN0cy1vbmx5LXRlc3RzLW9ubHk="
"""Fernet key and signing secret of the test instances: 32 bytes in base64, worth nothing elsewhere."""


@dataclass
class AirflowHome:
    """Settings and files of one instance.

    :param venv: the environment it runs in
    :param path: AIRFLOW_HOME
    :param extra: further environment variables; they win over the settings here
    :param postgres: where its database is; default: a SQLite file
    """

    venv: AirflowVenv
    path: Path
    extra: Mapping[str, str] = field(default_factory=dict)
    postgres: PostgresServer | None = None
    database_name: str = field(default_factory=lambda: f"airflow_{uuid.uuid4().hex[:12]}")
    port: int = field(default_factory=free_port)
    log_port: int = field(default_factory=free_port)
    trigger_log_port: int = field(default_factory=free_port)

    @property
    def dags(self) -> Path:
        return self.path / "dags"

    @property
    def database(self) -> Path:
        """The SQLite file."""
        return self.path / "airflow.db"

    @property
    def database_url(self) -> str:
        """The database as SQLAlchemy wants it."""
        return self.postgres.url(self.database_name) if self.postgres else f"sqlite:///{self.database}?timeout=30"

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """Rows of a query in Airflow's database."""
        if self.postgres:
            return self.postgres.query(self.database_name, sql)
        with contextlib.closing(sqlite3.connect(f"file:{self.database}?mode=ro", uri=True, timeout=60)) as database:
            return list(database.execute(sql))

    def is_locked(self) -> bool:
        """Whether a process that stands still is in the middle of a transaction."""
        if self.postgres:
            time.sleep(0.5)
            return bool(
                self.query(
                    "select pid from pg_stat_activity where datname = current_database() "
                    "and state like 'idle in transaction%' and clock_timestamp() - state_change > interval '0.4 s'"
                )
            )
        try:
            with contextlib.closing(sqlite3.connect(self.database, timeout=3)) as database:
                database.execute("begin immediate")
                database.rollback()
        except sqlite3.OperationalError:
            return True
        return False

    def environment(self) -> dict[str, str]:
        """The whole environment of a process of this instance; nothing of the caller's Airflow gets in."""
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("AIRFLOW", "_AIRFLOW", "PYTEST", "PYTHONPATH", "VIRTUAL_ENV"))
        }
        inherited["PATH"] = f"{self.venv.bin}{os.pathsep}{inherited.get('PATH', '')}"
        return inherited | self._settings() | dict(self.extra)

    def _settings(self) -> dict[str, str]:
        common = {
            ("core", "dags_folder"): self.dags,
            ("core", "executor"): "LocalExecutor",
            ("core", "load_examples"): False,
            ("core", "dags_are_paused_at_creation"): False,
            ("core", "parallelism"): 8,
            ("core", "max_active_tasks_per_dag"): 64,
            ("core", "max_active_runs_per_dag"): 64,
            ("core", "min_serialized_dag_update_interval"): 0,
            ("core", "min_serialized_dag_fetch_interval"): 0,
            ("core", "fernet_key"): _SECRET,
            ("core", "test_connection"): "Enabled",
            ("database", "sql_alchemy_conn"): self.database_url,
            ("logging", "base_log_folder"): self.path / "logs",
            ("logging", "worker_log_server_port"): self.log_port,
            ("logging", "trigger_log_server_port"): self.trigger_log_port,
            ("scheduler", "job_heartbeat_sec"): 1,
            ("scheduler", "scheduler_heartbeat_sec"): 1,
            ("scheduler", "scheduler_idle_sleep_time"): 0.2,
            ("scheduler", "trigger_timeout_check_interval"): 1,
            ("scheduler", "orphaned_tasks_check_interval"): 10,
            ("scheduler", "use_job_schedule"): True,
            ("scheduler", "enable_health_check"): False,
            ("scheduler", "parsing_processes"): 1,
            ("triggerer", "job_heartbeat_sec"): 1,
            # A triggerer counts as dead after this long; its triggers then move to the next one.
            ("triggerer", "triggerer_health_check_threshold"): 5,
            ("usage_data_collection", "enabled"): False,
        }
        settings = common | (self._settings_2() if self.venv.version.startswith("2.") else self._settings_3())
        environment = {f"AIRFLOW__{section}__{key}".upper(): str(value) for (section, key), value in settings.items()}
        return environment | {
            "AIRFLOW_HOME": str(self.path),
            # Airflow 2 forbids parallel tasks on SQLite unless its own tests ask for them; so do ours.
            "_AIRFLOW__SKIP_DATABASE_EXECUTOR_COMPATIBILITY_CHECK": "1",
            "SCARF_ANALYTICS": "false",
            "PYTHONUNBUFFERED": "1",
            "NO_COLOR": "1",
        }

    def _settings_3(self) -> dict[tuple[str, str], object]:
        return {
            ("api", "host"): "127.0.0.1",
            ("api", "port"): self.port,
            ("api", "base_url"): f"http://127.0.0.1:{self.port}",
            ("api", "workers"): 1,
            ("api", "secret_key"): _SECRET,
            ("api_auth", "jwt_secret"): _SECRET,
            ("core", "execution_api_server_url"): f"http://127.0.0.1:{self.port}/execution/",
            ("core", "simple_auth_manager_all_admins"): True,
            ("dag_processor", "refresh_interval"): 1,
            ("dag_processor", "bundle_refresh_check_interval"): 1,
            # New and changed files are parsed at once; parsing all others again and again would only heat the machine.
            ("dag_processor", "min_file_process_interval"): 600,
            ("dag_processor", "parsing_processes"): 1,
            ("scheduler", "task_instance_heartbeat_timeout"): 30,
            ("scheduler", "task_instance_heartbeat_timeout_detection_interval"): 2,
            ("workers", "min_heartbeat_interval"): 1,
        }

    def _settings_2(self) -> dict[tuple[str, str], object]:
        return {
            ("api", "auth_backends"): "airflow.api.auth.backend.default",
            ("api", "enable_xcom_deserialize_support"): True,
            ("scheduler", "dag_dir_list_interval"): 1,
            ("scheduler", "min_file_process_interval"): 600,
            ("scheduler", "file_parsing_sort_mode"): "modified_time",
            # 0: the limit is the zombie threshold; the pace is job_heartbeat_sec. Any other number is both.
            ("scheduler", "local_task_job_heartbeat_sec"): 0,
            # A task that ends and the scheduler would both number the next task's try; SQLite has no locks on rows.
            ("scheduler", "schedule_after_task_execution"): False,
            ("scheduler", "scheduler_zombie_task_threshold"): 30,
            ("scheduler", "zombie_detection_interval"): 2,
            ("webserver", "web_server_host"): "127.0.0.1",
            ("webserver", "web_server_port"): self.port,
            ("webserver", "base_url"): f"http://127.0.0.1:{self.port}",
            ("webserver", "workers"): 1,
            ("webserver", "expose_config"): True,
            ("webserver", "secret_key"): _SECRET,
        }

    def prepare(self) -> AirflowHome:
        """Make the folders and the database; the migration (some 10 s) is done once per environment and copied."""
        self.dags.mkdir(parents=True, exist_ok=True)
        # Airflow 2's API: whoever asks is an administrator. On the loopback interface, for a test.
        (self.path / "webserver_config.py").write_text("WTF_CSRF_ENABLED = False\nAUTH_ROLE_PUBLIC = 'Admin'\n")
        if self.postgres:
            self._prepare_postgres(self.postgres)
        else:
            self._prepare_sqlite()
        return self

    def remove_database(self) -> None:
        """Remove what is not in the folder."""
        if self.postgres:
            self.postgres.drop_database(self.database_name)

    def _prepare_postgres(self, server: PostgresServer) -> None:
        dump = CACHE / f"airflow-{self.venv.version}.sql"
        with locked(CACHE / f".{dump.name}.lock"):
            if not dump.exists():
                server.create_database(self.database_name)
                self._migrate()
                draft = dump.with_suffix(".draft")
                server.dump(self.database_name, draft)
                draft.replace(dump)
                return
        server.create_database(self.database_name, dump)

    def _prepare_sqlite(self) -> None:
        template = CACHE / f"airflow-{self.venv.version}.db"
        with locked(CACHE / f".{template.name}.lock"):
            if not template.exists():
                self._migrate()
                with contextlib.closing(sqlite3.connect(self.database)) as connection:
                    # Readers and the one writer no longer block each other; a dozen processes share this file.
                    connection.execute("PRAGMA journal_mode=WAL")
                draft = template.with_suffix(".draft")
                shutil.copy(self.database, draft)
                draft.replace(template)
        if not self.database.exists():
            shutil.copy(template, self.database)

    def _migrate(self) -> None:
        command = [str(self.venv.bin / "airflow"), "db", "migrate"]
        done = subprocess.run(command, env=self.environment(), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"airflow db migrate of {self.venv.version} failed:\n{done.stdout}{done.stderr}")
