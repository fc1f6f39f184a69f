"""The folder a program runs in: made from the job's parameters, and searched for outputs afterwards.

Everything here blocks and is called in a thread.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import shlex
import shutil
import string
import sys
import zipfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from yandex.cloud.datasphere.v2.jobs import jobs_pb2

from datasphere_emulator.iam import new_id
from datasphere_emulator.parameters import PROJECT_HOME, references, replace_references

if TYPE_CHECKING:
    from datasphere_emulator.settings import Settings
    from datasphere_emulator.storage import Storage

#: File of the folder in which a program writes its progress.
PROGRESS_FILE = "progress.jsonl"


@dataclasses.dataclass
class Workspace:
    """One execution's folder.

    :param folder: holds the program's working folder ``job`` and what the runner writes.
    :param project_folder: the project's disk, S3 connectors and datasets.
    :param owner: process id without which the program must not live, None if it may outlive the emulator.
    """

    folder: Path
    project_folder: Path
    project_id: str
    parameters: jobs_pb2.JobParameters
    storage: Storage
    settings: Settings
    owner: int | None

    @property
    def job_folder(self) -> Path:
        """The program's working folder."""
        return self.folder / "job"

    # Before the program

    def prepare(self, service_agent_token: str) -> None:
        """Make the folder anew, with all inputs, and write the runner's ``spec.json``."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for name in ("job", "home", "tmp", "bin"):
            (self.folder / name).mkdir(parents=True)
        for name in ("stdout", "stderr"):
            (self.folder / name).touch()
        (self.folder / "token").write_text(service_agent_token)
        names: dict[str, str] = {argument.name: argument.value for argument in self.parameters.arguments}
        for file in self.parameters.input_files:
            place = self._place_of(file.desc)
            self._bring(file, place)
            if file.desc.var:
                names[file.desc.var] = str(place)
        for module in self.parameters.env.python_env.local_modules:
            self._bring_module(module)
        for kind, ids in (("s3", self.parameters.s3_mount_ids), ("datasets", self.parameters.dataset_ids)):
            for id in ids:
                names[id] = str(self._mount(kind, id))
        outputs = {}
        for desc in self.parameters.output_files:
            place = self._output_place(desc)
            outputs[desc.path] = str(place)
            if desc.var:
                relative = PurePosixPath(desc.path)
                names[desc.var] = desc.path if place == self.job_folder / relative else str(place)
        datasets = {}
        for dataset in self.parameters.output_datasets:
            place = self.job_folder / "datasets" / dataset.name
            place.mkdir(parents=True)
            names[dataset.var] = str(place)
            datasets[dataset.name] = {"place": str(place), "id": new_id("bt1")}
        home = self.project_folder / "home"
        home.mkdir(parents=True, exist_ok=True)
        names[PROJECT_HOME] = str(home)
        if self.settings.quote_substitutions:
            names = {name: shlex.quote(value) for name, value in names.items()}
        assert all(name in names for name in references(self.parameters.cmd))
        spec = {
            "command": [shutil.which("bash") or "/bin/sh", "-c", replace_references(self.parameters.cmd, names)],
            "cwd": str(self.job_folder),
            "env": self._environment(home),
            "owner": self.owner,
            "outputs": outputs,
            "datasets": datasets,
        }
        (self.folder / "spec.json").write_text(json.dumps(spec))

    def _random_name(self, var: str) -> str:
        """An unpredictable name derived from a variable, such as ``data_7l2``."""
        alphabet = string.ascii_lowercase + string.digits
        stem = "".join(letter for letter in var.lower() if letter in alphabet + "_-") or "file"
        return f"{stem}_{''.join(secrets.choice(alphabet) for _ in range(3))}"

    def _place_of(self, desc: jobs_pb2.FileDesc) -> Path:
        if desc.var:
            return self.job_folder / self._random_name(desc.var)
        return self.job_folder / desc.path

    def _output_place(self, desc: jobs_pb2.FileDesc) -> Path:
        path = PurePosixPath(desc.path)
        # A named output may have a path of the client's machine; the program gets another one inside the job.
        if path.is_absolute() or ".." in path.parts:
            return self.job_folder / self._random_name(desc.var)
        return self.job_folder / path

    def _bring(self, file: jobs_pb2.File, place: Path) -> None:
        blob = self.storage.path(self.project_id, file.sha256)
        place.parent.mkdir(parents=True, exist_ok=True)
        if file.compression_type != jobs_pb2.FileCompressionType.ZIP:
            shutil.copyfile(blob, place)
            place.chmod(0o755)
            return
        # Names in the archive are relative to the parent of the directory: all begin with its own name.
        unpacked = self.folder / "tmp" / "unpacked"
        with zipfile.ZipFile(blob) as archive:
            archive.extractall(unpacked)
        tops = list(unpacked.iterdir()) if unpacked.exists() else []
        if not tops:
            place.mkdir()
        elif place.is_dir():
            shutil.copytree(tops[0], place, dirs_exist_ok=True)
        else:
            tops[0].rename(place)
        shutil.rmtree(unpacked, ignore_errors=True)

    def _bring_module(self, module: jobs_pb2.File) -> None:
        blob = self.storage.path(self.project_id, module.sha256)
        if module.compression_type == jobs_pb2.FileCompressionType.ZIP:
            with zipfile.ZipFile(blob) as archive:
                archive.extractall(self.job_folder)
        else:
            shutil.copyfile(blob, self.job_folder / PurePosixPath(module.desc.path).name)

    def _mount(self, kind: str, id: str) -> Path:
        target = self.project_folder / kind / id
        target.mkdir(parents=True, exist_ok=True)
        place = self.job_folder / kind / id
        place.parent.mkdir(exist_ok=True)
        place.symlink_to(target)
        return place

    def _environment(self, home: Path) -> dict[str, str]:
        for name in ("python", "python3"):
            # A script, not a link: a link would hide the virtual environment from the interpreter.
            shim = self.folder / "bin" / name
            shim.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
            shim.chmod(0o755)
        path = [str(self.folder / "bin"), str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
        environment = {
            "PATH": os.pathsep.join(path),
            "HOME": str(self.folder / "home"),
            "TMPDIR": str(self.folder / "tmp"),
            "LANG": "C.UTF-8",
            "PYTHONPATH": str(self.job_folder),
        }
        if self.settings.unbuffered_python:
            environment["PYTHONUNBUFFERED"] = "1"
        environment.update(self.settings.job_environment)
        environment.update(self.settings.project_secrets)
        environment.update(self.parameters.env.vars)
        if self.parameters.attach_project_disk:
            environment[PROJECT_HOME] = str(home)
        environment["JOB_PROGRESS_FILENAME"] = str(self.folder / PROGRESS_FILE)
        environment["SA_TOKEN_FILENAME"] = str(self.folder / "token")
        return environment

    # After the program

    def collect_outputs(self) -> tuple[list[jobs_pb2.File], list[jobs_pb2.FileUploadError]]:
        """Store the declared outputs that are there; the others become NOT_FOUND errors."""
        places: dict[str, str] = json.loads((self.folder / "spec.json").read_text())["outputs"]
        files, errors = [], []
        for desc in self.parameters.output_files:
            place = Path(places[desc.path])
            if place.is_dir():
                archive = self.folder / "tmp" / "output.zip"
                archive.parent.mkdir(exist_ok=True)
                pack_directory(place, PurePosixPath(desc.path).name, archive)
                files.append(self._stored(desc, archive, jobs_pb2.FileCompressionType.ZIP))
                archive.unlink()
            elif place.is_file():
                files.append(self._stored(desc, place, jobs_pb2.FileCompressionType.NONE))
            else:
                errors.append(
                    jobs_pb2.FileUploadError(
                        output_file_desc=desc,
                        description=f"File {desc.path} is not found.",
                        type=jobs_pb2.FileUploadError.ErrorType.NOT_FOUND,
                    )
                )
        return files, errors

    def collect_datasets(self) -> list[jobs_pb2.OutputDataset]:
        """Move what the program wrote for output datasets into new datasets of the project."""
        made: dict[str, dict[str, str]] = json.loads((self.folder / "spec.json").read_text())["datasets"]
        datasets = []
        for desc in self.parameters.output_datasets:
            dataset = jobs_pb2.OutputDataset(desc=desc, id=made[desc.name]["id"])
            target = self.project_folder / "datasets" / dataset.id
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():  # it does after a restart in the middle of this
                shutil.move(made[desc.name]["place"], target)
            datasets.append(dataset)
        return datasets

    def store_file(self, name: str, path: Path) -> jobs_pb2.File:
        """Store a log or diagnostic file under this name."""
        return self._stored(jobs_pb2.FileDesc(path=name), path, jobs_pb2.FileCompressionType.NONE)

    def _stored(
        self, desc: jobs_pb2.FileDesc, path: Path, compression: jobs_pb2.FileCompressionType.ValueType
    ) -> jobs_pb2.File:
        sha256, size = self.storage.put_file(self.project_id, path)
        return jobs_pb2.File(desc=desc, sha256=sha256, size_bytes=size, compression_type=compression)

    def remove_scratch(self) -> None:
        """Remove all but what the job's log refers to."""
        for name in ("job", "home", "tmp", "bin"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        (self.folder / "token").unlink(missing_ok=True)


def pack_directory(directory: Path, name: str, archive: Path) -> None:
    """Zip a directory as the service does: stored, not deflated; names begin with the directory's own."""
    with zipfile.ZipFile(archive, "w", strict_timestamps=False) as target:
        target.writestr(f"{name}/", b"")
        for path in sorted(directory.rglob("*")):
            target.write(path, PurePosixPath(name) / path.relative_to(directory).as_posix())
