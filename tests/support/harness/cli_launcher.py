"""Runs the ``datasphere`` CLI's own ``main()`` with the hosts it has as constants changed to one endpoint.

Executed by the interpreter of the SDK's environment; DATASPHERE_ENDPOINT is the ``host:port`` to use instead.
"""

import os

import datasphere.auth
import datasphere.channel
import datasphere.main

endpoint = os.environ["DATASPHERE_ENDPOINT"]
datasphere.channel.project_endpoint = endpoint
datasphere.channel.job_endpoint = endpoint
datasphere.channel.op_endpoint = endpoint
datasphere.auth.iam_endpoint = endpoint
# It would ask the public package index for a newer version after each command.
datasphere.main.check_package_version = lambda: None
datasphere.main.main()
