"""Settings: behaviour of the real service that is unknown or varies, and options for tests."""

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
    "new_jobs_visible": ("at_once", "when_done"),
    "stored_uploads": ("absent", "empty_url"),
    "upload_order": ("declared", "shuffled"),
    "unset_data_ttl": ("default", "infinite"),
    "list_order": ("newest", "oldest", "shuffled"),
    "execute_finished": ("same_operation", "failed_precondition"),
    "cancel_finished": ("failed_precondition", "ok"),
    "status_after_nonzero_exit": ("ERROR", "SUCCESS"),
    "refused_job": ("stays", "error"),
    "status_after_failed_upload": ("ERROR", "SUCCESS"),
    "outputs_after_error": ("collected", "never"),
    "outputs_after_cancel": ("computing", "graceful", "never"),
    "read_logs_of_running_job": ("all", "live", "at_end"),
    "read_role": ("viewer", "developer", "editor", "admin"),
    "cancelled_operation_code": tuple(name for name in CODES if name != "OK"),
    "quota_code": tuple(name for name in CODES if name != "OK"),
}

#: Choices of the items of a list.
_ITEMS: dict[str, tuple[str, ...]] = {"instance_types_checked_by": ("Create", "Clone", "Execute")}


@dataclasses.dataclass
class Settings:
    """Behaviour of the emulated service. Fields may be changed while it runs, unless stated otherwise.

    Each entry says what clients see, then what the default is based on: documentation, the SDK or users' reports.

    Create, Clone and List:

    :param idempotency: a repeated ``idempotency-key`` returns the operation of the first Create, Clone or Execute;
        False runs the call again. The API guide promises it for all services; unconfirmed for this one.
    :param clone_env_vars: Clone's variables "replace" the source's, or "merge" into them. A comment in the SDK.
    :param clone_empty_name: a fork without a name has its "source"'s name, or an "empty" one. Unknown.
    :param clone_empty_desc: the same for the description. Unknown.
    :param clone_requires_started_source: Clone of a job in CREATING or PREPARING is FAILED_PRECONDITION. Unknown; users
        wait for EXECUTING first.
    :param clone_seconds: seconds until the operation of Create and Clone is done; its metadata have the job id at once.
    :param new_jobs_visible: a new job is found by all calls "at_once", or "when_done", until which it is NOT_FOUND.
        Unknown.
    :param stored_uploads: a file that the project already has is "absent" from ``upload_files``, or has an "empty_url".
        The proto says absent, the SDK expects both.
    :param upload_order: ``upload_files`` are "shuffled", or in "declared" order. The proto says "arbitrary".
    :param unset_data_ttl: without ``data_ttl`` data expire after the "default", or never ("infinite"). Unknown.
    :param default_data_ttl_seconds: that default, seconds. 14 days, as in the documentation.
    :param unique_names: a name of another job of the project is ALREADY_EXISTS. The documentation asks for unique
        names; users' forks with equal names are accepted.
    :param max_name_length: a longer name (characters) is INVALID_ARGUMENT; None for no limit. Not published.
    :param max_desc_length: the same for the description. Not published.
    :param list_order: List returns the "newest" or "oldest" job first, or "shuffled" jobs. Not documented.
    :param seed: seed of everything shuffled.
    :param read_role: weakest role that may read jobs, logs and operations: "viewer", "developer", "editor" or "admin".
        Changes take "developer". Not documented.

    Instance types and quotas:

    :param allowed_instance_types: other instance types are always INVALID_ARGUMENT ("not available for your
        community"); None allows all. A user's report.
    :param unavailable_instance_types: these are INVALID_ARGUMENT with the same message, but only for a while. A user's
        report: the same call succeeded minutes later.
    :param unavailable_seconds: how long after an account's first rejected call, seconds; None: always.
    :param unavailable_calls: number of rejected calls per method and account; None: all.
    :param instance_types_checked_by: methods that reject instance types, of "Create", "Clone" and "Execute". Unknown.
    :param max_running_jobs: Execute of more jobs of a project is rejected with ``quota_code``; None for no limit. The
        real quota is not published.
    :param room_refusals: number of Executes per account that are rejected in the same way before others are accepted.
    :param quota_code: gRPC status of these rejections. A user's report.
    :param refused_job: a job so rejected "stays" as it was and can be executed later, or soon shows "error": ERROR
        without having run, and further Executes are rejected too. One user reports the latter.
    :param refused_job_seconds: seconds from a job's creation until it shows that ERROR. The same report.

    Execution, cancellation and outputs:

    :param execute_finished: Execute of an ended job returns the "same_operation", or is "failed_precondition". Two
        users report the former.
    :param cancel_finished: Cancel of an ended job is "failed_precondition", or "ok" without effect. Unknown.
    :param creating_seconds: how long an executed job still shows CREATING, seconds; 0: PREPARING at once. Users report
        CREATING, but not how long.
    :param preparing_seconds: least time of a program in PREPARING, seconds. Minutes in the cloud.
    :param uploading_seconds: least time of a program in UPLOADING_OUTPUT, seconds.
    :param cancelling_seconds: least time of any job in CANCELLING, seconds.
    :param status_after_nonzero_exit: status of a job whose return code isn't 0, "ERROR" or "SUCCESS"; its operation has
        a response either way. Users report ERROR.
    :param status_after_failed_upload: status of a job whose program succeeded and of whose outputs some couldn't be
        stored, "ERROR" or "SUCCESS". One user reports ERROR.
    :param outputs_after_error: outputs are "collected" after a return code other than 0, or "never". Users report both.
    :param outputs_after_cancel: outputs of a cancelled job are collected if it was "computing", only after a "graceful"
        cancel, or "never". Users report the first.
    :param cancelled_operation_code: gRPC code of a cancelled job's operation. Unknown.

    Operations, URLs and logs:

    :param operation_retention_seconds: Operation.Get is NOT_FOUND this long after the end, seconds; None: never. Not
        documented.
    :param url_lifetime_seconds: lifetime of presigned URLs, seconds. Not published.
    :param fresh_operation_urls: each Operation.Get has new presigned URLs in the response; False: those of its end,
        which expire. Unknown.
    :param read_logs_of_running_job: ReadLogs from the start returns "all" lines of a running job, only "live" lines
        from now on, or nothing until it is "at_end". Users report all three; of an ended job it is always the whole
        log.
    :param log_delay_seconds: delay of log lines in ReadLogs, seconds, also after the operation is done. Users report
        minutes.
    :param log_chunk_bytes: ReadLogs sends one message per response of at most this size, bytes, split anywhere; None:
        pieces as they were read. The SDK's comments say that lines may be split.
    :param log_stream_seconds: a ReadLogs stream ends cleanly after this time, seconds; None: after the whole log. The
        SDK's comments say that it may end at any time.
    :param log_keepalive_seconds: interval of empty responses of ReadLogs while nothing is logged, seconds; None: none.
    :param max_concurrent_streams: limit of streams per HTTP/2 connection; read at the start. Not published.

    Programs:

    :param job_environment: environment variables of all programs.
    :param project_secrets: secrets of the project: also environment variables of all programs.
    :param unbuffered_python: set ``PYTHONUNBUFFERED=1``, so that output of Python programs appears at once.
    :param quote_substitutions: quote the values of ``${NAME}`` in ``cmd`` for the shell. The SDK itself replaces
        resource ids without quotes.
    :param keep_scratch: keep the folder of a program after its end.
    """

    idempotency: bool = True
    clone_env_vars: str = "replace"
    clone_empty_name: str = "source"
    clone_empty_desc: str = "source"
    clone_requires_started_source: bool = False
    clone_seconds: float = 0.0
    new_jobs_visible: str = "at_once"
    stored_uploads: str = "absent"
    upload_order: str = "shuffled"
    unset_data_ttl: str = "default"
    default_data_ttl_seconds: float = 14 * DAY
    unique_names: bool = False
    max_name_length: int | None = None
    max_desc_length: int | None = None
    allowed_instance_types: tuple[str, ...] | None = None
    unavailable_instance_types: tuple[str, ...] = ()
    unavailable_seconds: float | None = None
    unavailable_calls: int | None = None
    instance_types_checked_by: tuple[str, ...] = ("Create", "Clone")
    max_running_jobs: int | None = None
    room_refusals: int = 0
    quota_code: str = "RESOURCE_EXHAUSTED"
    refused_job: str = "stays"
    refused_job_seconds: float = 3.4
    execute_finished: str = "same_operation"
    cancel_finished: str = "failed_precondition"
    creating_seconds: float = 0.0
    preparing_seconds: float = 0.0
    uploading_seconds: float = 0.0
    cancelling_seconds: float = 0.0
    status_after_nonzero_exit: str = "ERROR"
    status_after_failed_upload: str = "ERROR"
    outputs_after_error: str = "collected"
    outputs_after_cancel: str = "computing"
    cancelled_operation_code: str = "CANCELLED"
    read_role: str = "viewer"
    operation_retention_seconds: float | None = None
    url_lifetime_seconds: float = 3600.0
    fresh_operation_urls: bool = False
    list_order: str = "newest"
    seed: int = 0
    read_logs_of_running_job: str = "all"
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
        """Set several settings at once, or none if a value is invalid.

        :raises AttributeError: there is no such setting.
        :raises ValueError: a value is of the wrong type or not one of the setting's choices.
        """
        trial = dataclasses.replace(self, **{name: value for name, value in values.items() if name in _FIELDS})
        for name, value in values.items():
            setattr(trial, name, value)
        for name in values:
            setattr(self, name, getattr(trial, name))

    def set_from_text(self, assignment: str) -> None:
        """Set from ``name=value`` as on the command line; the value is JSON or plain text.

        :raises ValueError: the text has another form, or the setting or value is invalid.
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
        """Return the settings as JSON values."""
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
        items = _ITEMS.get(name)
        good = isinstance(value, (list, tuple)) and all(
            isinstance(item, str) and (items is None or item in items) for item in value
        )
        value = tuple(value) if good else value
    else:
        good = isinstance(value, dict) and all(isinstance(item, str) for pair in value.items() for item in pair)
    if good and name in ("log_chunk_bytes", "max_concurrent_streams", "max_name_length", "max_desc_length"):
        good = value > 0
    if not good:
        wanted = " or ".join(_CHOICES[name]) if name in _CHOICES else kind
        if name in _ITEMS:
            wanted = f"a list of {', '.join(_ITEMS[name])}"
        raise ValueError(f"setting {name}={value!r}: must be {wanted}.")
    return value
