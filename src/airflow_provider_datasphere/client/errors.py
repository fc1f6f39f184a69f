"""What can go wrong with a job, as one small tree of exceptions.

Every class is buildable from one string, so that it survives pickling. Messages say what happened, which job
(id and link), and what to do. :mod:`airflow_provider_datasphere.exceptions` gives each class its Airflow side.
"""

from __future__ import annotations


class DataSphereError(Exception):
    """Anything this package raises about DataSphere."""


class JobRequestError(DataSphereError):
    """The request can't be carried out as written, found before Execute; the same request would fail again.

    Unknown source job, argument or variable; an input that isn't there; no role in the project; cleared data.
    """


class JobFailedError(DataSphereError):
    """The program ended with a return code other than 0."""


class MissingOutputsError(DataSphereError):
    """The program succeeded but didn't make outputs that the job declares."""


class JobCancelledError(DataSphereError):
    """Somebody else cancelled the job while it was watched."""


class JobInfrastructureError(DataSphereError):
    """The service failed the job: the operation ended with an error, or an output couldn't be stored."""


class JobLostError(DataSphereError):
    """The job is out of sight (role, token or operation gone), though it may go on running and costing money."""


class ResultsError(DataSphereError):
    """A download that is incomplete or doesn't match what the service recorded."""
