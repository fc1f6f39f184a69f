"""The Airflow side of :mod:`airflow_provider_datasphere.client.errors`: which failures Airflow retries.

A class that is also an :class:`AirflowFailException` is not retried. Each class also is its client twin, so
``except client.errors.JobFailedError`` catches both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from airflow_provider_datasphere.client import errors
from airflow_provider_datasphere.compat import AirflowException, AirflowFailException


class DataSphereError(errors.DataSphereError, AirflowException):
    """Anything this provider raises about DataSphere."""


class JobRequestError(errors.JobRequestError, DataSphereError, AirflowFailException):
    """The request can't be carried out as written, found before Execute. Not retried: it would fail again."""


class JobFailedError(errors.JobFailedError, DataSphereError):
    """The program ended with a return code other than 0. Retried by the operator."""


class MissingOutputsError(errors.MissingOutputsError, DataSphereError, AirflowFailException):
    """The program made not all declared outputs. Not retried: a rerun costs the same and does the same."""


class JobCancelledError(errors.JobCancelledError, DataSphereError, AirflowFailException):
    """Somebody else cancelled the job while this try watched it. Not retried: a person wanted it ended."""


class JobInfrastructureError(errors.JobInfrastructureError, DataSphereError):
    """The service failed the job: operation error or an output that couldn't be stored. Retried."""


class JobLostError(errors.JobLostError, DataSphereError):
    """The job is out of sight, though it may go on running and costing money. Retried."""


class ResultsError(errors.ResultsError, DataSphereError):
    """A download that is incomplete or doesn't match what the service recorded."""


class FinalJobFailedError(JobFailedError, AirflowFailException):
    """:class:`JobFailedError` seen by a sensor: looking again can't change it."""


class FinalJobInfrastructureError(JobInfrastructureError, AirflowFailException):
    """:class:`JobInfrastructureError` seen by a sensor: looking again can't change it."""


class FinalResultsError(ResultsError, AirflowFailException):
    """:class:`ResultsError` about files that are gone: no retry brings them back."""


_AIRFLOW_SIDE: dict[type[errors.DataSphereError], type[DataSphereError]] = {
    errors.DataSphereError: DataSphereError,
    errors.JobRequestError: JobRequestError,
    errors.JobFailedError: JobFailedError,
    errors.MissingOutputsError: MissingOutputsError,
    errors.JobCancelledError: JobCancelledError,
    errors.JobInfrastructureError: JobInfrastructureError,
    errors.JobLostError: JobLostError,
    errors.ResultsError: ResultsError,
}

_FINAL: dict[type[DataSphereError], type[DataSphereError]] = {
    JobFailedError: FinalJobFailedError,
    JobInfrastructureError: FinalJobInfrastructureError,
    ResultsError: FinalResultsError,
}


def airflow_side(error: errors.DataSphereError, *, final: bool = False) -> DataSphereError:
    """The Airflow twin of a client error, with the same message.

    :param final: for a watcher that can't change the outcome (a sensor): a terminal failure is not retried.
    """
    if isinstance(error, DataSphereError):
        twin = error
    else:
        known = next(cls for cls in type(error).__mro__ if cls in _AIRFLOW_SIDE)
        twin = _AIRFLOW_SIDE[known](str(error))
    return _FINAL[type(twin)](str(error)) if final and type(twin) in _FINAL else twin


@contextmanager
def translated(*, final: bool = False) -> Iterator[None]:
    """Raise client errors that leave the block as their Airflow twins."""
    try:
        yield
    except errors.DataSphereError as error:
        twin = airflow_side(error, final=final)
        if twin is error:
            raise
        raise twin from error
