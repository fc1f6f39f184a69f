"""Airflow's components as processes that a test starts, kills and starts again by name."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from harness.home import AirflowHome
from harness.ports import free_port

COMMANDS_3 = {
    "api-server": ["api-server"],
    "scheduler": ["scheduler"],
    "dag-processor": ["dag-processor"],
    "triggerer": ["triggerer"],
}
# On SQLite, Airflow 2's scheduler parses DAG files itself.
COMMANDS_2 = {"api-server": ["webserver"], "scheduler": ["scheduler"], "triggerer": ["triggerer"]}


@dataclass
class Components:
    """The running processes of one instance, each in a process group of its own."""

    home: AirflowHome
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    sessions: set[int] = field(default_factory=set)

    @property
    def commands(self) -> dict[str, list[str]]:
        return COMMANDS_2 if self.home.venv.version.startswith("2.") else COMMANDS_3

    def output_file(self, name: str) -> Path:
        return self.home.path / f"{name}.out"

    def start(self, name: str) -> None:
        """Start a component; its output goes to ``<AIRFLOW_HOME>/<name>.out``.

        :param name: "triggerer@2" is a second triggerer
        """
        if self.alive(name):
            raise RuntimeError(f"{name} runs already")
        with self.output_file(name).open("ab") as output:
            self.running[name] = subprocess.Popen(
                self.command(name),
                env=self.home.environment() | self.own_environment(name),
                cwd=self.home.path,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.sessions.add(self.running[name].pid)

    def command(self, name: str) -> list[str]:
        """What starts a component."""
        return [str(self.home.venv.bin / "airflow"), *self.commands[name.partition("@")[0]]]

    def own_environment(self, name: str) -> dict[str, str]:
        """Variables of one component, on top of those of all."""
        # Each triggerer serves the logs that it writes.
        return {"AIRFLOW__LOGGING__TRIGGER_LOG_SERVER_PORT": str(free_port())} if "@" in name else {}

    def alive(self, name: str) -> bool:
        return name in self.running and self.running[name].poll() is None

    def all_alive(self) -> bool:
        """Whether every component of this version runs."""
        return all(self.alive(name) for name in self.commands)

    def kill(self, name: str, signal_number: int = signal.SIGKILL, *, whole: bool = True) -> None:
        """Send a signal to a component and wait until it has gone.

        :param whole: to its whole process group, as when the machine dies; else to its main process only
        """
        process = self.running[name]
        if whole:
            os.killpg(process.pid, signal_number)
        else:
            process.send_signal(signal_number)
        process.wait(timeout=60)
        del self.running[name]

    def freeze(self, name: str) -> None:
        """Have a component stand still, as a machine that is paused; not while it holds a lock that others wait for."""
        for _ in range(50):
            os.killpg(self.running[name].pid, signal.SIGSTOP)
            if not self.home.is_locked():
                return
            self.thaw(name)
            time.sleep(0.2)
        raise RuntimeError(f"{name} holds the database's lock each time it is looked at")

    def thaw(self, name: str) -> None:
        os.killpg(self.running[name].pid, signal.SIGCONT)

    def check(self) -> None:
        """Raise with the end of its output if a component has died by itself."""
        for name, process in list(self.running.items()):
            if process.poll() is not None:
                tail = self.output_file(name).read_text(errors="replace")[-3000:]
                raise RuntimeError(
                    f"{name} of Airflow {self.home.venv.version} ended with {process.returncode}:\n{tail}"
                )

    def processes(self) -> list[psutil.Process]:
        """All living processes of this instance, those of tasks included."""
        return [process for process in psutil.process_iter() if self._is_mine(process)]

    def _is_mine(self, process: psutil.Process) -> bool:
        # Airflow's own processes overwrite their environment with a title but stay in their component's session;
        # what a task has started may have left the session but still has the environment.
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            if os.getsid(process.pid) in self.sessions:
                return True
            return process.environ().get("AIRFLOW_HOME") == str(self.home.path)
        except (OSError, psutil.Error):
            return False

    def stop(self) -> None:
        """End everything: politely for three seconds, then not."""
        for process in self.running.values():
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + 3
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.1)
        # Twice, since a dying parent may have just started a child.
        for _ in range(2):
            for process in self.processes():
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue
        for started in self.running.values():
            started.wait(timeout=30)
        self.running.clear()
