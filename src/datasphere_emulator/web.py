"""The HTTP side of the emulator: pages of projects and jobs, presigned URLs, the control API, the metadata service."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from aiohttp import web

from datasphere_emulator import logs, pages
from datasphere_emulator.errors import Refused
from datasphere_emulator.http_calls import HttpRefusal, apply_faults, fault_refusal, journalled
from datasphere_emulator.storage_http import StorageHandlers
from datasphere_emulator.web_control import ControlHandlers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from yandex.cloud.datasphere.v2.jobs import jobs_pb2

    from datasphere_emulator.core import Core
    from datasphere_emulator.faults import Faults
    from datasphere_emulator.iam import Iam
    from datasphere_emulator.journal import Journal
    from datasphere_emulator.logs import JobLog, Piece
    from datasphere_emulator.records import JobRecord, Project

TOKEN_PATH = "/computeMetadata/v1/instance/service-accounts/default/token"
#: A job's page shows this many bytes of each log's end.
LOG_TAIL = 64 * 1024

_PROJECT = "/communities/{community}/projects/{project}"
_JOB = _PROJECT + "/job/{job}"
#: The logs a page shows first.
_LOG_ORDER = (logs.STDOUT, logs.STDERR, logs.SYSTEM)


def build_app(emulator: Core) -> web.Application:
    """Everything the emulator serves over HTTP, except the metadata service. Runs on the loop of its gRPC server."""
    # Contents of files come in the bodies of the control API.
    app = web.Application(client_max_size=1 << 30)
    StorageHandlers(emulator.storage).add_routes(app)
    ControlHandlers(emulator).add_routes(app)
    PageHandlers(emulator).add_routes(app)
    return app


class PageHandlers:
    """The pages, at the same paths as those of DataSphere's own interface."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def add_routes(self, app: web.Application) -> None:
        """Add them all."""
        app.router.add_get("/", self._home)
        app.router.add_get("/projects", self._projects)
        app.router.add_get(_PROJECT, self._project)
        app.router.add_get(_JOB, self._job)
        app.router.add_get(_JOB + "/log/{name:.+}", self._log)

    def _find_project(self, request: web.Request) -> Project:
        project = self._core.projects.get(request.match_info["project"])
        if project is None or project.community_id != request.match_info["community"]:
            raise _not_found(f"There is no project {request.match_info['project']} in this community.")
        return project

    def _find_job(self, request: web.Request) -> tuple[Project, JobRecord]:
        project = self._find_project(request)
        try:
            record = self._core.registry.find(request.match_info["job"])
        except Refused as refused:
            raise _not_found(refused.message) from None
        if record.job.project_id != project.id:
            raise _not_found(f"Project {project.id} has no job {record.id}.")
        return project, record

    async def _home(self, request: web.Request) -> web.Response:
        raise web.HTTPFound("/projects")

    async def _projects(self, request: web.Request) -> web.Response:
        counts = dict.fromkeys(self._core.projects, 0)
        for record in self._core.registry:
            counts[record.job.project_id] += 1
        listed = [(project, counts[project.id]) for project in self._core.projects.values()]
        return _html(pages.projects_page(listed))

    async def _project(self, request: web.Request) -> web.Response:
        project = self._find_project(request)
        jobs = [record.job for record in self._core.registry if record.job.project_id == project.id]
        return _html(pages.project_page(project, reversed(jobs)))

    async def _job(self, request: web.Request) -> web.Response:
        project, record = self._find_job(request)

        def link(file: jobs_pb2.File) -> str | None:
            if record.job.data_cleared or not self._core.storage.has(project.id, file.sha256):
                return None
            return self._core.storage.get_url(project.id, file.sha256, file.desc.path.rpartition("/")[2])

        views = log_views(self._core.registry.log(record.id))
        return _html(pages.job_page(project, record.job, views, link, record.progress))

    async def _log(self, request: web.Request) -> web.StreamResponse:
        _, record = self._find_job(request)
        name = request.match_info["name"]
        log = self._core.registry.log(record.id)
        pieces = [piece for piece in log.pieces() if piece.source == name]
        if not pieces:
            raise _not_found(f"Job {record.id} has no log {name}.")
        response = web.StreamResponse(headers={"Content-Type": "text/plain; charset=utf-8"})
        await response.prepare(request)
        for piece in pieces:
            for chunk in _chunks(log, piece):
                await response.write(chunk)
        await response.write_eof()
        return response


def _html(text: str) -> web.Response:
    return web.Response(text=text, content_type="text/html", headers={"Cache-Control": "no-store"})


def _not_found(message: str) -> web.HTTPNotFound:
    return web.HTTPNotFound(text=pages.message_page("Not found", message), content_type="text/html")


def _chunks(log: JobLog, piece: Piece) -> Iterator[bytes]:
    for start in range(0, piece.size, LOG_TAIL):
        yield log.content(piece, start, start + LOG_TAIL)


def log_views(log: JobLog, tail: int = LOG_TAIL) -> list[pages.LogView]:
    """The end of each log of a job. :param tail: bytes of each."""
    by_source: dict[str, list[Piece]] = {}
    for piece in log.pieces():
        by_source.setdefault(piece.source, []).append(piece)
    first = [source for source in _LOG_ORDER if source in by_source]
    views = []
    for source in [*first, *sorted(set(by_source) - set(first))]:
        size = sum(piece.size for piece in by_source[source])
        content = b""
        for piece in reversed(by_source[source]):
            wanted = tail - len(content)
            if wanted <= 0:
                break
            content = log.content(piece, max(0, piece.size - wanted)) + content
        views.append(pages.LogView(source, content.decode("utf-8", "replace"), size, size - len(content)))
    return views


def build_metadata_app(iam: Iam, journal: Journal, faults: Faults) -> web.Application:
    """The part of a virtual machine's metadata service that gives tokens of the default service account."""

    async def token(request: web.Request) -> web.Response:
        try:
            async with journalled(journal, "metadata.token", request) as call:
                call.subject = iam.default_service_account_id
                fault = await apply_faults(faults, call, request)
                refusal = fault_refusal(fault)
                if refusal is not None and not (fault and fault.lost_answer):
                    raise refusal
                if request.headers.get("Metadata-Flavor") != "Google":
                    raise HttpRefusal(403, "Forbidden", "The header Metadata-Flavor: Google is required.")
                value = iam.issue_token(iam.default_service_account_id)
                call.effect = True
                if refusal is not None:
                    raise refusal
                expires_in = math.floor(iam.expires_at(value) - time.time())
                return web.json_response({"access_token": value, "expires_in": expires_in, "token_type": "Bearer"})
        except HttpRefusal as error:
            return web.Response(status=error.status, text=error.message)
        except ConnectionError:
            return web.Response()  # the client is gone, nobody reads this

    app = web.Application()
    app.router.add_get(TOKEN_PATH, token)
    return app
