"""Settings: what nobody knows about the real service, and what a test wants to turn."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

DAY = 86400.0

#: gRPC status codes a setting may name, with their numbers (google.rpc.Code).
CODES = {
    "OK": 0,
    "CANCELLED": 1,
    "UNKNOWN": 2,
    "INVALID_ARGUMENT": 3,
    "DEADLINE_EXCEEDED": 4,
    "NOT_FOUND": 5,
    "ALREADY_EXISTS": 6,
    "PERMISSION_DENIED": 7,
    "RESOURCE_EXHAUSTED": 8,
    "FAILED_PRECONDITION": 9,
    "ABORTED": 10,
    "OUT_OF_RANGE": 11,
    "UNIMPLEMENTED": 12,
    "INTERNAL": 13,
    "UNAVAILABLE": 14,
    "DATA_LOSS": 15,
    "UNAUTHENTICATED": 16,
}

_CHOICES: dict[str, tuple[str, ...]] = {
    "clone_env_vars": ("replace", "merge"),
    "clone_empty_name": ("source", "empty"),
    "clone_empty_desc": ("source", "empty"),
    "stored_uploads": ("absent", "empty_url"),
    "upload_order": ("declared", "shuffled"),
    "unset_data_ttl": ("default", "infinite"),
    "list_order": ("newest", "oldest", "shuffled"),
    "execute_finished": ("same_operation", "failed_precondition"),
    "cancel_finished": ("failed_precondition", "ok"),
    "status_after_nonzero_exit": ("ERROR", "SUCCESS"),
    "outputs_after_cancel": ("never", "graceful", "always"),
    "read_role": ("viewer", "developer", "editor", "admin"),
    "cancelled_operation_code": tuple(name for name in CODES if name != "OK"),
    "quota_code": tuple(name for name in CODES if name != "OK"),
}


@dataclasses.dataclass
class Settings:
    """How the emulated service behaves. Every field may be changed while it runs, except where said.

    :param idempotency: Create, Clone and Execute answer a repeated ``idempotency-key`` with the same operation.
    :param clone_env_vars: variables given to Clone take the place of the source's, or are merged into them.
    :param clone_empty_name: a fork without a name gets its source's, or none.
    :param clone_empty_desc: the same for the description.
    :param clone_requires_started_source: refuse to clone a job in CREATING or PREPARING (FAILED_PRECONDITION).
    :param clone_seconds: time until the operation of Create and Clone is done; the job exists at once.
    :param stored_uploads: a file the project holds already is absent from ``upload_files``, or has an empty url.
    :param upload_order: order of ``upload_files``.
    :param unset_data_ttl: Create and Clone without ``data_ttl``: ``default_data_ttl_seconds``, or for ever.
    :param default_data_ttl_seconds: 14 days.
    :param unique_names: a name used by another job of the project is refused with ALREADY_EXISTS.
    :param max_name_length: characters, None for no limit. Longer ones are refused with INVALID_ARGUMENT.
    :param max_desc_length: the same for the description.
    :param allowed_instance_types: instance types of the community; others are refused with FAILED_PRECONDITION.
        None allows all.
    :param max_running_jobs: jobs of a project that may run at once; Execute beyond it ends with ``quota_code``.
    :param quota_code: name of the gRPC status code of that refusal.
    :param execute_finished: Execute of an ended job answers its operation, or refuses.
    :param cancel_finished: Cancel of an ended job is refused, or accepted without effect.
    :param creating_seconds: an executed job goes on showing CREATING this long; 0: it shows PREPARING at once.
    :param preparing_seconds: least time a process job stays in PREPARING.
    :param uploading_seconds: least time a process job stays in UPLOADING_OUTPUT.
    :param cancelling_seconds: least time a job stays in CANCELLING.
    :param status_after_nonzero_exit: status of a job whose program ended with a return code other than 0.
    :param outputs_after_cancel: when a cancelled process job's outputs are collected.
    :param cancelled_operation_code: error code of a cancelled job's operation.
    :param read_role: weakest role in the project that may read its jobs, logs and operations. To change anything takes
        ``developer``.
    :param operation_retention_seconds: an operation is forgotten this long after it ended. None keeps it.
    :param url_lifetime_seconds: how long presigned URLs work.
    :param fresh_operation_urls: presigned URLs inside an operation's response are made anew by each
        OperationService.Get; otherwise they are those made when it ended.
    :param list_order: order of List.
    :param seed: seed of everything shuffled.
    :param log_delay_seconds: log lines reach ReadLogs this much later, also after the operation is done.
    :param log_chunk_bytes: ReadLogs sends messages of at most so many bytes, one per answer, cut anywhere.
        None: whole pieces as they were read.
    :param log_stream_seconds: a ReadLogs stream ends cleanly after this long, whether all is delivered or not. None:
        not before everything is.
    :param log_keepalive_seconds: ReadLogs sends an answer without messages this often while nothing happens. None:
        never.
    :param job_environment: environment variables that every program gets.
    :param project_secrets: secrets of the project, which programs get as environment variables too.
    :param unbuffered_python: set ``PYTHONUNBUFFERED=1`` for programs, so that their output arrives as it is printed.
    :param quote_substitutions: quote the values put in place of ``${NAME}`` in ``cmd`` for the shell. The plain
        replacement is what the SDK itself does with resource ids.
    :param keep_scratch: keep the folder a program ran in after its end.
    :param max_concurrent_streams: streams per HTTP/2 connection. Read when the server starts.
    """

    idempotency: bool = True
    clone_env_vars: str = "replace"
    clone_empty_name: str = "source"
    clone_empty_desc: str = "source"
    clone_requires_started_source: bool = False
    clone_seconds: float = 0.0
    stored_uploads: str = "absent"
    upload_order: str = "shuffled"
    unset_data_ttl: str = "default"
    default_data_ttl_seconds: float = 14 * DAY
    unique_names: bool = False
    max_name_length: int | None = None
    max_desc_length: int | None = None
    allowed_instance_types: tuple[str, ...] | None = None
    max_running_jobs: int | None = None
    quota_code: str = "RESOURCE_EXHAUSTED"
    execute_finished: str = "same_operation"
    cancel_finished: str = "failed_precondition"
    creating_seconds: float = 0.0
    preparing_seconds: float = 0.0
    uploading_seconds: float = 0.0
    cancelling_seconds: float = 0.0
    status_after_nonzero_exit: str = "ERROR"
    outputs_after_cancel: str = "graceful"
    cancelled_operation_code: str = "CANCELLED"
    read_role: str = "viewer"
    operation_retention_seconds: float | None = None
    url_lifetime_seconds: float = 3600.0
    fresh_operation_urls: bool = False
    list_order: str = "newest"
    seed: int = 0
    log_delay_seconds: float = 0.0
    log_chunk_bytes: int | None = None
    log_stream_seconds: float | None = None
    log_keepalive_seconds: float | None = None
    job_environment: dict[str, str] = dataclasses.field(default_factory=dict)
    project_secrets: dict[str, str] = dataclasses.field(default_factory=dict)
    unbuffered_python: bool = True
    quote_substitutions: bool = False
    keep_scratch: bool = False
    max_concurrent_streams: int = 100

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _FIELDS:
            raise AttributeError(f"There is no setting {name!r}. Settings: {', '.join(sorted(_FIELDS))}.")
        object.__setattr__(self, name, _checked(name, value))

    def update(self, values: Mapping[str, Any]) -> None:
        """Set several settings at once; nothing is changed if one of them is wrong.

        :raises AttributeError: no such setting.
        :raises ValueError: a value of the wrong kind, or not among the setting's choices.
        """
        trial = dataclasses.replace(self, **{name: value for name, value in values.items() if name in _FIELDS})
        for name, value in values.items():
            setattr(trial, name, value)
        for name in values:
            setattr(self, name, getattr(trial, name))

    def set_from_text(self, assignment: str) -> None:
        """Set from ``name=value`` as typed in a shell; the value is JSON, or a plain string.

        :raises ValueError: not of that form, or a wrong value.
        """
        name, separator, text = assignment.partition("=")
        if not separator:
            raise ValueError(f"{assignment!r}: must be name=value.")
        try:
            value: Any = json.loads(text)
        except ValueError:
            value = text
        if _FIELDS.get(name, "").startswith("str"):
            value = text
        try:
            setattr(self, name, value)
        except AttributeError as error:
            raise ValueError(str(error)) from None

    def to_json(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return dataclasses.asdict(self)


_FIELDS: dict[str, str] = {field.name: str(field.type) for field in dataclasses.fields(Settings)}


def _checked(name: str, value: Any) -> Any:
    kind = _FIELDS[name]
    optional = kind.endswith("| None")
    base = kind.removesuffix(" | None")
    if value is None and optional:
        return None
    if base == "bool":
        good = isinstance(value, bool)
    elif base == "int":
        good = isinstance(value, int) and not isinstance(value, bool)
    elif base == "float":
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0
        value = float(value) if good else value
    elif base == "str":
        good = isinstance(value, str) and value in _CHOICES.get(name, (value,))
    elif base.startswith("tuple"):
        good = isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)
        value = tuple(value) if good else value
    else:
        good = isinstance(value, dict) and all(isinstance(item, str) for pair in value.items() for item in pair)
    if good and name in ("log_chunk_bytes", "max_concurrent_streams", "max_name_length", "max_desc_length"):
        good = value > 0
    if not good:
        wanted = " or ".join(_CHOICES[name]) if name in _CHOICES else kind
        raise ValueError(f"setting {name}={value!r}: must be {wanted}.")
    return value
