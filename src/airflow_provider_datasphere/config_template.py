"""The configuration of a job as a templated field: a mapping, or the text of a file that Airflow's loader finds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_provider_datasphere.arguments import path_as_text
from airflow_provider_datasphere.exceptions import JobRequestError

if TYPE_CHECKING:
    import jinja2

    from airflow_provider_datasphere.compat import Context
    from airflow_provider_datasphere.templates import TextTemplates


@dataclass(frozen=True)
class RenderedConfig:
    """A rendered configuration.

    :param content: the mapping, or the file's text.
    :param folder: what relative paths are relative to.
    :param text: its YAML, which Airflow's pages show.
    :param file: the file's name in messages; empty for a mapping.
    """

    content: Mapping[Any, Any] | str
    folder: Path
    text: str
    file: str = ""


def render_config(
    operator: TextTemplates, config: Any, context: Context | None, env: jinja2.Environment
) -> RenderedConfig:
    """Return the configuration with its templates rendered, those in the keys of a mapping included.

    :param config: a mapping, the path of a file, or what gives one of these, such as another task's output.
    :param context: ``None`` renders nothing.
    :raises JobRequestError: there is no such file, or it is neither a file nor a mapping.
    """
    from airflow_provider_datasphere.client.configuration.document import to_yaml
    from airflow_provider_datasphere.client.configuration.read import is_config_file

    config = path_as_text(_resolved(config, context))
    if isinstance(config, Mapping):
        mapping = _rendered(operator, config, context, env)
        return RenderedConfig(mapping, dag_folder(operator), to_yaml(mapping))
    name = _rendered(operator, config, context, env)
    if not isinstance(name, str) or not is_config_file(name):
        raise JobRequestError(f"config is {name!r}: give a mapping, or the path of a .yaml or .yml file.")
    path = find_file(operator, name, env)
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it isn't UTF-8"
        raise JobRequestError(f"config: {path} can't be read: {reason}.") from error
    rendered = _rendered(operator, text, context, env) or ""
    if text.endswith("\n") and not rendered.endswith("\n"):
        rendered += "\n"  # which Jinja cuts off
    return RenderedConfig(rendered, path.parent, rendered, name)


def find_file(operator: TextTemplates, name: str, env: jinja2.Environment) -> Path:
    """Return the file that Airflow would take for this template: absolute, beside the DAG file, in a search path.

    :raises JobRequestError: there is none.
    """
    folders = [] if os.path.isabs(name) else [dag_folder(operator), *map(Path, getattr(env.loader, "searchpath", ()))]
    places = [Path(name)] if os.path.isabs(name) else [folder / name for folder in dict.fromkeys(folders)]
    for place in places:
        if place.is_file():
            return place
    looked = ", ".join(str(place.parent) for place in places)
    raise JobRequestError(f"config is {name!r}: there is no such file; looked in {looked}.")


def dag_folder(operator: TextTemplates) -> Path:
    """Return the folder of the DAG's file; the current one where there is no DAG."""
    dag: Any = operator.get_dag()
    file = getattr(dag, "fileloc", None)
    return Path(file).parent if file else Path.cwd()


def _resolved(value: Any, context: Context | None) -> Any:
    """Return what another task gave, for a value that only names it."""
    resolve = getattr(value, "resolve", None)
    if resolve is None or context is None or isinstance(value, os.PathLike):
        return value
    return resolve(context)


def _rendered(operator: TextTemplates, value: Any, context: Context | None, env: jinja2.Environment) -> Any:
    if context is None:
        return value
    if isinstance(value, Mapping):
        return {
            operator.render_text(key, context, env) if isinstance(key, str) else key: _rendered(
                operator, part, context, env
            )
            for key, part in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_rendered(operator, part, context, env) for part in value]
    return operator.render_inside(_resolved(value, context), context, env)
