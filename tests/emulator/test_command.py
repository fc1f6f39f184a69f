"""The command's mistakes: one line each, which names the argument and the way out."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from datasphere_emulator import Emulator
from datasphere_emulator.__main__ import main

if TYPE_CHECKING:
    from pathlib import Path

ANY = ("--port", "0", "--http-port", "0")


def error_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The last line of what the command says when it can't start."""
    try:
        code = main(["serve", *arguments])
    except SystemExit as error:
        code = error.code  # type: ignore[assignment]
    assert code in (1, 2)
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return said.err.strip().splitlines()[-1]


@pytest.mark.parametrize("option", ["--port", "--http-port", "--metadata-port"])
def test_a_taken_port_is_named_with_its_option(capsys: pytest.CaptureFixture[str], option: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        line = error_line(capsys, *ANY, option, port)
    assert f"Port {port} on 127.0.0.1 is already in use" in line
    assert f"with {option}," in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "70000"], "argument --port: '70000' is not a port"),
        (["--http-port", "-1"], "argument --http-port"),
        (["--metadata-port", "many"], "argument --metadata-port: 'many' is not a port"),
        (["--host", "nowhere.invalid"], "--host nowhere.invalid"),
        (["--host", "192.0.2.1"], "Failed to listen on 192.0.2.1"),
        (["--public-host", ""], "argument --public-host: '' is not a host name"),
        (["--public-host", "ünï"], "argument --public-host: 'ünï' is not a host name"),
        (["--public-host", "*.example.com"], "argument --public-host: '*.example.com' is a pattern"),
        (["--certificate-host", "a b"], "argument --certificate-host: 'a b' is not a host name"),
        (["--setting", "colour=red"], "--setting There is no setting 'colour'"),
        (["--setting", "seed"], "--setting 'seed': must be name=value"),
        (["--setting", "refused_job=perhaps"], "refused_job='perhaps': must be stays or error"),
        (["--setting", 'instance_types_checked_by=["Delete"]'], "must be a list of Create, Clone, Execute"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
    ],
)
def test_a_wrong_argument_is_named(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert words in error_line(capsys, *ANY, *arguments)


def test_wrong_files_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert f"--ready-file {tmp_path}" in error_line(capsys, *ANY, "--ready-file", str(tmp_path))
    assert "--ready-file" in error_line(capsys, *ANY, "--ready-file", str(tmp_path / "no" / "ready.json"))
    (tmp_path / "file").touch()
    assert f"State folder {tmp_path}/file" in error_line(capsys, *ANY, "--state-dir", str(tmp_path / "file"))
    assert "State folder" in error_line(capsys, *ANY, "--state-dir", str(tmp_path / "file" / "below"))


def test_a_state_folder_in_use_is_an_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with Emulator(tls=False, state_dir=tmp_path / "state"):
        line = error_line(capsys, *ANY, "--plaintext", "--state-dir", str(tmp_path / "state"))
    assert "in use by another emulator" in line
    assert "use another folder" in line
