"""Makes jobs through the unmodified SDK as its CLI does; executed by the interpreter of the SDK's environment.

Reads from stdin the project's id and a list of names of configurations in the current folder, writes to stdout a list
of ``{"id"}`` or ``{"error"}``. DATASPHERE_ENDPOINT is the ``host:port`` to use in place of the public hosts.
"""

import json
import os
import sys
from argparse import Namespace
from pathlib import Path

import datasphere.auth
import datasphere.channel

endpoint = os.environ["DATASPHERE_ENDPOINT"]
datasphere.channel.project_endpoint = endpoint
datasphere.channel.job_endpoint = endpoint
datasphere.channel.op_endpoint = endpoint
datasphere.auth.iam_endpoint = endpoint

from datasphere.sdk import SDK  # noqa: E402

answer, sys.stdout = sys.stdout, sys.stderr
sdk = SDK()
given = json.load(sys.stdin)
outcomes = []
for name in given["configs"]:
    output = Path("execution.json")
    try:
        with open(name) as config, output.open("w") as written:
            # What `datasphere project job execute --async -o` calls.
            sdk._execute(Namespace(config=config, project_id=given["project_id"], async_=True, output=written))
        outcomes.append({"id": json.loads(output.read_text())["job_id"]})
    except Exception as error:
        outcomes.append({"error": f"{type(error).__name__}: {error}"})
json.dump(outcomes, answer)
