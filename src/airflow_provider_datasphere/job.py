"""For programs inside a DataSphere job: report progress, skip the task. Imports nothing but the standard library.

Outside of a job both do nothing, so that a function that uses them runs in a unit test too. The file is shipped alone
with functions of ``@task.datasphere``, and works with Python 3.8 and newer.
"""

import json
import os
from datetime import datetime, timezone
from typing import Union

__all__ = ["progress", "skip"]

#: Set by the program that runs a function of ``@task.datasphere``.
_in_function_job = False


class SkipTask(BaseException):
    """The function asked to skip its task. Not an Exception, so that ``except Exception`` lets it pass."""


def progress(percent: Union[int, float], message: str = "") -> None:
    """Report the progress of the job: it is shown on the job's page and in the task's log.

    :param percent: 0 to 100; what is beyond is cut.
    :param message: what is done, in a few words.
    """
    path = os.environ.get("JOB_PROGRESS_FILENAME")
    if not path:
        return
    report = {
        "progress": max(0, min(100, int(percent))),
        "message": str(message),
        "create_time": datetime.now(timezone.utc).isoformat().replace("+00:00", "Z"),
    }
    # The whole content is the last report: users have found that more reliable than lines that are appended.
    temporary = "%s.%d.part" % (path, os.getpid())
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(json.dumps(report) + "\n")
        os.replace(temporary, path)
    except OSError:
        return  # a report that can't be written is no reason to lose the job


def skip(reason: str = "") -> None:
    """End the function, and have Airflow skip its task. Only in a function of ``@task.datasphere``.

    :param reason: why, for the task's log.
    """
    if _in_function_job:
        raise SkipTask(reason)
