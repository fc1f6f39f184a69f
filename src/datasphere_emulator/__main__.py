"""The command ``datasphere-emulator``."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

if TYPE_CHECKING:
    from datasphere_emulator.emulator import Emulator

PIP_LINE = "pip install 'airflow-provider-datasphere[emulator]'"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    main_parser = argparse.ArgumentParser(
        prog="datasphere-emulator", description="DataSphere Jobs on localhost: runs jobs as processes of this machine."
    )
    commands = main_parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="run the emulator until Ctrl-C")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    serve.add_argument("--port", type=int, default=8980, help="gRPC port, 0 for any (default: %(default)s)")
    serve.add_argument(
        "--http-port", type=int, default=8981, help="port of files, pages and control API (default: %(default)s)"
    )
    serve.add_argument(
        "--metadata-port", type=int, default=0, help="port of the metadata service (default: any free one)"
    )
    serve.add_argument("--public-host", default="localhost", help="host name that clients use (default: %(default)s)")
    serve.add_argument(
        "--certificate-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a further name that the certificate is good for; may be repeated",
    )
    serve.add_argument(
        "--state-dir",
        type=Path,
        help="keep everything here, and go on with it at the next start (default: a temporary folder)",
    )
    serve.add_argument("--plaintext", action="store_true", help="no TLS")
    serve.add_argument(
        "--setting",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change a setting; may be repeated (docs/emulator.md lists them)",
    )
    serve.add_argument("--ready-file", type=Path, help="write the addresses and credentials here, as JSON, once ready")
    return main_parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    if importlib.util.find_spec("aiohttp") is None:
        print(f"The emulator needs a further package:\n\n    {PIP_LINE}\n", file=sys.stderr)
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
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
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
    if options.ready_file is not None:
        # One that a killed emulator left would be taken for ours.
        options.ready_file.unlink(missing_ok=True)
    try:
        asyncio.run(_serve(emulator, options.ready_file))
    except OSError as error:
        print(f"The emulator can't start: {error}", file=sys.stderr)
        return 1
    finally:
        emulator.close()
        if options.ready_file is not None:
            options.ready_file.unlink(missing_ok=True)
    return 0


async def _serve(emulator: Emulator, ready_file: Path | None) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    await emulator.serve()
    facts = describe(emulator)
    print(_greeting(facts), flush=True)
    if ready_file is not None:
        _write_private(ready_file, json.dumps(facts, indent=2))
    await stopped.wait()
    running = sum(record.active for record in emulator.core.registry)
    if running and facts["state_dir_kept"]:
        print(f"Jobs running on: {running}. The next start with this --state-dir goes on with them.", flush=True)
    await emulator.end(grace=1.0, kill_programs=not facts["state_dir_kept"])


def _write_private(path: Path, text: str) -> None:
    """Write a file with credentials; it appears at once and whole."""
    temporary = path.with_name(path.name + ".new")
    temporary.touch(mode=0o600)
    temporary.write_text(text)
    temporary.replace(path)


def describe(emulator: Emulator) -> dict[str, Any]:
    """All that a client of a running emulator needs to know. Called in the emulator's loop."""
    core = emulator.core
    authority = emulator.root_certificates
    extra: dict[str, Any] = {
        "iam_token": core.iam_token,
        "project_id": core.project_id,
        "endpoint": emulator.endpoint,
        "ui_endpoint": emulator.url,
    }
    if authority is None:
        extra["insecure"] = True
    else:
        extra["root_certificates"] = str(authority.absolute())
    return {
        "pid": os.getpid(),
        "endpoint": emulator.endpoint,
        "url": emulator.url,
        "metadata_address": emulator.metadata_address,
        "root_certificates": None if authority is None else str(authority.absolute()),
        "iam_token": core.iam_token,
        "project_id": core.project_id,
        "community_id": core.community_id,
        "service_account_id": core.service_account_id,
        "state_dir": str(emulator.state_dir.absolute()),
        "state_dir_kept": emulator.keeps_state,
        "connection": {"conn_type": "datasphere", "extra": extra},
    }


def _greeting(facts: dict[str, Any]) -> str:
    connection = facts["connection"]
    as_uri = "datasphere://?" + urlencode({"__extra__": json.dumps(connection["extra"])}, quote_via=quote)
    lines = [
        "DataSphere emulator",
        f"  gRPC             {facts['endpoint']}",
        f"  web              {facts['url']}/projects",
        f"  metadata         {facts['metadata_address']}   (YC_METADATA_ADDR)",
        f"  CA certificate   {facts['root_certificates'] or 'none: plaintext'}",
        f"  project          {facts['project_id']}",
        f"  state            {facts['state_dir']}" + ("" if facts["state_dir_kept"] else "   (temporary)"),
        "",
        "An Airflow connection, as JSON and as URI:",
        f"  export AIRFLOW_CONN_DATASPHERE_DEFAULT='{json.dumps(connection)}'",
        f"  export AIRFLOW_CONN_DATASPHERE_DEFAULT='{as_uri}'",
        "",
        "Ctrl-C ends it.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
