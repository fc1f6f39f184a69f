"""The HTTP side of the emulator: pages of projects and jobs, presigned URLs, the control API, the metadata service."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from aiohttp import web

from datasphere_emulator import logs, pages
from datasphere_emulator.control_api import ControlHandlers
from datasphere_emulator.errors import StatusError
from datasphere_emulator.http_calls import HttpError, apply_faults, fault_error, journalled
from datasphere_emulator.storage_api import StorageHandlers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from yandex.cloud.datasphere.v2.jobs import jobs_pb2

    from datasphere_emulator.access import Access
    from datasphere_emulator.faults import Faults
    from datasphere_emulator.iam import Iam
    from datasphere_emulator.journal import Journal
    from datasphere_emulator.logs import JobLog, Piece
    from datasphere_emulator.records import JobRecord, Project
    from datasphere_emulator.state import EmulatorState

TOKEN_PATH = "/computeMetadata/v1/instance/service-accounts/default/token"
#: Size of the tail of each log that a job's page shows, bytes.
LOG_TAIL = 64 * 1024

_PROJECT = "/communities/{community}/projects/{project}"
_JOB = _PROJECT + "/job/{job}"
#: Logs that a page shows first.
_LOG_ORDER = (logs.STDOUT, logs.STDERR, logs.SYSTEM)


def build_app(state: EmulatorState, access: Access) -> web.Application:
    """Build the HTTP application: files, control API and pages. Runs in the event loop of the gRPC server."""
    # Contents of files come in the bodies of the control API.
    app = web.Application(client_max_size=1 << 30, middlewares=[access.middleware])
    StorageHandlers(state.storage).add_routes(app)
    ControlHandlers(state, access).add_routes(app)
    PageHandlers(state).add_routes(app)
    return app


class PageHandlers:
    """Web pages at the same paths as in DataSphere's UI."""

    def __init__(self, state: EmulatorState) -> None:
        self._state = state

    def add_routes(self, app: web.Application) -> None:
        """Add all routes to the application."""
        app.router.add_get("/", self._home)
        app.router.add_get("/projects", self._projects)
        app.router.add_get(_PROJECT, self._project)
        app.router.add_get(_JOB, self._job)
        app.router.add_get(_JOB + "/log/{name:.+}", self._log)

    def _find_project(self, request: web.Request) -> Project:
        project = self._state.projects.get(request.match_info["project"])
        if project is None or project.community_id != request.match_info["community"]:
            raise _not_found(f"Project {request.match_info['project']} was not found in this community.")
        return project

    def _find_job(self, request: web.Request) -> tuple[Project, JobRecord]:
        project = self._find_project(request)
        try:
            record = self._state.registry.find(request.match_info["job"])
        except StatusError as error:
            raise _not_found(error.message) from None
        if record.job.project_id != project.id:
            raise _not_found(f"Job {record.id} was not found in project {project.id}.")
        return project, record

    async def _home(self, request: web.Request) -> web.Response:
        raise web.HTTPFound("/projects")

    async def _projects(self, request: web.Request) -> web.Response:
        counts = dict.fromkeys(self._state.projects, 0)
        for record in self._state.registry:
            counts[record.job.project_id] += 1
        listed = [(project, counts[project.id]) for project in self._state.projects.values()]
        return _html(pages.projects_page(listed))

    async def _project(self, request: web.Request) -> web.Response:
        project = self._find_project(request)
        jobs = [record.job for record in self._state.registry if record.job.project_id == project.id]
        return _html(pages.project_page(project, reversed(jobs)))

    async def _job(self, request: web.Request) -> web.Response:
        project, record = self._find_job(request)

        def link(file: jobs_pb2.File) -> str | None:
            if record.job.data_cleared or not self._state.storage.has(project.id, file.sha256):
                return None
            return self._state.storage.get_url(project.id, file.sha256, file.desc.path.rpartition("/")[2])

        views = log_views(self._state.registry.log(record.id))
        return _html(pages.job_page(project, record.job, views, link, record.progress))

    async def _log(self, request: web.Request) -> web.StreamResponse:
        _, record = self._find_job(request)
        name = request.match_info["name"]
        log = self._state.registry.log(record.id)
        pieces = [piece for piece in log.pieces() if piece.source == name]
        if not pieces:
            raise _not_found(f"Log {name} of job {record.id} was not found.")
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
    """Return the tail of each log of a job. :param tail: size of a tail, bytes."""
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


def build_metadata_app(iam: Iam, journal: Journal, faults: Faults, access: Access) -> web.Application:
    """Build the metadata service of a virtual machine: tokens of the default service account."""

    async def token(request: web.Request) -> web.Response:
        try:
            async with journalled(journal, "metadata.token", request) as call:
                call.subject = iam.default_service_account_id
                fault = await apply_faults(faults, call, request)
                injected = fault_error(fault)
                if injected is not None and not (fault and fault.lost_answer):
                    raise injected
                if request.headers.get("Metadata-Flavor") != "Google":
                    raise HttpError(403, "Forbidden", "The header Metadata-Flavor: Google is required.")
                if not access.may_have_token(request):
                    raise HttpError(403, "Forbidden", "Only programs of the emulator's user may get its token.")
                value = iam.issue_token(iam.default_service_account_id)
                call.effect = True
                if injected is not None:
                    raise injected
                expires_in = math.floor(iam.expires_at(value) - time.time())
                return web.json_response({"access_token": value, "expires_in": expires_in, "token_type": "Bearer"})
        except HttpError as error:
            return web.Response(status=error.status, text=error.message)
        except ConnectionError:
            return web.Response()  # the client has disconnected

    app = web.Application(middlewares=[access.middleware])
    app.router.add_get(TOKEN_PATH, token)
    return app
