"""Runs forks through the unmodified SDK; executed by the interpreter of the SDK's environment.

Reads from stdin a list of keyword arguments of ``SDK().fork_job``, writes to stdout a list of ``{"id"}`` or
``{"error"}``. DATASPHERE_ENDPOINT is the ``host:port`` to use in place of the public hosts.
"""

import json
import os
import sys

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
outcomes = []
for case in json.load(sys.stdin):
    try:
        outcomes.append({"id": sdk.fork_job(**case).id})
    except Exception as error:
        outcomes.append({"error": f"{type(error).__name__}: {error}"})
json.dump(outcomes, answer)
