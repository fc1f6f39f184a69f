"""The command ``datasphere-emulator``."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import ipaddress
import json
import logging
import os
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from datasphere_emulator.control_client import connection_extra
from datasphere_emulator.state_dir import write_private

if TYPE_CHECKING:
    from datasphere_emulator.emulator import Emulator
    from datasphere_emulator.state import EmulatorState

PIP_LINE = "pip install 'airflow-provider-datasphere[emulator]'"


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    main_parser = argparse.ArgumentParser(
        prog="datasphere-emulator", description="DataSphere Jobs on localhost: runs jobs as processes of this machine."
    )
    commands = main_parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="run the emulator until Ctrl-C")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    serve.add_argument("--port", type=_port, default=8980, help="gRPC port, 0 for any (default: %(default)s)")
    serve.add_argument(
        "--http-port", type=_port, default=8981, help="port of files, pages and control API (default: %(default)s)"
    )
    serve.add_argument(
        "--metadata-port",
        type=_port,
        default=0,
        help="port of the metadata service (default: any free port, on loopback only)",
    )
    serve.add_argument(
        "--public-host",
        type=_public_host,
        default="localhost",
        help="host name that clients use (default: %(default)s)",
    )
    serve.add_argument(
        "--certificate-host",
        type=_host,
        action="append",
        default=[],
        metavar="NAME",
        help="another host name for the TLS certificate; may be repeated",
    )
    serve.add_argument(
        "--state-dir",
        type=Path,
        help="folder for jobs, files and accounts; the next start resumes from it (default: a temporary folder)",
    )
    serve.add_argument("--plaintext", action="store_true", help="serve without TLS")
    serve.add_argument(
        "--setting",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change a setting; may be repeated (docs/emulator.md lists them)",
    )
    serve.add_argument(
        "--ready-file", type=Path, help="JSON file to write addresses and credentials to when the emulator is ready"
    )
    return main_parser


SAMPLE_NAME = "sample"
SAMPLE_PROGRAM = """\
import argparse

parser = argparse.ArgumentParser()
parser.add_argument("data")
parser.add_argument("--range", type=int)
parser.add_argument("--out")
options = parser.parse_args()
rows = open(options.data).read().splitlines()[1:][: options.range]
print(f"read {len(rows)} rows", flush=True)
open(options.out, "w").write("\\n".join(rows) + "\\n")
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    if importlib.util.find_spec("aiohttp") is None:
        print(f"The emulator needs another package:\n\n    {PIP_LINE}\n", file=sys.stderr)
        return 2
    main_parser = parser()
    options = main_parser.parse_args(arguments)
    from datasphere_emulator.emulator import Emulator
    from datasphere_emulator.settings import Settings

    settings = Settings()
    for assignment in options.setting:
        try:
            settings.set_from_text(assignment)
        except ValueError as error:
            main_parser.error(f"--setting {error}")
    if options.ready_file is not None:
        if options.ready_file.is_dir() or not options.ready_file.parent.is_dir():
            main_parser.error(f"--ready-file {options.ready_file}: must be a file in an existing folder")
        # A file left by a killed emulator would pass for ours.
        options.ready_file.unlink(missing_ok=True)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        emulator = Emulator(
            settings,
            tls=not options.plaintext,
            state_dir=options.state_dir,
            host=options.host,
            port=options.port,
            http_port=options.http_port,
            metadata_port=options.metadata_port,
            public_host=options.public_host,
            certificate_hosts=options.certificate_host,
            keep_programs=options.state_dir is not None,
        )
    except OSError as error:
        return _cannot_start(error)
    try:
        asyncio.run(_serve(emulator, options.ready_file))
    except OSError as error:
        return _cannot_start(error)
    finally:
        emulator.close()
        if options.ready_file is not None:
            options.ready_file.unlink(missing_ok=True)
    return 0


def _cannot_start(error: OSError) -> int:
    print(f"The emulator failed to start: {error}", file=sys.stderr)
    return 1


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: must be 0 to 65535")
    return int(text)


def _host(text: str) -> str:
    name = text.removeprefix("*.")
    try:
        ipaddress.ip_address(text)
    except ValueError:
        if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,250}[A-Za-z0-9])?", name) or ".." in name:
            raise argparse.ArgumentTypeError(f"{text!r} is not a host name") from None
    return text


def _public_host(text: str) -> str:
    if text.startswith("*."):
        raise argparse.ArgumentTypeError(
            f"{text!r} is a pattern: give one host name here and patterns with --certificate-host"
        )
    return _host(text)


async def _serve(emulator: Emulator, ready_file: Path | None) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    await emulator.serve()
    facts = describe(emulator)
    print(_greeting(facts), flush=True)
    if ready_file is not None:
        write_private(ready_file, json.dumps(facts, indent=2).encode())
    await stopped.wait()
    running = sum(record.active for record in emulator.state.registry)
    if running and facts["state_dir_kept"]:
        print(f"Jobs still running: {running}. The next start with this --state-dir reattaches to them.", flush=True)
    await emulator.end(grace=1.0, kill_programs=not facts["state_dir_kept"])


def sample_job(state: EmulatorState) -> str:
    """Return the id of a job to fork, made at the first start with a state folder: it repeats the rows of a table."""
    for record in state.registry:
        if record.job.name == SAMPLE_NAME:
            return record.id
    return state.create_job(
        "python main.py ${DATA} --range ${RANGE} --out ${RESULT}",
        execute=True,
        name=SAMPLE_NAME,
        files={"main.py": SAMPLE_PROGRAM, "data.csv": "day,celsius\n1,4.5\n2,6.0\n3,5.5\n"},
        inputs=[("data.csv", "DATA")],
        outputs=[("result.txt", "RESULT")],
        args={"RANGE": "2"},
        data_ttl=None,
    )


def describe(emulator: Emulator) -> dict[str, Any]:
    """Return the addresses and credentials of a running emulator. Must be called in its event loop."""
    state = emulator.state
    authority = emulator.root_certificates
    certificates = None if authority is None else str(authority.absolute())
    facts = {
        "iam_token": state.iam_token,
        "project_id": state.project_id,
        "endpoint": emulator.endpoint,
        "url": emulator.url,
    }
    extra = connection_extra(facts, {}, tls=authority is not None, root_certificates=certificates)
    return {
        **facts,
        "pid": os.getpid(),
        "metadata_address": emulator.metadata_address,
        "root_certificates": certificates,
        "control_secret": emulator.control_secret,
        "community_id": state.community_id,
        "service_account_id": state.service_account_id,
        "state_dir": str(emulator.state_dir.absolute()),
        "state_dir_kept": emulator.keeps_state,
        "sample_job_id": sample_job(state),
        "connection": {"conn_type": "datasphere", "extra": extra},
    }


def _greeting(facts: dict[str, Any]) -> str:
    connection = facts["connection"]
    as_uri = "datasphere://?" + urlencode({"__extra__": json.dumps(connection["extra"])}, quote_via=quote)
    lines = [
        "DataSphere emulator",
        f"  gRPC             {facts['endpoint']}",
        f"  web              {facts['url']}/projects",
        f"  control API      {facts['url']}/_control/   (Authorization: Bearer {facts['control_secret']})",
        f"  metadata         {facts['metadata_address']}   (YC_METADATA_ADDR)",
        f"  CA certificate   {facts['root_certificates'] or 'none: plaintext'}",
        f"  project          {facts['project_id']}",
        f"  state            {facts['state_dir']}" + ("" if facts["state_dir_kept"] else "   (temporary)"),
        f"  sample job       {facts['sample_job_id']}   (to fork: args RANGE; vars DATA, RESULT)",
        "",
        "An Airflow connection, as JSON and as URI:",
        f"  export AIRFLOW_CONN_DATASPHERE_DEFAULT='{json.dumps(connection)}'",
        f"  export AIRFLOW_CONN_DATASPHERE_DEFAULT='{as_uri}'",
        "",
        "Ctrl-C stops it.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
