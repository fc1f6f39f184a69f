"""Values between a task and its function in a job: JSON, and tags for what JSON hasn't.

Shipped with each job as it is: standard library only, Python 3.8 and newer.
"""

import base64
import math
from collections.abc import Mapping, Sequence
from datetime import date, datetime, timedelta
from decimal import Decimal
from pathlib import PurePath, PurePosixPath
from typing import Any
from uuid import UUID

#: The key that marks a tagged value.
TAG = "__datasphere__"

_PLAIN = (type(None), bool, str)


class UnsupportedValueError(TypeError):
    """A value can't be passed; the message names where it stands, and the way out."""


def encode(value: Any, where: str) -> Any:
    """Return a value as JSON has it.

    :param where: its name in messages: ``rows``.
    :raises UnsupportedValueError: it can't be passed.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        text = str(value)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UnsupportedValueError("%s holds half a character, which no message can carry." % where) from None
        return text
    if isinstance(value, int) and type(value).__module__ in ("builtins",):
        return int(value)
    if isinstance(value, float) and type(value).__module__ == "builtins":
        if not math.isfinite(value):
            raise UnsupportedValueError("%s is %r, which JSON hasn't: pass None or a text." % (where, value))
        return value
    tagged = _tagged(value)
    if tagged is not None:
        return {TAG: tagged[0], "value": tagged[1]}
    if isinstance(value, Mapping):
        return _encode_mapping(value, where)
    if isinstance(value, tuple) and type(value) is tuple:
        return {TAG: "tuple", "value": [encode(part, "%s[%d]" % (where, n)) for n, part in enumerate(value)]}
    if isinstance(value, Sequence) and not isinstance(value, (bytearray, memoryview, range)):
        # Airflow's lazy results of mapped tasks too.
        return [encode(part, "%s[%d]" % (where, n)) for n, part in enumerate(value)]
    raise UnsupportedValueError(_refusal(value, where))


def _tagged(value: Any) -> Any:
    """Return the tag and the JSON of a value that JSON hasn't; None for another."""
    if type(value).__module__.split(".")[0] == "pandas":
        return None  # its timestamps are dates by their class, and aren't by their texts
    if isinstance(value, datetime):
        return "datetime", value.isoformat()
    if isinstance(value, date):
        return "date", value.isoformat()
    if isinstance(value, timedelta):
        return "timedelta", [value.days, value.seconds, value.microseconds]
    if isinstance(value, Decimal):
        return "Decimal", str(value)
    if isinstance(value, UUID):
        return "UUID", str(value)
    if isinstance(value, PurePath):
        return "Path", str(value)
    if type(value) is bytes:
        return "bytes", base64.b64encode(value).decode()
    return None


def _encode_mapping(value: Any, where: str) -> Any:
    entries = {}
    for key in value:
        if not isinstance(key, str):
            raise UnsupportedValueError(
                "%s has the key %r (%s), and JSON's keys are text: use text, or pass a list of pairs."
                % (where, key, type(key).__name__)
            )
        entries[str(key)] = encode(value[key], "%s[%r]" % (where, key))
    return {TAG: "dict", "value": entries} if TAG in entries else entries


def _refusal(value: Any, where: str) -> str:
    kind = "%s.%s" % (type(value).__module__, type(value).__qualname__)
    hint = "pass what JSON can hold (text, numbers, lists, mappings), or write it to a file"
    package = kind.split(".")[0]
    if package == "numpy":
        hint = "pass value.item() or value.tolist(), or write it to a file"
    elif package == "pandas":
        hint = "pass value.to_dict('records'), or write it to a file, such as Parquet"
    elif isinstance(value, (set, frozenset)):
        hint = "pass sorted(value)"
    elif isinstance(value, range):
        hint = "pass list(value)"
    elif type(value).__name__ == "module":
        hint = "import the module inside the function"
    elif callable(value):
        hint = "define it inside the function, or ship its module with modules=[…]"
    return "%s is a %s, which can't be passed: %s." % (where, kind.replace("builtins.", ""), hint)


def decode(value: Any) -> Any:
    """Return what :func:`encode` was given."""
    if isinstance(value, list):
        return [decode(part) for part in value]
    if not isinstance(value, dict):
        return value
    tag = value.get(TAG)
    if not isinstance(tag, str):
        return {key: decode(part) for key, part in value.items()}
    return _DECODERS[tag](value["value"])


_DECODERS: Any = {
    "datetime": lambda text: datetime.fromisoformat(text),
    "date": lambda text: date.fromisoformat(text),
    "timedelta": lambda parts: timedelta(*parts),
    "Decimal": Decimal,
    "UUID": UUID,
    "Path": lambda text: _path(text),
    "bytes": lambda text: base64.b64decode(text),
    "tuple": lambda parts: tuple(decode(part) for part in parts),
    "dict": lambda entries: {key: decode(part) for key, part in entries.items()},
}


def _path(text: str) -> PurePath:
    from pathlib import Path

    try:
        return Path(text)
    except NotImplementedError:  # pragma: no cover -- no such system
        return PurePosixPath(text)
