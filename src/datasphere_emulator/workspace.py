"""The folder of an execution: prepared from the job's parameters, and collected from after the program's end.

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
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from yandex.cloud.datasphere.v2.jobs import jobs_pb2

from datasphere_emulator.iam import new_id
from datasphere_emulator.outputs import (
    PROCESSING_ERROR,
    UnusableOutput,
    is_directory,
    missing_output,
    pack_directory,
    upload_error,
)
from datasphere_emulator.parameters import PROJECT_HOME, references, replace_references

if TYPE_CHECKING:
    from datasphere_emulator.settings import Settings
    from datasphere_emulator.storage import Storage

#: File in the folder to which a program writes its progress.
PROGRESS_FILE = "progress.jsonl"


@dataclasses.dataclass
class Workspace:
    """The folder of an execution.

    :param folder: folder with the program's working folder ``job`` and the files of the child runner.
    :param project_folder: folder of the project's disk, S3 connectors and datasets.
    :param owner: id of the process with which the program ends; None if it may outlive the emulator.
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
        """Create the folder with all inputs, replacing an old one, and write the child runner's ``spec.json``."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for name in ("job", "home", "tmp", "bin"):
            (self.folder / name).mkdir(parents=True)
        for name in ("stdout", "stderr"):
            (self.folder / name).touch()
        (self.folder / "token").write_text(service_agent_token)
        names: dict[str, str] = {argument.name: argument.value for argument in self.parameters.arguments}
        for file in self.parameters.input_files:
            place = self._input_path(file.desc)
            self._extract(file, place)
            if file.desc.var:
                names[file.desc.var] = str(place)
        for module in self.parameters.env.python_env.local_modules:
            self._extract_module(module)
        for kind, ids in (("s3", self.parameters.s3_mount_ids), ("datasets", self.parameters.dataset_ids)):
            for id in ids:
                names[id] = str(self._mount(kind, id))
        outputs = {}
        for desc in self.parameters.output_files:
            place = self._output_path(desc)
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
        """Return an unpredictable name derived from a variable, such as ``data_7l2``."""
        alphabet = string.ascii_lowercase + string.digits
        stem = "".join(letter for letter in var.lower() if letter in alphabet + "_-") or "file"
        return f"{stem}_{''.join(secrets.choice(alphabet) for _ in range(3))}"

    def _input_path(self, desc: jobs_pb2.FileDesc) -> Path:
        if desc.var:
            return self.job_folder / self._random_name(desc.var)
        return self.job_folder / desc.path

    def _output_path(self, desc: jobs_pb2.FileDesc) -> Path:
        path = PurePosixPath(desc.path)
        # A named output may have a path on the client's machine; the program gets another one inside the job.
        if path.is_absolute() or ".." in path.parts:
            return self.job_folder / self._random_name(desc.var)
        return self.job_folder / path

    def _extract(self, file: jobs_pb2.File, place: Path) -> None:
        blob = self.storage.path(self.project_id, file.sha256)
        place.parent.mkdir(parents=True, exist_ok=True)
        if file.compression_type != jobs_pb2.FileCompressionType.ZIP:
            shutil.copyfile(blob, place)
            place.chmod(0o755)
            return
        # Names in the archive begin with the directory's own name.
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

    def _extract_module(self, module: jobs_pb2.File) -> None:
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
        interpreter = _interpreter(self.parameters.env.python_env.python_version)
        for name in ("python", "python3"):
            # A script, since a link would hide the virtual environment from the interpreter.
            shim = self.folder / "bin" / name
            shim.write_text(f'#!/bin/sh\nexec {shlex.quote(interpreter)} "$@"\n')
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
        """Store the declared outputs; return the stored files, and errors of missing and unusable outputs."""
        places: dict[str, str] = json.loads((self.folder / "spec.json").read_text())["outputs"]
        files, errors = [], []
        for desc in self.parameters.output_files:
            place = Path(places[desc.path])
            if not os.path.lexists(place):
                errors.append(missing_output(desc))
                continue
            try:
                files.append(self._collect_output(desc, place))
            except UnusableOutput as error:
                errors.append(upload_error(desc, "UPLOAD_FAILED", f"{PROCESSING_ERROR}: {error}"))
            except OSError as error:
                # Unreadable, or no space left: the other outputs may still be stored.
                errors.append(upload_error(desc, "UPLOAD_FAILED", f"{PROCESSING_ERROR}: {error.strerror}"))
        return files, errors

    def _collect_output(self, desc: jobs_pb2.FileDesc, place: Path) -> jobs_pb2.File:
        if not is_directory(place, desc.path):
            return self._stored(desc, place, jobs_pb2.FileCompressionType.NONE)
        archive = self.folder / "tmp" / "output.zip"
        archive.parent.mkdir(exist_ok=True)
        try:
            pack_directory(place, PurePosixPath(desc.path).name, archive)
            return self._stored(desc, archive, jobs_pb2.FileCompressionType.ZIP)
        finally:
            archive.unlink(missing_ok=True)

    def collect_datasets(self) -> list[jobs_pb2.OutputDataset]:
        """Move the output datasets of the program to the project."""
        made: dict[str, dict[str, str]] = json.loads((self.folder / "spec.json").read_text())["datasets"]
        datasets = []
        for desc in self.parameters.output_datasets:
            dataset = jobs_pb2.OutputDataset(desc=desc, id=made[desc.name]["id"])
            target = self.project_folder / "datasets" / dataset.id
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():  # moved already before a restart
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
        """Remove everything except the files of the job's log."""
        for name in ("job", "home", "tmp", "bin"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        (self.folder / "token").unlink(missing_ok=True)


def _interpreter(version: str) -> str:
    """Return the Python of a version such as ``3.12``, where this machine has it; otherwise the emulator's own."""
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    found = None if version in ("", own) else shutil.which(f"python{version}")
    if found is None:
        return sys.executable
    # Version managers leave commands in the path that only say that there is no such version.
    done = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=30)
    return found if done.stdout.startswith(f"Python {version}.") else sys.executable
