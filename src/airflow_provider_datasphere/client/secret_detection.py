"""Detection of secrets in the wrong field, so that no message shows them. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

#: A longer value is never quoted.
MAX_SHOWN_CHARACTERS = 100

#: Fields for secrets. The path of a key file may be shown in messages.
_SECRET_FIELDS = frozenset({"iam_token", "oauth", "service_account_json"})
# What each pattern is, and which field it belongs to.
_FORMS = (
    (re.compile(r"t1\.[\w.=-]{47,}", re.ASCII), "an IAM token: put it into iam_token"),
    (re.compile(r"(y[0-9]_|AQAAAA)[\w-]{30,}", re.ASCII), "an OAuth token: put it into oauth"),
    (re.compile(r"AQVN[\w-]{30,}", re.ASCII), "an API key, which DataSphere doesn't accept"),
    (re.compile(r"eyJ[\w-]+\.[\w.-]{20,}", re.ASCII), "a signed token (JWT), which DataSphere doesn't accept"),
    (re.compile(r"MII[\w+/=\s]{60,}", re.ASCII), "the inside of a key or certificate"),
)
_OPAQUE = re.compile(r"[\w+/=-]{24,}", re.ASCII)


def secret_kind(value: object) -> str | None:
    """Return what a value is that may be or contain a secret, and which field it belongs to; None: no secret."""
    if isinstance(value, Mapping):
        return "JSON, perhaps an authorized key: put it into service_account_json"
    if not isinstance(value, str):
        return None
    text = value.strip().lstrip("\ufeff").lstrip("'\"\\ ")
    if text.startswith(("{", "[{")):
        return "JSON, perhaps an authorized key: put it into service_account_json"
    if "-----BEGIN" in text or "PRIVATE KEY-----" in text:
        if "CERTIFICATE-----" in text and "PRIVATE KEY" not in text:
            return "the certificates themselves: give the path of a PEM file instead"
        return "a private key: put the whole JSON of its authorized key into service_account_json"
    return next((kind for form, kind in _FORMS if form.match(text.removeprefix("Bearer "))), None)


def shown(value: object) -> str:
    """Return a value for a message: quoted, unless it may be or contain a secret."""
    if isinstance(value, (bool, int, float)) or value is None:
        return repr(value)
    if not isinstance(value, str):
        return f"a {type(value).__name__}"
    return f"a text of {len(value)} characters" if _may_be_secret(value) else repr(value)


def _may_be_secret(text: str) -> bool:
    if len(text) > MAX_SHOWN_CHARACTERS or "@" in text or secret_kind(text) is not None:
        return True
    if text.startswith(("/", "~", "./", "../")) or not _OPAQUE.fullmatch(text):
        return False
    # Letters of both cases and digits: a static key, a password.
    return bool(re.search("[a-z]", text) and re.search("[A-Z]", text) and re.search("[0-9]", text))


def possible_secrets(extra: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the possible secrets of a connection, found before its fields are parsed.

    :param extra: the connection's extra; names with or without Airflow's prefix.
    """
    found = [
        secret
        for name, value in extra.items()
        if name.split("__")[-1] in _SECRET_FIELDS or secret_kind(value) is not None
        for secret in _strings(value)
    ]
    return tuple(dict.fromkeys(found))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        # Only the secret parts of a key: ids may be shown in messages.
        yield from (
            secret for name, part in value.items() if "key" in name or "token" in name for secret in _strings(part)
        )
    elif isinstance(value, str) and len(value) >= 20:
        yield value
        if (stripped := value.strip()) != value:
            yield stripped
        if "\n" in value:
            yield value.replace("\n", "\\n")
        if "\\n" in value:
            yield value.replace("\\n", "\n")
        with suppress(ValueError):
            decoded = json.loads(value.strip().lstrip("\ufeff"), strict=False)
            if isinstance(decoded, Mapping) or (isinstance(decoded, str) and decoded != value):
                yield from _strings(decoded)
