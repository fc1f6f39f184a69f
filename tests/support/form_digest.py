"""A digest of the connection's form, by which screenshots that are older than it are found."""

from __future__ import annotations

import hashlib
import json

from airflow_provider_datasphere.get_provider_info import CONNECTION_FIELDS, HIDDEN_FIELDS, PLACEHOLDERS


def form_digest() -> str:
    """What the form shows, as sixteen hexadecimal digits."""
    shown = json.dumps([CONNECTION_FIELDS, HIDDEN_FIELDS, PLACEHOLDERS], sort_keys=True)
    return hashlib.sha256(shown.encode()).hexdigest()[:16]
