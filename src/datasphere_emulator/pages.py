"""HTML of the emulator's web pages, without scripts. Pure functions."""

from __future__ import annotations

import dataclasses
import datetime
from html import escape
from typing import TYPE_CHECKING
from urllib.parse import quote

from yandex.cloud.datasphere.v2.jobs import jobs_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from google.protobuf.timestamp_pb2 import Timestamp

    from datasphere_emulator.records import Project

#: Reload interval of pages with running jobs, seconds.
REFRESH_SECONDS = 2

_ENDED = frozenset((jobs_pb2.JobStatus.SUCCESS, jobs_pb2.JobStatus.ERROR, jobs_pb2.JobStatus.CANCELLED))

_STYLE = """
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 18%, transparent); }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem 1.5rem 4rem; }
nav, .quiet { color: color-mix(in srgb, currentColor 60%, transparent); }
h1 { font-size: 1.5rem; margin: .5rem 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
a { color: light-dark(#0b57d0, #8ab4f8); }
code, pre { font: 13px/1.45 ui-monospace, monospace; }
pre { border: 1px solid var(--line); border-radius: 6px; padding: .75rem; max-height: 28rem; overflow: auto;
  white-space: pre-wrap; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .35rem .75rem .35rem 0; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere; }
th { font-weight: 600; white-space: nowrap; }
tbody th { width: 9rem; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.status { display: inline-block; padding: 0 .6em; border-radius: 1em; font-weight: 600; font-size: .85em;
  color: #fff; background: #1a66c9; white-space: nowrap; }
.SUCCESS { background: #18794e; }
.ERROR { background: #c62a2f; }
.CANCELLED, .CANCELLING { background: #6b6b6b; }
"""


@dataclasses.dataclass
class LogView:
    """The tail of a log on a job's page.

    :param name: ``stdout``, ``stderr`` or the path of a log file.
    :param text: the tail.
    :param size: size of the whole log, bytes.
    :param left_out: size of the beginning that isn't shown, bytes.
    """

    name: str
    text: str
    size: int
    left_out: int = 0


def project_path(project: Project) -> str:
    """Return the path of a project's page, as in DataSphere's UI."""
    return f"/communities/{quote(project.community_id)}/projects/{quote(project.id)}"


def job_path(project: Project, job_id: str) -> str:
    """Return the path of a job's page, as in DataSphere's UI (with a singular ``job``)."""
    return f"{project_path(project)}/job/{quote(job_id)}"


def status_name(status: int) -> str:
    """Return the name of a status, or its number if it has no name."""
    try:
        return str(jobs_pb2.JobStatus.Name(status))
    except ValueError:
        return str(status)


def _page(title: str, body: str, trail: Iterable[tuple[str, str]] = (), *, refresh: bool = False) -> str:
    # Pages name the emulator, so that nobody takes them for the real service's.
    links = "<strong>DataSphere emulator</strong>" + "".join(
        f' / <a href="{escape(path)}">{escape(text)}</a>' for path, text in trail
    )
    meta = f'<meta http-equiv="refresh" content="{REFRESH_SECONDS}">' if refresh else ""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{meta}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} · DataSphere emulator</title><style>{_STYLE}</style></head>"
        f"<body><nav>{links}</nav><h1>{escape(title)}</h1>{body}</body></html>"
    )


def _status(status: int) -> str:
    name = escape(status_name(status))
    return f'<span class="status {name}">{name}</span>'


def _time(timestamp: Timestamp) -> str:
    seconds = timestamp.ToMilliseconds() / 1000
    moment = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    return f'<time datetime="{moment.isoformat()}">{moment:%Y-%m-%d %H:%M:%S} UTC</time>'


def _duration(job: jobs_pb2.Job) -> str:
    if not job.HasField("started_at"):
        return ""
    seconds = (job.finished_at.ToMilliseconds() - job.started_at.ToMilliseconds()) / 1000
    text = f"{seconds:.1f} s" if seconds < 60 else str(datetime.timedelta(seconds=round(seconds)))
    return f' <span class="quiet">after {text}</span>'


def _size(size: int) -> str:
    amount = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table. :param rows: cells as HTML."""
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table>"


def projects_page(projects: Iterable[tuple[Project, int]]) -> str:
    """Return the page of all projects with their numbers of jobs."""
    rows = [
        (
            f'<a href="{escape(project_path(project))}">{escape(project.name or project.id)}</a>',
            f"<code>{escape(project.id)}</code>",
            f"<code>{escape(project.community_id)}</code>",
            str(count),
        )
        for project, count in projects
    ]
    return _page("Projects", _table(("Name", "Id", "Community", "Jobs"), rows))


def project_page(project: Project, jobs: Iterable[jobs_pb2.Job]) -> str:
    """Return the page of a project with its jobs, in the given order."""
    jobs = list(jobs)
    rows = [
        (
            _status(job.status),
            f'<a href="{escape(job_path(project, job.id))}">{escape(job.name or job.id)}</a>',
            f"<code>{escape(job.id)}</code>",
            escape(job.desc),
            _time(job.created_at),
            _time(job.finished_at) if job.HasField("finished_at") else "",
        )
        for job in jobs
    ]
    body = _table(("Status", "Name", "Id", "Description", "Created", "Finished"), rows)
    if not jobs:
        body = '<p class="quiet">No jobs yet.</p>'
    running = any(job.status not in _ENDED for job in jobs)
    return _page(f"Project {project.name or project.id}", body, [("/projects", "Projects")], refresh=running)


def _facts(project: Project, job: jobs_pb2.Job) -> str:
    parameters = job.job_parameters
    rows: list[tuple[str, str]] = [
        ("Status", f'<span id="status">{_status(job.status)}</span>'),
        ("Details", escape(job.status_details)),
        ("Id", f"<code>{escape(job.id)}</code>"),
        ("Description", escape(job.desc)),
    ]
    if job.parent_job_id:
        parent = escape(job.parent_job_id)
        path = escape(job_path(project, job.parent_job_id))
        rows.append(("Forked from", f'<a href="{path}"><code>{parent}</code></a>'))
    for field, title in (
        ("created_at", "Created"),
        ("started_at", "Started"),
        ("finished_at", "Finished"),
        ("data_expires_at", "Data expires"),
    ):
        if job.HasField(field):  # type: ignore[arg-type]  # the stubs want literals
            rows.append((title, _time(getattr(job, field)) + (_duration(job) if field == "finished_at" else "")))
    if job.data_cleared:
        rows.append(("Data", "cleared"))
    image = parameters.env.docker_image_resource_id or parameters.env.docker_image_spec.image_url
    rows += [
        ("Created by", f"<code>{escape(job.created_by_id)}</code>" if job.created_by_id else ""),
        ("Instance types", escape(", ".join(kind.name for kind in parameters.cloud_instance_types))),
        ("Ran on", escape(job.actual_cloud_instance_type.name)),
        ("Docker image", escape(image)),
        ("Command", f"<code>{escape(parameters.cmd)}</code>"),
        (
            "Arguments",
            "<br>".join(
                f"<code>{escape(argument.name)}</code> = <code>{escape(argument.value)}</code>"
                for argument in parameters.arguments
            ),
        ),
        # Values may be secrets: names only.
        ("Variables", ", ".join(f"<code>{escape(name)}</code>" for name in sorted(parameters.env.vars))),
    ]
    lines = "".join(f"<tr><th>{title}</th><td>{value}</td></tr>" for title, value in rows if value)
    return f"<table><tbody>{lines}</tbody></table>"


def _files(title: str, files: Iterable[jobs_pb2.File], link: Callable[[jobs_pb2.File], str | None]) -> str:
    files = list(files)
    with_var = any(file.desc.var for file in files)
    rows = []
    for file in files:
        path = escape(file.desc.path or file.desc.var)
        address = link(file)
        zipped = " (zip)" if file.compression_type == jobs_pb2.FileCompressionType.ZIP else ""
        var = f"<code>{escape(file.desc.var)}</code>" if file.desc.var else ""
        rows.append(
            (
                (f'<a href="{escape(address)}">{path}</a>' if address else path) + zipped,
                *([var] if with_var else []),
                _size(file.size_bytes),
                f"<code>{escape(file.sha256)}</code>",
            )
        )
    head = ("Path", *(["Variable"] if with_var else []), "Size", "SHA-256")
    return f"<h2>{escape(title)}</h2>" + _table(head, rows) if rows else ""


def job_page(
    project: Project,
    job: jobs_pb2.Job,
    logs: Iterable[LogView],
    link: Callable[[jobs_pb2.File], str | None],
    progress: jobs_pb2.JobProgress | None = None,
) -> str:
    """Return the page of a job: parameters, files and logs. It reloads while the job runs.

    :param link: returns the URL of a file, None if its content isn't stored.
    """
    body = [_facts(project, job)]
    if progress is not None:
        body.append(
            f'<p><progress max="100" value="{progress.progress}"></progress> '
            f"{progress.progress} % {escape(progress.message)}</p>"
        )
    for error in job.file_errors:
        name = error.output_file_desc.path or error.output_file_desc.var or error.log_file_name
        kind = jobs_pb2.FileUploadError.ErrorType.Name(error.type)
        body.append(f"<p><strong>{escape(kind)}</strong>: {escape(name)}. {escape(error.description)}</p>")
    body.append(_files("Outputs", job.output_files, link))
    if job.output_datasets:
        rows = [(escape(item.desc.name), f"<code>{escape(item.id)}</code>") for item in job.output_datasets]
        body.append("<h2>Output datasets</h2>" + _table(("Name", "Id"), rows))
    for log in logs:
        note = ""
        if log.left_out:
            whole = f"{escape(job_path(project, job.id))}/log/{quote(log.name)}"
            note = f'<p class="quiet">The first {_size(log.left_out)} are not shown. <a href="{whole}">Full log</a></p>'
        body.append(f'<h2>{escape(log.name)}</h2>{note}<pre data-log="{escape(log.name)}">{escape(log.text)}</pre>')
    body.append(_files("Inputs", job.job_parameters.input_files, link))
    body.append(_files("Local modules", job.job_parameters.env.python_env.local_modules, link))
    body.append(_files("Log files", job.log_files, link))
    body.append(_files("Diagnostic files", job.diagnostic_files, link))
    trail = [("/projects", "Projects"), (project_path(project), project.name or project.id)]
    return _page(job.name or f"Job {job.id}", "".join(body), trail, refresh=job.status not in _ENDED)


def message_page(title: str, text: str) -> str:
    """Return a page with a message."""
    return _page(title, f"<p>{escape(text)}</p>", [("/projects", "Projects")])
