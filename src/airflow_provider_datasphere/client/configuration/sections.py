"""From a document to the value of a job: each section by the rules of the official SDK's parser, faults collected."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from airflow_provider_datasphere.client.configuration.instance_types import unknown_type
from airflow_provider_datasphere.client.configuration.job_config import (
    DEFAULT_INSTANCE_TYPE,
    PROJECT_DISK_FLAG,
    GracefulShutdown,
    JobConfig,
    OutputDataset,
)
from airflow_provider_datasphere.client.configuration.python_section import read_python
from airflow_provider_datasphere.client.configuration.section import Reader, plain_text_entries
from airflow_provider_datasphere.client.errors import JobRequestError
from airflow_provider_datasphere.client.validation import GIB, MIN_WORKING_STORAGE_GIB, parse_size

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.configuration.document import Value

KEYS = (
    "name",
    "desc",
    "cmd",
    "args",
    "inputs",
    "outputs",
    "s3-mounts",
    "datasets",
    "env",
    "flags",
    "cloud-instance-types",
    "cloud-instance-type",
    "working-storage",
    "output-datasets",
    "graceful-shutdown",
    "spark",
)
SIGNALS = {"SIGHUP": 1, "SIGINT": 2, "SIGUSR1": 10, "SIGUSR2": 12, "SIGTERM": 15}
_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?(?:(\d+)ms)?")
_DURATION_UNITS = (86400.0, 3600.0, 60.0, 1.0, 0.001)
#: A duration that a message can carry, seconds.
_MAX_SECONDS = 315_576_000_000


def read_sections(document: Value, reader: Reader) -> JobConfig:
    """Return the job that the document describes, as far as it could be read; its parts are not compared yet."""
    keys = reader.mapping(document, KEYS, hint="write cmd: and other keys")
    cmd = _cmd(keys.get("cmd"), document, reader)
    env = reader.mapping(keys.get("env"), ("vars", "docker", "python"), hint="give vars, docker or python")
    spark = _spark(keys.get("spark"), reader)
    docker = _docker(env.get("docker"), reader)
    if spark and docker:
        reader.faults.add(env["docker"].place, "Spark doesn't run in an image of one's own: remove docker or spark.")
    return JobConfig(
        cmd=cmd,
        name=reader.text(keys.get("name")),
        desc=reader.text(keys.get("desc")),
        args=plain_text_entries(reader, keys.get("args"), hint="write NAME: value"),
        inputs=reader.paths(keys.get("inputs")),
        outputs=reader.paths(keys.get("outputs")),
        s3_mounts=reader.paths(keys.get("s3-mounts")),
        datasets=reader.paths(keys.get("datasets")),
        env_vars=_env_vars(env.get("vars"), reader),
        docker=docker,
        python=read_python(env.get("python"), cmd, reader),
        attach_project_disk=_flags(keys.get("flags"), reader),
        cloud_instance_types=_instance_types(keys, reader),
        working_storage_gib=_working_storage(keys.get("working-storage"), reader),
        output_datasets=_output_datasets(keys.get("output-datasets"), reader),
        graceful_shutdown=_graceful_shutdown(keys.get("graceful-shutdown"), reader),
        spark_connector=spark,
        base_dir=reader.base_dir,
    )


def _cmd(value: Value | None, document: Value, reader: Reader) -> str:
    if value is None:
        reader.faults.add(document.place, "cmd is missing: give the command that the job runs.")
        return ""
    cmd = reader.text(value, hint="give the command as one text")
    if not cmd.strip():
        if not isinstance(value.content, (list, dict)):
            reader.faults.add(value.place, "this is empty: give the command that the job runs.")
        return ""
    if value.style == ">":
        if re.search(r"\n[ \t]", cmd.strip()):
            reader.faults.warn(
                value.place,
                "lines of this folded text (>) are indented unequally, so that line ends stay between them and the "
                "shell runs several commands: indent all equally, or write cmd: |.",
            )
        if re.search(r"\\\s", cmd.strip()):
            reader.faults.warn(
                value.place,
                "folded lines are joined by a blank, so that a backslash at a line's end becomes part of an argument: "
                "remove the backslashes, or write cmd: |.",
            )
    return cmd


def _env_vars(value: Value | None, reader: Reader) -> Mapping[str, str]:
    hint = "write '- NAME: value', or '- NAME' for the value on this machine"
    if value is not None and isinstance(value.content, dict):
        return plain_text_entries(reader, value, hint=hint)
    variables: dict[str, str] = {}
    for item in reader.items(value, hint=hint):
        if isinstance(item.content, dict):
            if len(item.content) != 1:
                names = ", ".join(item.content)
                reader.faults.add(item.place, f"one entry has {len(item.content)} variables ({names}): {hint}.")
            entries: Mapping[str, str | None] = plain_text_entries(reader, item, hint=hint)
        elif isinstance(item.content, list) or not item.text:
            reader.faults.add(item.place, f"this is {item.kind}: {hint}.")
            continue
        else:
            entries = {item.text: os.environ.get(item.text) if reader.is_final(item.text) else ""}
        for name, text in entries.items():
            if text is None:
                tell = reader.faults.warn if reader.early else reader.faults.add
                tell(item.place, f"the environment of this machine has no variable {name}: write '- {name}: value'.")
            elif name in variables:
                reader.faults.add(item.place, f"the variable {name} is given twice: keep one.")
            else:
                variables[name] = text
    return variables


def _docker(value: Value | None, reader: Reader) -> str | dict[str, Any] | None:
    if value is None:
        return None
    hint = "give an image's resource id or system name, or image, username and password"
    if not isinstance(value.content, dict):
        return reader.text(value, hint=hint) or None
    entries = reader.mapping(value, ("image", "username", "password"), hint=hint)
    image, username = reader.text(entries.get("image")), reader.text(entries.get("username"))
    if not image:
        reader.faults.add(value.place, f"image is missing: {hint}.")
    docker: dict[str, Any] = {"image": image}
    if username:
        docker["username"] = username
    password = entries.get("password")
    if password is None or password.content in (None, ""):
        return docker
    if not isinstance(password.content, dict):
        reader.faults.add(
            password.place,
            "a password must not stand here in plain text: make a secret of the DataSphere project, and write "
            "'password: {secret-id: NAME}'.",
        )
        return docker
    secret = reader.text(reader.mapping(password, ("secret-id",), hint="give secret-id").get("secret-id"))
    if not secret:
        reader.faults.add(password.place, "secret-id is missing: give the name of a secret of the project.")
    return {**docker, "password": {"secret-id": secret}}


def _flags(value: Value | None, reader: Reader) -> bool:
    flags = list(reader.texts(value, hint=f"write '- {PROJECT_DISK_FLAG}'"))
    for flag in flags:
        if flag.text != PROJECT_DISK_FLAG and reader.is_final(flag.text):
            reader.faults.add(flag.place, f"unknown flag {flag.text!r}: there is one, {PROJECT_DISK_FLAG}.")
    return any(flag.text == PROJECT_DISK_FLAG for flag in flags)


def _instance_types(keys: Mapping[str, Value], reader: Reader) -> Sequence[str]:
    given = [keys[key] for key in ("cloud-instance-types", "cloud-instance-type") if key in keys]
    value = next((one for one in given if one.content not in (None, "", [])), None)
    if value is None:
        return (DEFAULT_INSTANCE_TYPE,)
    hint = "write '- c1.4', best first"
    texts = [value] if isinstance(value.content, str) else list(reader.texts(value, hint=hint))
    for text in texts:
        if reader.is_final(text.text) and (warning := unknown_type(text.text)):
            reader.faults.warn(text.place, warning)
    return tuple(text.text for text in texts) or (DEFAULT_INSTANCE_TYPE,)


def _size(value: Value, reader: Reader) -> int | None:
    """Return bytes; ``None`` where they can't be known."""
    text = reader.text(value, hint="give a size such as 100GB")
    if not text or not reader.is_final(text):
        return None
    try:
        return parse_size(value.place.field, int(text) if text.isdecimal() else text)
    except (JobRequestError, ValueError):
        reader.faults.add(
            value.place, f"{text!r} is no size: give a whole number with KB, MB, GB, TB or PB, such as 100GB, or bytes."
        )
        return None


def _working_storage(value: Value | None, reader: Reader) -> int | None:
    if value is None:
        return None
    hint = "write size: 100GB"
    entries = reader.mapping(value, ("type", "size"), hint=hint)
    kind = reader.text(entries.get("type")) or "SSD"
    if kind != "SSD" and reader.is_final(kind):
        reader.faults.add(entries["type"].place, f"{kind!r}: DataSphere offers SSD.")
    if "size" not in entries:
        reader.faults.add(value.place, f"size is missing: {hint}.")
        return None
    size = _size(entries["size"], reader)
    if size is None:
        if not entries["size"].text:
            reader.faults.add(entries["size"].place, f"this is empty: {hint}.")
        return None
    gib = -(-size // GIB)
    if gib < MIN_WORKING_STORAGE_GIB:
        reader.faults.add(
            entries["size"].place, f"{entries['size'].text} is too small: at least {MIN_WORKING_STORAGE_GIB}GB."
        )
    return gib


def _output_datasets(value: Value | None, reader: Reader) -> list[OutputDataset]:
    hint = "each needs name, var and size"
    datasets: list[OutputDataset] = []
    for item in reader.items(value, hint=hint):
        if not isinstance(item.content, dict):
            reader.faults.add(item.place, f"this is {item.kind}: {hint}.")
            continue
        entries = reader.mapping(item, ("name", "var", "size", "description", "labels"), hint=hint)
        name, var = reader.text(entries.get("name")), reader.text(entries.get("var"))
        for key in ("name", "var", "size"):
            if key not in entries or entries[key].content in (None, ""):
                reader.faults.add(item.place, f"{key} is missing: {hint}.")
        if var and reader.is_final(var):
            reader.check_name(var, entries["var"].place)
        if name and any(name == other.name for other in datasets):
            reader.faults.add(entries["name"].place, f"there are two datasets named {name!r}: give another name.")
        size = _size(entries["size"], reader) if "size" in entries else None
        datasets.append(
            OutputDataset(
                name=name,
                var=var,
                size_gib=(size or 0) // GIB,
                description=reader.text(entries.get("description")),
                labels=plain_text_entries(reader, entries.get("labels"), hint="write NAME: value"),
                place=item.place,
            )
        )
    return datasets


def _graceful_shutdown(value: Value | None, reader: Reader) -> GracefulShutdown | None:
    if value is None:
        return None
    entries = reader.mapping(value, ("signal", "timeout"), hint="write timeout: 30s")
    signal = reader.text(entries.get("signal")) or "SIGTERM"
    if signal not in SIGNALS and reader.is_final(signal):
        reader.faults.add(entries["signal"].place, f"{signal!r} can't be sent: give one of {', '.join(SIGNALS)}.")
    timeout = reader.text(entries.get("timeout"))
    match = _DURATION.fullmatch(timeout)
    seconds: float | None = None
    if match is not None:
        seconds = sum(int(number) * unit for number, unit in zip(match.groups("0"), _DURATION_UNITS, strict=True))
    if reader.is_final(timeout) and (seconds is None or seconds > _MAX_SECONDS):
        example = f"{timeout}s" if timeout.isdecimal() else "1h30m or 30s"
        reader.faults.add(entries["timeout"].place, f"{timeout!r} is no duration: write it as {example}.")
    return GracefulShutdown(SIGNALS.get(signal, 15), int(seconds) if seconds else None)


def _spark(value: Value | None, reader: Reader) -> str:
    if value is None:
        return ""
    hint = "write 'connector: <id>'"
    entries = reader.mapping(value, ("connector",), hint=hint)
    connector = entries.get("connector")
    if connector is not None and isinstance(connector.content, dict):
        connector = reader.mapping(connector, ("id",), hint="give id").get("id")
    text = reader.text(connector, hint=hint)
    if not text:
        reader.faults.add(value.place, f"the connector's id is missing: {hint}.")
    return text
