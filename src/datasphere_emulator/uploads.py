"""Which files a client still has to upload."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from yandex.cloud.datasphere.v2.jobs import jobs_pb2

from datasphere_emulator.parameters import uploaded_files

if TYPE_CHECKING:
    from datasphere_emulator.settings import Settings
    from datasphere_emulator.storage import Storage


def missing_uploads(job: jobs_pb2.Job, storage: Storage) -> list[jobs_pb2.File]:
    """The job's files whose content the project doesn't have, each content once."""
    files = {file.sha256: file for file in reversed(list(uploaded_files(job.job_parameters)))}
    return [file for file in files.values() if not storage.has(job.project_id, file.sha256)]


def upload_list(job: jobs_pb2.Job, storage: Storage, settings: Settings) -> list[jobs_pb2.StorageFile]:
    """``upload_files`` of Create's and Clone's answers: each content once, stored ones absent or without a url."""
    files = {file.sha256: file for file in reversed(list(uploaded_files(job.job_parameters)))}
    listed = []
    for file in files.values():
        if not storage.has(job.project_id, file.sha256):
            url = storage.put_url(job.project_id, file.sha256, file.size_bytes)
            listed.append(jobs_pb2.StorageFile(file=file, url=url))
        elif settings.stored_uploads == "empty_url":
            listed.append(jobs_pb2.StorageFile(file=file))
    if settings.upload_order == "shuffled":
        random.Random(f"{settings.seed} {job.id}").shuffle(listed)
    else:
        listed.reverse()
    return listed
