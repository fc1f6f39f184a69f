"""The service's public hosts on the loopback interface, seen by one command and its children alone.

``unshare --net --mount python redirected_hosts.py COMMAND...`` gives a namespace of its own: no network but loopback,
and an /etc/hosts with the hosts below. Nothing of the machine changes. Needs root.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

#: Host the emulator gives out in its addresses, and those the CLI calls besides.
PUBLIC_HOST = "datasphere.api.cloud.yandex.net"
HOSTS = f"""\
127.0.0.1 localhost
127.0.0.1 {PUBLIC_HOST} operation.api.cloud.yandex.net iam.api.cloud.yandex.net
127.0.0.2 pypi.org
"""

_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1


def main(command: list[str]) -> None:
    """Redirect the hosts, then become the command."""
    with socket.socket() as any_socket:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | _IFF_UP))
    with tempfile.TemporaryDirectory() as folder:
        hosts = Path(folder, "hosts")
        hosts.write_text(HOSTS)
        # The mounted file stays when its name goes.
        subprocess.run(["mount", "--bind", str(hosts), "/etc/hosts"], check=True)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
