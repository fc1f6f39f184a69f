"""Airflow's public REST API, v1 (Airflow 2) and v2 (Airflow 3), behind the same few methods."""

from __future__ import annotations

import json
import time
from typing import Any
from urllib.parse import quote

import requests

Json = Any


class ApiError(Exception):
    """The API answered with an error; ``status`` is the HTTP status, the message holds the answer."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"{status}: {text[:2000]}")
        self.status = status


class Api:
    """Airflow 3's REST API v2, as an administrator (SimpleAuthManager that lets everybody in)."""

    prefix = "/api/v2"
    health_path = "/monitor/health"

    def __init__(self, base: str) -> None:
        self.base = base
        self.session = requests.Session()
        # A proxy of the environment has no business on the loopback interface.
        self.session.trust_env = False

    def call(self, method: str, path: str, **options: Any) -> requests.Response:
        """One request below the prefix; expired logins are renewed, errors raised.

        :raises ApiError: an answer of 400 or above
        """
        for attempt in range(20):
            response = self.session.request(method, f"{self.base}{self.prefix}{path}", timeout=120, **options)
            if response.status_code == 401 and not attempt:
                self.log_in()
            elif response.status_code == 500:
                # A dozen processes write to one SQLite file; who has waited too long for it is refused, without effect.
                time.sleep(0.5)
            else:
                break
        if response.status_code >= 400:
            raise ApiError(response.status_code, response.text)
        return response

    def get(self, path: str, **query: Any) -> Json:
        return self.call("GET", path, params=query).json()

    def log_in(self) -> None:
        answer = self.session.get(f"{self.base}/auth/token", timeout=60)
        if answer.status_code == 405:  # Airflow 3.0 hands out tokens to POST only
            answer = self.session.post(f"{self.base}/auth/token", json={}, timeout=60)
        answer.raise_for_status()
        self.session.headers["Authorization"] = f"Bearer {answer.json()['access_token']}"

    def health(self) -> dict[str, str | None]:
        """State per component, "healthy" if well; empty while the server does not answer yet."""
        try:
            answer = self.get(self.health_path)
        except (requests.ConnectionError, requests.HTTPError, ApiError):
            return {}
        return {name: (part or {}).get("status") for name, part in answer.items()}

    def task_path(self, dag_id: str, run_id: str, task_id: str, map_index: int = -1) -> str:
        path = f"/dags/{quote(dag_id)}/dagRuns/{quote(run_id)}/taskInstances/{quote(task_id)}"
        return path if map_index < 0 else f"{path}/{map_index}"

    def trigger(self, dag_id: str, run_id: str, conf: dict[str, Json]) -> None:
        body = {"dag_run_id": run_id, "conf": conf, "logical_date": None}
        self.call("POST", f"/dags/{quote(dag_id)}/dagRuns", json=body)

    def task_instances(self, dag_id: str, run_id: str) -> list[dict[str, Json]]:
        path = f"/dags/{quote(dag_id)}/dagRuns/{quote(run_id)}/taskInstances"
        found: list[dict[str, Json]] = []
        while True:
            page = self.get(path, limit=100, offset=len(found))
            found += page["task_instances"]
            if len(found) >= page["total_entries"]:
                return found

    def set_state(self, dag_id: str, run_id: str, task_id: str, state: str, map_index: int = -1) -> None:
        self.call("PATCH", self.task_path(dag_id, run_id, task_id, map_index), json={"new_state": state})

    def clear(self, dag_id: str, run_id: str, tasks: list[Json]) -> None:
        body = {
            "dry_run": False,
            "dag_run_id": run_id,
            "task_ids": tasks,
            "only_failed": False,
            "reset_dag_runs": True,
        }
        self.call("POST", f"/dags/{quote(dag_id)}/clearTaskInstances", json=body)

    def log(self, dag_id: str, run_id: str, task_id: str, try_number: int, map_index: int) -> str:
        path = f"{self.task_path(dag_id, run_id, task_id)}/logs/{try_number}"
        headers = {"Accept": "application/json"}
        query = {"map_index": map_index, "full_content": True}
        content = self.call("GET", path, params=query, headers=headers).json()["content"]
        return "\n".join(_line(entry) for entry in content)

    def xcom(self, dag_id: str, run_id: str, task_id: str, key: str, map_index: int) -> Json:
        path = f"{self.task_path(dag_id, run_id, task_id)}/xcomEntries/{quote(key)}"
        return self.get(path, map_index=map_index, stringify=False, deserialize=False)["value"]

    def put_connection(self, conn_id: str, connection: dict[str, Json]) -> None:
        body = {"connection_id": conn_id, **connection}
        if isinstance(body.get("extra"), dict):
            body["extra"] = json.dumps(body["extra"])
        try:
            self.call("POST", "/connections", json=body)
        except ApiError as error:
            if error.status != 409:
                raise
            self.call("PATCH", f"/connections/{quote(conn_id)}", json=body)

    def put_variable(self, key: str, value: str) -> None:
        body = {"key": key, "value": value}
        try:
            self.call("PATCH", f"/variables/{quote(key)}", json=body)
        except ApiError as error:
            if error.status != 404:
                raise
            self.call("POST", "/variables", json=body)


class Api2(Api):
    """Airflow 2's REST API v1 with public access as an administrator."""

    prefix = "/api/v1"
    health_path = "/health"

    def log_in(self) -> None:
        raise ApiError(401, "Airflow 2's API did not let us in")

    def trigger(self, dag_id: str, run_id: str, conf: dict[str, Json]) -> None:
        # Airflow 2 keeps one run per logical date; a clock that stands still would make two runs collide.
        time.sleep(0.001)
        self.call("POST", f"/dags/{quote(dag_id)}/dagRuns", json={"dag_run_id": run_id, "conf": conf})

    def set_state(self, dag_id: str, run_id: str, task_id: str, state: str, map_index: int = -1) -> None:
        body = {"dry_run": False, "new_state": state}
        self.call("PATCH", self.task_path(dag_id, run_id, task_id, map_index), json=body)

    def clear(self, dag_id: str, run_id: str, tasks: list[Json]) -> None:
        # Through the page, as a person does: v1's clearTaskInstances forgets to tell a running task that it is cleared.
        run = self.get(f"/dags/{quote(dag_id)}/dagRuns/{quote(run_id)}")
        for task in tasks:
            task_id, *map_index = [task] if isinstance(task, str) else task
            form = {"dag_id": dag_id, "task_id": task_id, "execution_date": run["logical_date"], "confirmed": "true"}
            if map_index:
                form["map_index"] = map_index[0]
            headers = {"Accept": "application/json"}
            answer = self.session.post(f"{self.base}/clear", data=form, headers=headers, timeout=120)
            if answer.status_code >= 400:
                raise ApiError(answer.status_code, answer.text)

    def log(self, dag_id: str, run_id: str, task_id: str, try_number: int, map_index: int) -> str:
        path = f"{self.task_path(dag_id, run_id, task_id)}/logs/{try_number}"
        query = {"map_index": map_index, "full_content": "true"}
        return self.call("GET", path, params=query, headers={"Accept": "text/plain"}).text

    def xcom(self, dag_id: str, run_id: str, task_id: str, key: str, map_index: int) -> Json:
        path = f"{self.task_path(dag_id, run_id, task_id)}/xcomEntries/{quote(key)}"
        return self.get(path, map_index=map_index, stringify="false", deserialize="true")["value"]


def _line(entry: Json) -> str:
    """A structured log record as a person reads it: the message, then an exception if there is one."""
    if isinstance(entry, str):
        return entry
    text = str(entry.get("event", ""))
    for error in entry.get("error_detail") or ():
        text += f"\n{error.get('exc_type')}: {error.get('exc_value')}"
    return text
