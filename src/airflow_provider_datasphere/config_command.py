"""``datasphere-config check FILE…``: all faults of configurations, before a job costs money. No Airflow, no network."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from airflow_provider_datasphere.client.configuration.faults import Fault, Faults, Place
from airflow_provider_datasphere.client.configuration.files import check_files
from airflow_provider_datasphere.client.configuration.read import ConfigSource, read_config
from airflow_provider_datasphere.client.configuration.section import Reader
from airflow_provider_datasphere.client.errors import JobRequestError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0 without errors, 1 with."""
    parser = argparse.ArgumentParser(
        prog="datasphere-config", description="Check configurations of DataSphere jobs (config.yaml) without a network."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="print all faults, a line each: file:line: message")
    check.add_argument("files", nargs="+", metavar="FILE", type=Path)
    check.add_argument(
        "--project-dir",
        type=Path,
        metavar="DIR",
        help="folder that paths in the files are relative to (default: each file's own folder; the official CLI takes "
        "the current one)",
    )
    check.add_argument("--format", choices=("text", "json"), default="text", help="default: text")
    arguments = parser.parse_args(argv)
    if arguments.project_dir is not None and not arguments.project_dir.is_dir():
        parser.error(f"--project-dir {arguments.project_dir}: there is no such folder.")
    faults = [fault for file in arguments.files for fault in check_file(file, arguments.project_dir)]
    if arguments.format == "json":
        print(json.dumps([_as_json(fault) for fault in faults], indent=2, ensure_ascii=False))
    else:
        for fault in faults:
            print(fault)
    return 1 if any(not fault.warning for fault in faults) else 0


def check_file(file: Path, project_dir: Path | None = None) -> list[Fault]:
    """Return all faults of a configuration, errors and warnings, by line.

    :param project_dir: what its paths are relative to; default: its own folder.
    """
    faults = Faults()
    try:
        source = ConfigSource.of_file(file, project_dir)
    except JobRequestError as error:
        return [Fault(Place(str(file)), str(error))]
    # Airflow renders the file as a template, so that some values may not be known yet.
    config = read_config(source, faults, early=True)
    if config is not None:
        check_files(config, Reader(faults, source.base_dir, early=True))
    return sorted(faults.found, key=lambda fault: (fault.place.file != str(file), fault.place.file, fault.place.line))


def _as_json(fault: Fault) -> dict[str, str | int | None]:
    return {
        "file": fault.place.file,
        "line": fault.place.line or None,
        "field": fault.place.field or None,
        "severity": "warning" if fault.warning else "error",
        "message": fault.message,
    }


if __name__ == "__main__":
    sys.exit(main())
