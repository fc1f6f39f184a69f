"""Monitoring a job until it ends: polling, logs, outcome."""

#: The longest pause between two polls of a job, unless somebody says otherwise, seconds.
DEFAULT_POLL_INTERVAL = 10.0
