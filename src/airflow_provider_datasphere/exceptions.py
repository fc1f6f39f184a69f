"""The Airflow exceptions of :mod:`airflow_provider_datasphere.client.errors`: which failures Airflow retries.

A class that is also an :class:`AirflowFailException` is not retried. Each class is also a subclass of the client error
of its name, so ``except client.errors.JobFailedError`` catches both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from airflow_provider_datasphere.client import errors
from airflow_provider_datasphere.compat import AirflowException, AirflowFailException


class DataSphereError(errors.DataSphereError, AirflowException):
    """Base class of all errors that this provider raises about DataSphere."""

    #: The client error that this one was raised for.
    client_error: errors.DataSphereError | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # The client error, and all that it references, stays in its process.
        return type(self), self.args, {name: value for name, value in vars(self).items() if name != "client_error"}


class JobRequestError(errors.JobRequestError, DataSphereError, AirflowFailException):
    """The request can't be carried out as written, found before Execute. Not retried: it would fail again."""


class JobFailedError(errors.JobFailedError, DataSphereError):
    """The program ended with a return code other than 0. Retried by the operator."""


class RemoteError(errors.RemoteError, JobFailedError):
    """The function of ``@task.datasphere`` raised; the message has type, text and traceback. Retried."""


class MissingOutputsError(errors.MissingOutputsError, DataSphereError, AirflowFailException):
    """The program didn't make all declared outputs. Not retried: a rerun costs the same and does the same."""


class JobCancelledError(errors.JobCancelledError, DataSphereError, AirflowFailException):
    """Somebody else cancelled the job while this try waited for it. Not retried: a person wanted it ended."""


class JobInfrastructureError(errors.JobInfrastructureError, DataSphereError):
    """The service failed the job: operation error or an output that couldn't be stored. Retried."""


class JobLostError(errors.JobLostError, DataSphereError):
    """The job can no longer be monitored, though it may still be running and costing money. Retried."""


class ResultsError(errors.ResultsError, DataSphereError):
    """A download that is incomplete or doesn't match what the service recorded."""


class NonRetryableJobFailedError(JobFailedError, AirflowFailException):
    """:class:`JobFailedError` in a sensor. Not retried: polling again can't change it."""


class NonRetryableRemoteError(RemoteError, NonRetryableJobFailedError):
    """:class:`RemoteError` where another try can't change it."""


class NonRetryableJobInfrastructureError(JobInfrastructureError, AirflowFailException):
    """:class:`JobInfrastructureError` in a sensor. Not retried: polling again can't change it."""


class NonRetryableResultsError(ResultsError, AirflowFailException):
    """:class:`ResultsError` that another try can't change: the files are gone, or the destination can't be used."""


_AIRFLOW_EXCEPTIONS: dict[type[errors.DataSphereError], type[DataSphereError]] = {
    errors.DataSphereError: DataSphereError,
    errors.JobRequestError: JobRequestError,
    errors.JobFailedError: JobFailedError,
    errors.RemoteError: RemoteError,
    errors.MissingOutputsError: MissingOutputsError,
    errors.JobCancelledError: JobCancelledError,
    errors.JobInfrastructureError: JobInfrastructureError,
    errors.JobLostError: JobLostError,
    errors.ResultsError: ResultsError,
}

_NON_RETRYABLE: dict[type[DataSphereError], type[DataSphereError]] = {
    JobFailedError: NonRetryableJobFailedError,
    RemoteError: NonRetryableRemoteError,
    JobInfrastructureError: NonRetryableJobInfrastructureError,
    ResultsError: NonRetryableResultsError,
}


def to_airflow_exception(error: errors.DataSphereError, *, retryable: bool = True) -> DataSphereError:
    """Return the Airflow exception of a client error, with the same message.

    :param retryable: ``False`` for a task that can't change the outcome (a sensor): a terminal failure isn't retried.
    """
    if isinstance(error, DataSphereError):
        exception = error
    else:
        known = next(cls for cls in type(error).__mro__ if cls in _AIRFLOW_EXCEPTIONS)
        exception = _AIRFLOW_EXCEPTIONS[known](str(error))
    if not retryable and type(exception) in _NON_RETRYABLE:
        exception = _NON_RETRYABLE[type(exception)](str(error))
    if exception is not error:
        exception.client_error = error
    return exception


@contextmanager
def airflow_exceptions(*, retryable: bool = True) -> Iterator[None]:
    """Raise client errors that leave the block as Airflow exceptions; see :func:`to_airflow_exception`.

    The Airflow exception replaces the client error, with its traceback and cause: two classes of one name in one
    traceback would read as two errors. The client error is its ``client_error``.
    """
    try:
        yield
    except errors.DataSphereError as error:
        exception = to_airflow_exception(error, retryable=retryable)
        if exception is error:
            raise
        raise exception.with_traceback(error.__traceback__) from error.__cause__


def was_interrupted(error: DataSphereError) -> bool:
    """Return whether the client was interrupted, because its task is being killed."""
    from airflow_provider_datasphere.client.errors import Interrupted

    return isinstance(error.client_error, Interrupted)
