"""Create requests in short form, for tests and demos."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import signal
import zipfile
from datetime import timedelta
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

from yandex.cloud.datasphere.v2.jobs import jobs_pb2
from yandex.cloud.datasphere.v2.jobs import project_job_service_pb2 as service_pb2

from datasphere_emulator.parameters import DEFAULT_INSTANCE_TYPE

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_Kind = TypeVar("_Kind")

#: ``data_ttl`` that leaves the field out of the request.
UNSET = "unset"


@dataclasses.dataclass
class JobDraft:
    """A new job in short form.

    :param cmd: the command, with ``${NAME}`` for variables and arguments.
    :param files: relative path -> content of all files of the job. Files that no input names become separate inputs.
    :param inputs: paths, or pairs of path and var. A path may be a directory of ``files``; it is zipped.
    :param outputs: paths, or pairs of path and var.
    :param args: argument name -> value.
    :param data_ttl: seconds or timedelta; None: data never expire; ``"unset"``: the service's default.
    :param graceful_shutdown: signal (name or number) and timeout in seconds (None for no timeout).
    :param cloud_instance_types: names, best first.
    :param local_modules: relative path -> content, each zipped separately, as the SDK does.
    :param docker: image resource id, or fields of ``DockerImageSpec``.
    :param working_storage_gb: size of the extended working storage, GB; None for none.
    :param output_datasets: fields of ``OutputDatasetDesc`` each.
    :param config: text of the job's config.yaml.
    :param project_id: "" for the emulator's default project.
    """

    cmd: str
    files: Mapping[str, bytes | str] = dataclasses.field(default_factory=dict)
    inputs: Iterable[str | Iterable[str]] = ()
    outputs: Iterable[str | Iterable[str]] = ()
    args: Mapping[str, str] = dataclasses.field(default_factory=dict)
    env_vars: Mapping[str, str] = dataclasses.field(default_factory=dict)
    name: str = ""
    desc: str = ""
    data_ttl: float | timedelta | str | None = UNSET
    graceful_shutdown: Iterable[Any] | None = None
    cloud_instance_types: Iterable[str] = (DEFAULT_INSTANCE_TYPE,)
    local_modules: Mapping[str, bytes | str] = dataclasses.field(default_factory=dict)
    python_version: str = ""
    requirements: Iterable[str] = ()
    docker: str | Mapping[str, str] | None = None
    working_storage_gb: int | None = None
    s3_mount_ids: Iterable[str] = ()
    dataset_ids: Iterable[str] = ()
    output_datasets: Iterable[Mapping[str, Any]] = ()
    attach_project_disk: bool = False
    config: str = ""
    project_id: str = ""

    def request(self) -> tuple[service_pb2.CreateProjectJobRequest, list[bytes]]:
        """Return the Create request and the contents of the files to upload.

        :raises ValueError: a value is invalid.
        """
        contents: list[bytes] = []
        request = service_pb2.CreateProjectJobRequest(
            project_id=self.project_id,
            job_parameters=self._parameters(contents),
            config=self.config or f"cmd: {self.cmd}\n",
            name=self.name,
            desc=self.desc,
        )
        if isinstance(self.data_ttl, timedelta):
            request.data_ttl.FromTimedelta(self.data_ttl)
        elif isinstance(self.data_ttl, (int, float)):
            request.data_ttl.FromNanoseconds(round(self.data_ttl * 1e9))
        elif self.data_ttl not in (None, UNSET):
            raise ValueError(f"data_ttl={self.data_ttl!r}: must be seconds, a timedelta, None or {UNSET!r}.")
        return request, contents

    def _parameters(self, contents: list[bytes]) -> jobs_pb2.JobParameters:
        parameters = jobs_pb2.JobParameters(
            cmd=self.cmd,
            input_files=self._input_files(contents),
            output_files=[_desc(item) for item in self.outputs],
            arguments=[jobs_pb2.Argument(name=name, value=value) for name, value in self.args.items()],
            cloud_instance_types=[jobs_pb2.CloudInstanceType(name=name) for name in self.cloud_instance_types],
            s3_mount_ids=self.s3_mount_ids,
            dataset_ids=self.dataset_ids,
            output_datasets=[
                _message(f"output_datasets[{number}]", jobs_pb2.OutputDatasetDesc, fields)
                for number, fields in enumerate(self.output_datasets)
            ],
            attach_project_disk=self.attach_project_disk,
            env=self._environment(contents),
        )
        if self.working_storage_gb is not None:
            parameters.extended_working_storage.size_gb = self.working_storage_gb
            parameters.extended_working_storage.type = jobs_pb2.ExtendedWorkingStorage.StorageType.SSD
        if self.graceful_shutdown is not None:
            number, timeout = self.graceful_shutdown
            shutdown = parameters.graceful_shutdown_parameters
            shutdown.signal = signal.Signals[number] if isinstance(number, str) else number
            if timeout is not None:
                shutdown.timeout.FromNanoseconds(round(timeout * 1e9))
        return parameters

    def _environment(self, contents: list[bytes]) -> jobs_pb2.Environment:
        environment = jobs_pb2.Environment(vars=self.env_vars)
        if self.local_modules or self.python_version or self.requirements:
            environment.python_env.local_modules.extend(self._local_modules(contents))
            environment.python_env.python_version = self.python_version
            environment.python_env.requirements.extend(self.requirements)
        if isinstance(self.docker, str):
            environment.docker_image_resource_id = self.docker
        elif self.docker is not None:
            environment.docker_image_spec.CopyFrom(_message("docker", jobs_pb2.DockerImageSpec, self.docker))
        return environment

    def _input_files(self, contents: list[bytes]) -> list[jobs_pb2.File]:
        files = {path: _bytes(content) for path, content in self.files.items()}
        left = dict(files)
        inputs = []
        for item in self.inputs:
            desc = _desc(item)
            if desc.path in files:
                left.pop(desc.path, None)
                inputs.append(_file(desc, files[desc.path], contents))
                continue
            inside = {path: content for path, content in files.items() if PurePosixPath(desc.path) in _parents(path)}
            if not inside:
                raise ValueError(f"inputs: {desc.path!r} is neither a file nor a directory in files.")
            for path in inside:
                left.pop(path, None)
            parent = PurePosixPath(desc.path).parent
            archive = _zip({PurePosixPath(path).relative_to(parent).as_posix(): data for path, data in inside.items()})
            inputs.append(_file(desc, archive, contents, zipped=True))
        inputs += [_file(jobs_pb2.FileDesc(path=path), content, contents) for path, content in left.items()]
        return inputs

    def _local_modules(self, contents: list[bytes]) -> list[jobs_pb2.File]:
        return [
            _file(
                jobs_pb2.FileDesc(path=f"/modules/{number}", var=f"_LOCAL_MODULE_{number}"),
                _zip({path: _bytes(content)}),
                contents,
                zipped=True,
            )
            for number, (path, content) in enumerate(self.local_modules.items())
        ]


def _message(name: str, kind: type[_Kind], fields: Mapping[str, Any]) -> _Kind:
    try:
        return kind(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}={fields!r}: {error}") from None


def _parents(path: str) -> Iterable[PurePosixPath]:
    return PurePosixPath(path).parents


def _bytes(content: bytes | str | Mapping[str, str]) -> bytes:
    if isinstance(content, bytes):
        return content
    if isinstance(content, str):
        return content.encode()
    return base64.b64decode(content["base64"])  # from the control API, where JSON has no bytes


def _desc(item: str | Iterable[str]) -> jobs_pb2.FileDesc:
    if isinstance(item, str):
        return jobs_pb2.FileDesc(path=item)
    path, var = item
    return jobs_pb2.FileDesc(path=path, var=var)


def _file(desc: jobs_pb2.FileDesc, content: bytes, contents: list[bytes], zipped: bool = False) -> jobs_pb2.File:
    contents.append(content)
    kinds = jobs_pb2.FileCompressionType
    return jobs_pb2.File(
        desc=desc,
        sha256=hashlib.sha256(content).hexdigest(),
        size_bytes=len(content),
        compression_type=kinds.ZIP if zipped else kinds.NONE,
    )


def _zip(entries: Mapping[str, bytes]) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in entries.items():
            archive.writestr(
                zipfile.ZipInfo(name), content
            )  # without the time, so that equal files give equal archives
    return target.getvalue()
