"""Connection form for Airflow below 3.2, from the provider's metadata."""

from __future__ import annotations

from typing import Any

from airflow_provider_datasphere.get_provider_info import CONNECTION_FIELDS, HIDDEN_FIELDS, PLACEHOLDERS


def form_widgets() -> dict[str, Any]:
    """Return the form's fields as wtforms fields by name."""
    from flask_appbuilder.fieldwidgets import BS3PasswordFieldWidget, BS3TextFieldWidget
    from wtforms import BooleanField, PasswordField, StringField

    def widget(field: dict[str, Any]) -> Any:
        label, description = field["label"], field["description"]
        if "boolean" in field["schema"]["type"]:
            return BooleanField(label, description=description, default=False)
        if field["schema"].get("format") == "password":
            return PasswordField(label, description=description, widget=BS3PasswordFieldWidget())
        return StringField(label, description=description, widget=BS3TextFieldWidget())

    return {name: widget(field) for name, field in CONNECTION_FIELDS.items()}


def field_behaviour() -> dict[str, Any]:
    """Return the hidden standard fields and the placeholders."""
    return {"hidden_fields": HIDDEN_FIELDS, "relabeling": {}, "placeholders": PLACEHOLDERS}
