"""What can go wrong with a job, as one small tree of exceptions.

Every class is buildable from one string, so that it survives pickling. Messages say what happened, which job
(id and link), and what to do. :mod:`airflow_provider_datasphere.exceptions` has the Airflow exception of each class.
"""

from __future__ import annotations


class DataSphereError(Exception):
    """Base class of all errors that this package raises about DataSphere."""


class JobRequestError(DataSphereError):
    """The request can't be carried out as written, found before Execute; the same request would fail again.

    Unknown source job, argument or variable; an input that isn't there; no role in the project; cleared data.
    """


class JobFailedError(DataSphereError):
    """The program ended with a return code other than 0."""


class RemoteError(JobFailedError):
    """The function that the job ran has raised an exception; the message has its type, text and traceback."""


class MissingOutputsError(DataSphereError):
    """The program succeeded but didn't make outputs that the job declares."""


class JobCancelledError(DataSphereError):
    """Somebody else cancelled the job while this client waited for it."""


class JobInfrastructureError(DataSphereError):
    """The service failed the job: the operation ended with an error, or an output couldn't be stored."""


class JobNotStartedError(JobInfrastructureError):
    """The job wasn't computing when ``start_timeout`` had passed; the message is :func:`not_started_text`."""


class JobLostError(DataSphereError):
    """The job can no longer be monitored (role, token or operation gone); it may still be running and costing money."""


class ResultsError(DataSphereError):
    """A download that is incomplete or doesn't match what the service recorded."""


class PermanentResultsError(ResultsError):
    """A download that fails again however often it is retried."""


class ResultsGoneError(PermanentResultsError):
    """The files don't exist any more or never did; no retry brings them back."""


class Interrupted(DataSphereError):
    """The client was interrupted during a wait: its task is being killed."""


def not_started_text(job: str, reason: str) -> str:
    """Return the message about a job that has taken too long to start.

    :param job: the job, to begin a sentence with: "Job bt1…".
    :param reason: why it doesn't compute yet.
    """
    return (
        f"{job} wasn't computing when start_timeout passed ({reason.rstrip('.')}). Another try runs a new job; raise "
        "start_timeout to wait longer, or allow more cloud_instance_types."
    )
