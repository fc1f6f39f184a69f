"""Checks of single values, the same when a DAG is parsed and when its task runs. Pure: no I/O.

No message repeats a value of ``env_vars`` or a password: they may be secrets.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import timedelta

from airflow_provider_datasphere.client.errors import JobRequestError

GIB = 1 << 30
INFINITY = "infinity"
#: What the SDK sends with every Create and Clone.
DEFAULT_DATA_TTL = timedelta(days=14)
#: The longest ``google.protobuf.Duration``: 315,576,000,000 seconds.
MAX_TTL_DAYS = 3_652_500
MIN_WORKING_STORAGE_GIB = 100

#: What a template without a value renders to. Only in ``args`` and ``env_vars`` can this word be meant itself.
NONE_TEXT = "None"
_NO_VALUE = "a template renders to that when its XCom or param has no value"

_ID = re.compile(r"[0-9A-Za-z_-]+")
_JOB_PAGE = re.compile(r"https?://\S+/job/(?P<job_id>[0-9A-Za-z_-]+)[/?#]?.*", re.DOTALL)
_JOB_FILE = re.compile(r"datasphere://(?:[^@/]*@)?(?P<job_id>[0-9A-Za-z_-]+)(?:/.*)?", re.DOTALL)
_SIZE = re.compile(r"\s*(\d{1,18})\s*(KB|MB|GB|TB|PB)?\s*", re.IGNORECASE)
_UNITS = {unit: 1 << shift for unit, shift in (("KB", 10), ("MB", 20), ("GB", 30), ("TB", 40), ("PB", 50))}


def task_id_of(value: object) -> str | None:
    """Return the id of an Airflow task that was given where its output was meant (``fork`` for ``fork.output``)."""
    task_id = getattr(value, "task_id", None)
    return task_id if isinstance(task_id, str) else None


def refuse_task(field_name: str, value: object) -> None:
    """Raise JobRequestError if this is an Airflow task, where its output is meant."""
    if (task_id := task_id_of(value)) is not None:
        raise JobRequestError(f"{field_name} is the task {task_id!r} itself: give what it returns, {task_id}.output.")


def check_characters(field_name: str, text: str) -> None:
    """Raise JobRequestError if no message can carry this text: a NUL or half a surrogate pair is in it."""
    position = text.find("\0")
    if position >= 0:
        raise JobRequestError(f"{field_name} has a NUL character at position {position}: remove it.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise JobRequestError(
            f"{field_name} has {text[error.start]!r} at position {error.start}, a byte that isn't UTF-8 or half a "
            "character: DataSphere takes valid Unicode only."
        ) from None


def check_text(field_name: str, text: object) -> None:
    """Raise JobRequestError unless this is text other than the word "None", or ``None`` itself."""
    if text is None:
        return
    refuse_task(field_name, text)
    if not isinstance(text, str):
        raise JobRequestError(f"{field_name} is {text!r} ({type(text).__name__}): give a string.")
    if text == NONE_TEXT:
        raise JobRequestError(f"{field_name} is 'None': {_NO_VALUE}. Give a string, or leave {field_name} out.")
    check_characters(field_name, text)


def check_job_id(field_name: str, job_id: object, hint: str) -> None:
    """Raise JobRequestError unless this can be a job's id; no job's id has blanks or quotes.

    :param hint: what to give instead: "give the id of …".
    """
    refuse_task(field_name, job_id)
    if isinstance(job_id, str) and job_id != NONE_TEXT and _ID.fullmatch(job_id):
        return
    raise JobRequestError(f"{field_name} is {_not_a_job_id(job_id, hint)}")


def _not_a_job_id(job_id: object, hint: str) -> str:
    if job_id is None or job_id == NONE_TEXT:
        return f"{job_id!r}: {hint}. The task that should give it hasn't run, or returned nothing."
    if isinstance(job_id, (list, tuple)):
        return f"{job_id!r}: {hint}. A mapped task returns a list of ids: map over it with .expand()."
    if not isinstance(job_id, str):
        return f"{job_id!r}: {hint}."
    if "…" in job_id or "..." in job_id:
        return (
            f"still the placeholder {job_id!r}: put the id of a job that has run. It is in the address of the job's "
            "page, and `datasphere project job list` shows it."
        )
    if page := _JOB_PAGE.fullmatch(job_id):
        return f"{job_id!r}, the address of the job's page: write {page['job_id']!r}."
    if file := _JOB_FILE.fullmatch(job_id):
        return f"{job_id!r}, the URI of a job's file: write {file['job_id']!r}."
    if job_id.startswith(("[", "(", "Lazy")):
        return f"{job_id!r}, a list as text: give the output of the mapped task itself (fork.output), not a template."
    bare = job_id.strip().strip("'\"")
    if _ID.fullmatch(bare) and bare != NONE_TEXT:
        return f"{job_id!r}, with blanks, line ends or quotes around it: write {bare!r}."
    return f"{job_id!r}: {hint}."


def parse_operation_id(operation_id: object) -> str | None:
    """Return the id of an operation; ``None`` where there is none, as in a template whose XCom has no value.

    :raises JobRequestError: it can't be an operation's id.
    """
    if operation_id is None or operation_id in ("", NONE_TEXT):
        return None
    if (task_id := task_id_of(operation_id)) is not None:
        raise JobRequestError(
            f"operation_id is the task {task_id!r} itself: give its XCom, {task_id}.output['operation_id']."
        )
    if not isinstance(operation_id, str) or not _ID.fullmatch(operation_id):
        raise JobRequestError(
            f"operation_id is {operation_id!r}: give the XCom operation_id of the task that started the job, such as "
            "fork.output['operation_id'], or leave it out."
        )
    return operation_id


def check_strings(field_name: str, values: object) -> None:
    """Raise JobRequestError unless this is a mapping of strings to strings.

    :param field_name: ``args``, ``vars``, ``inputs`` or ``env_vars``.
    """
    refuse_task(field_name, values)
    if not isinstance(values, Mapping):
        shown = type(values).__name__ if field_name == "env_vars" else repr(values)
        native = ""
        if isinstance(values, str) and values.lstrip().startswith("{"):
            native = " A template gives one only in a DAG with render_template_as_native_obj=True."
        raise JobRequestError(f"{field_name} is {shown}: give a mapping of names to strings.{native}")
    for name, value in values.items():
        if not isinstance(name, str) or not name:
            raise JobRequestError(f"{field_name} has the name {name!r}: names are non-empty strings.")
        if field_name == "env_vars" and ("=" in name or "\0" in name):
            raise JobRequestError(f"{field_name} has the name {name!r}: no environment variable can be called that.")
        check_characters(f"The name {name!r} in {field_name}", name)
        _check_value(field_name, f"{field_name}[{name!r}]", value)


def _check_value(field_name: str, label: str, value: object) -> None:
    refuse_task(label, value)
    if value is None:
        keep = " to keep the source job's value" if field_name != "env_vars" else ""
        raise JobRequestError(f"{label} is None: leave it out{keep}, or give a string ({_NO_VALUE}).")
    if not isinstance(value, str):
        kind = type(value).__name__
        if field_name == "env_vars":
            raise JobRequestError(f"{label} is of the type {kind}: DataSphere takes strings.")
        write = f"; write {str(value)!r}" if isinstance(value, (int, float)) else ""
        raise JobRequestError(f"{label} is {value!r} ({kind}): DataSphere takes strings{write}.")
    if field_name in ("vars", "inputs") and value == NONE_TEXT:
        raise JobRequestError(f"{label} is 'None': {_NO_VALUE}. Give a path or a URI, or leave it out.")
    check_characters(label, value)


def check_instance_types(types: object) -> None:
    """Raise JobRequestError unless this is a sequence of instance type names."""
    refuse_task("cloud_instance_types", types)
    if isinstance(types, str):
        raise JobRequestError(f"cloud_instance_types is {types!r}: give a list, such as [{types!r}].")
    if not isinstance(types, Sequence) or not all(
        isinstance(name, str) and name and name != NONE_TEXT for name in types
    ):
        raise JobRequestError(f"cloud_instance_types is {types!r}: give a list of names, such as ['g1.1', 'c1.4'].")
    for index, name in enumerate(types):
        check_characters(f"cloud_instance_types[{index}]", name)


def parse_ttl(field_name: str, ttl: timedelta | int | str | None) -> timedelta | None:
    """Return a time to live as the API takes it: whole days, or ``None`` for infinity.

    ``None`` as input means the default of 14 days. A number may be text, as a template makes it.
    """
    if ttl is None:
        return DEFAULT_DATA_TTL
    refuse_task(field_name, ttl)
    if isinstance(ttl, str) and ttl.strip().lower() in (INFINITY, "inf"):
        return None
    days = 0
    if isinstance(ttl, str) and ttl.strip().isdecimal():
        digits = ttl.strip().lstrip("0") or "0"
        # int() raises an error of its own for thousands of digits.
        days = int(digits[:10])
    elif isinstance(ttl, int) and not isinstance(ttl, bool):
        days = ttl
    elif isinstance(ttl, timedelta) and not ttl % timedelta(days=1):
        days = ttl.days
    if days > MAX_TTL_DAYS:
        raise JobRequestError(
            f"{field_name} is longer than the API can express: give at most {MAX_TTL_DAYS} days, or {INFINITY!r}."
        )
    if days >= 1:
        return timedelta(days=days)
    raise JobRequestError(
        f"{field_name} is {ttl!r}: give a timedelta of one or more whole days, such as timedelta(days=30), "
        f"a number of days, or {INFINITY!r}."
    )


def check_docker(docker: object) -> None:
    """Raise JobRequestError unless this is an image id or name, a mapping that describes an image, or ``None``."""
    if docker is None or isinstance(docker, str):
        return check_text("docker", docker)
    refuse_task("docker", docker)
    if not isinstance(docker, Mapping):
        raise JobRequestError(f"docker is {docker!r}: give an image id or name, or {{'image': …, 'username': …}}.")
    image = docker.get("image")
    if set(docker) - {"image", "username", "password"} or not isinstance(image, str) or not image:
        keys = ", ".join(repr(key) for key in docker)
        raise JobRequestError(
            f"docker has the keys [{keys}]: 'image' is needed; 'username' and 'password' may be given."
        )
    check_text("docker['image']", image)
    check_text("docker['username']", docker.get("username"))
    password = docker.get("password")
    if isinstance(password, str):
        raise JobRequestError(
            "docker['password'] is plain text: DataSphere takes the name of a project secret, "
            "{'secret-id': '<name>'}, so that the password stays out of the DAG."
        )
    if password is None:
        return None
    name = password.get("secret-id") if isinstance(password, Mapping) else None
    if not isinstance(name, str) or not name:
        raise JobRequestError("docker['password'] must be {'secret-id': '<name of a project secret>'}.")
    return check_text("docker['password']['secret-id']", name)


def parse_size(field_name: str, size: object) -> int:
    """Return the bytes of ``100`` or ``'100GB'`` (binary multiples, as the SDK reads them)."""
    if type(size) is int and size >= 0:
        return size
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if match is None:
        raise JobRequestError(f"{field_name} is {size!r}: give bytes, or a whole number with KB, MB, GB, TB or PB.")
    number, unit = match.groups()
    return int(number) * (_UNITS[unit.upper()] if unit else 1)


def parse_working_storage(storage: object) -> int | None:
    """Return the size of extended working storage as the API takes it: GiB, rounded up."""
    if storage is None:
        return None
    refuse_task("working_storage", storage)
    if not isinstance(storage, Mapping) or "size" not in storage or set(storage) - {"type", "size"}:
        raise JobRequestError(f"working_storage is {storage!r}: give {{'size': '100GB'}}, 'type' may be 'SSD'.")
    if storage.get("type", "SSD") != "SSD":
        raise JobRequestError(f"working_storage['type'] is {storage['type']!r}: DataSphere offers 'SSD'.")
    size_gib = -(-parse_size("working_storage['size']", storage["size"]) // GIB)
    if size_gib < MIN_WORKING_STORAGE_GIB:
        raise JobRequestError(f"working_storage['size'] is {storage['size']!r}: at least {MIN_WORKING_STORAGE_GIB}GB.")
    if size_gib >= 1 << 63:
        raise JobRequestError(f"working_storage['size'] is {storage['size']!r}: that is more than the API can express.")
    return size_gib
