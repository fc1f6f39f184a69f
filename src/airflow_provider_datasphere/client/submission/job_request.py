"""The interface between one way to create a job and the submission, which is the same for every way.

:mod:`.fork` and :mod:`.new_job` implement it; nothing else in this package knows how a job is created.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from yandex.cloud.datasphere.v2.jobs import jobs_pb2

    from airflow_provider_datasphere.client.submission.job_key import Key
    from airflow_provider_datasphere.client.transfer.inputs import InputSource, JobInput

#: Makes inputs ready for upload: where they come from; the paths inside the job that other inputs have; an empty folder
#: for temporary files.
InputStager = Callable[[Sequence["InputSource"], Sequence[str], Path], Sequence["JobInput"]]
#: Adds the tag of the task to the description that a job would have without it.
DescriptionTagger = Callable[[str], str]


class JobOrigin(Protocol):
    """Where a task's jobs come from: what a search for them needs to know."""

    def project_id(self) -> str:
        """Return the id of the project in which the jobs are created.

        :raises JobRequestError: it can't be found out.
        """

    def is_origin_of(self, job: jobs_pb2.Job, key: Key) -> bool:
        """Return whether this job, whose description has the key's token, was created for the key.

        A job that somebody forked from the task's own has inherited the token.
        """


class JobRequest(Protocol):
    """The job that a task wants to run."""

    @property
    def origin(self) -> JobOrigin: ...

    @property
    def creation(self) -> CreationRpc: ...

    @property
    def label(self) -> str:
        """What the RPC does, to begin a message with: ``Cloning job bt1…``."""

    @property
    def data_ttl(self) -> timedelta | None:
        """How long the service keeps the job's data; ``None`` for infinity."""

    def comparable_arguments(self) -> Mapping[str, Any]:
        """Return the arguments by the names that messages give them; equal for requests of the same job."""

    def has_inputs(self, jobs: Sequence[jobs_pb2.Job]) -> bool:
        """Return whether files are uploaded for it.

        :param jobs: jobs that were created for this request.
        """

    def changed_arguments(self, job: jobs_pb2.Job) -> list[str]:
        """Return the names of the arguments that, by what the job shows, differ from this request's."""

    def changed_inputs(self, job: jobs_pb2.Job, *, compare_remote: bool) -> list[str]:
        """Return the names of the inputs whose content differs from the job's; an unreadable one isn't compared.

        :param compare_remote: compare objects in stores too, which downloads them.
        """

    def prepare(self, scratch: Path, tag: DescriptionTagger | None) -> PreparedJob:
        """Check the request, and make its inputs ready for upload.

        :param scratch: an empty folder for temporary files, which lives until the inputs are uploaded.
        :param tag: ``None`` leaves the description as it is.
        :raises JobRequestError: the request can't be carried out as written.
        """


@dataclass(frozen=True)
class CreationRpc:
    """The RPC of ``ProjectJobService`` that creates a job; it answers with an operation.

    :param method: its name.
    :param metadata: message type of the operation's metadata; has ``job_id``.
    :param response: message type of the operation's response; has ``upload_files``.
    """

    method: str
    metadata: type[Any]
    response: type[Any]


@dataclass(frozen=True)
class PreparedJob:
    """A job that is ready to be created.

    :param message: the request of :class:`CreationRpc`.
    :param inputs: the files to upload.
    """

    project_id: str
    message: Any
    inputs: Sequence[JobInput]
