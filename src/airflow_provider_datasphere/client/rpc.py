"""gRPC calls: deadlines, which status codes are retried, and status errors as this package's exceptions."""

from __future__ import annotations

import re

import grpc

from airflow_provider_datasphere.client.errors import DataSphereError, JobInfrastructureError, JobRequestError

#: Deadline of one read. It is retried when no answer comes.
READ_DEADLINE_SECONDS = 10.0
#: Deadline of calls that start something.
WRITE_DEADLINE_SECONDS = 60.0
#: Deadline of reads for a job's link, which no task waits long for.
LINK_DEADLINE_SECONDS = 3.0
#: Deadline of one call to IAM or the metadata service, within the deadline of the call that needs the token.
IAM_DEADLINE_SECONDS = 4.0

TRANSIENT = frozenset(
    {"UNAVAILABLE", "RESOURCE_EXHAUSTED", "INTERNAL", "DEADLINE_EXCEEDED", "UNKNOWN", "ABORTED", "CANCELLED"}
)
DENIED = frozenset({"PERMISSION_DENIED", "UNAUTHENTICATED"})
_REFUSED = frozenset(
    {"NOT_FOUND", "PERMISSION_DENIED", "INVALID_ARGUMENT", "FAILED_PRECONDITION", "OUT_OF_RANGE", "UNIMPLEMENTED"}
)

#: What C, Java, Go, Node.js and Rust say: "Received message larger than max (5000000 vs. 4194304)", "gRPC message
#: exceeds maximum size", "trying to send message larger than max", "message length too large", "too large message".
_TOO_LARGE = re.compile(
    r"message (length )?(is )?(larger than|too large|exceeds)|message size|too large message"
    r"|(request|payload) (is )?too large",
    re.IGNORECASE,
)


def code_name(error: grpc.RpcError) -> str:
    """Return the name of a failed call's status code: ``UNAVAILABLE``."""
    return str(error.code().name)


def code_and_details(error: grpc.RpcError) -> str:
    """Return what the service answered to a failed call: ``UNAVAILABLE: Connection refused``."""
    return f"{code_name(error)}: {error.details() or 'no details'}"


def error_code(error: BaseException) -> str:
    """Return the name of the status code behind one of this package's errors; "" for none."""
    code = getattr(error, "code", None) or getattr(error.__cause__, "code", None)
    return str(code().name) if callable(code) and code() is not None else ""


def error_status(error: Exception) -> tuple[str, str]:
    """The gRPC status code's name and the details of a failed call; ``INTERNAL`` for an error that isn't gRPC's."""
    if isinstance(error, grpc.RpcError):
        return code_name(error), error.details() or ""
    return "INTERNAL", f"{type(error).__name__}: {error}"


def is_message_too_large(error: grpc.RpcError) -> bool:
    """Return whether a call failed because its request or answer has too many bytes, which no retry changes.

    gRPC's own implementations say so with RESOURCE_EXHAUSTED, the code of a full quota; only the text differs.
    """
    return code_name(error) == "RESOURCE_EXHAUSTED" and _TOO_LARGE.search(error.details() or "") is not None


def call_error(error: grpc.RpcError, what: str) -> DataSphereError:
    """Convert a failed call's error to one of this package's exceptions.

    :param what: what was tried, beginning with a capital letter: "Cloning job bt1…".
    """
    code, details = code_name(error), (error.details() or "no details").rstrip(".")
    text = f"{what} failed: {code}: {details}."
    if is_message_too_large(error):
        return JobRequestError(
            f"{text} The request or its answer is larger than one message may be. Give large values to the program as "
            "an input file, in vars."
        )
    if code == "PERMISSION_DENIED":
        return JobRequestError(f"{text} Add the connection's account to the project's members as Developer.")
    if code == "NOT_FOUND":
        return JobRequestError(f"{text} Check the id, and that the connection's account can see its project.")
    if code == "UNAUTHENTICATED":
        return DataSphereError(f"{text} Check the credential of the connection: it may be expired or revoked.")
    return (JobRequestError if code in _REFUSED else JobInfrastructureError)(text)


def status_code_name(number: int) -> str:
    """Return the name of the status code with this number, as ``google.rpc.Status`` carries it."""
    return next((status.name for status in grpc.StatusCode if status.value[0] == number), str(number))
