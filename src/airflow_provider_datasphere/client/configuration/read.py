"""Reading and checking a configuration: the one way for the operator, ``execute_job`` and ``datasphere-config``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_provider_datasphere.client.configuration.checks import check_config
from airflow_provider_datasphere.client.configuration.document import Value, read_mapping, read_yaml, to_yaml
from airflow_provider_datasphere.client.configuration.faults import Faults, Place
from airflow_provider_datasphere.client.configuration.overlay import Overlay
from airflow_provider_datasphere.client.configuration.section import Reader
from airflow_provider_datasphere.client.configuration.sections import read_sections
from airflow_provider_datasphere.client.errors import JobRequestError

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.configuration.job_config import JobConfig

#: How the name of a configuration file ends.
FILE_SUFFIXES = (".yaml", ".yml")

_NO_OVERLAY = Overlay()


@dataclass(frozen=True)
class ConfigSource:
    """A configuration as it is given: a mapping, or the text of a file.

    :param content: the mapping, or the text.
    :param base_dir: what relative paths are relative to.
    :param file: the file's name in messages; empty for a mapping.
    """

    content: Mapping[Any, Any] | str
    base_dir: Path
    file: str = ""

    @classmethod
    def of_file(cls, path: Path, base_dir: Path | None = None) -> ConfigSource:
        """Read a file; relative paths are relative to its folder.

        :raises JobRequestError: it can't be read.
        """
        try:
            text = path.read_text("utf-8-sig")
        except (OSError, UnicodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it isn't UTF-8"
            raise JobRequestError(f"config: {path} can't be read: {reason}.") from error
        return cls(text, path.parent if base_dir is None else base_dir, str(path))

    def document(self, faults: Faults) -> Value | None:
        """Return it as a tree of text; ``None`` after a fault that leaves nothing to read."""
        if isinstance(self.content, str):
            document = read_yaml(self.content, self.file, faults)
        elif self.content:
            document = read_mapping(self.content, faults)
        else:
            faults.add(Place(), "the configuration is empty: it needs at least cmd.")
            return None
        if document is not None and not isinstance(document.content, dict):
            faults.add(
                document.place, f"this is {document.kind}: a configuration is a mapping with cmd and other keys."
            )
            return None
        return document

    @property
    def text(self) -> str:
        """The raw text that is stored with the job; of a mapping, its YAML."""
        return self.content if isinstance(self.content, str) else to_yaml(self.content)


def read_config(
    source: ConfigSource,
    faults: Faults,
    *,
    overlay: Overlay = _NO_OVERLAY,
    early: bool = False,
    read_files: bool = True,
) -> JobConfig | None:
    """Read and check a configuration, but for the files of inputs and modules (:func:`.files.check_files`).

    :param faults: takes all that is wrong.
    :param overlay: comes in the place of the configuration's values.
    :param early: before Jinja renders it, perhaps on another machine: values with a template aren't known yet.
    :param read_files: read requirements files.
    :return: the job, as far as it could be read; ``None`` where nothing could.
    """
    reader = Reader(faults, source.base_dir, early, read_files)
    document = source.document(faults)
    if document is None:
        return None
    config = overlay.laid_over(read_sections(document, reader), faults)
    assert isinstance(document.content, dict)
    cmd = document.content.get("cmd")
    # The text of a mapping is made only where it is sent.
    text = source.content if isinstance(source.content, str) else ""
    return check_config(replace(config, text=text), cmd.place if cmd is not None else document.place, reader)


def is_config_file(name: str) -> bool:
    """Return whether this can be the name of a configuration file."""
    return name.endswith(FILE_SUFFIXES) and "\n" not in name


def check_mapping(config: Mapping[Any, Any]) -> None:
    """Check a mapping when a DAG is parsed: without files, and values that aren't rendered yet.

    :raises JobRequestError: it has faults; the message has all of them.
    """
    faults = Faults()
    read_config(ConfigSource(config, Path()), faults, early=True, read_files=False)
    faults.raise_errors()
