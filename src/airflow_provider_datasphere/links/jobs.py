"""The button that leads from a task's page to its job's."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from airflow_provider_datasphere.compat import BaseOperatorLink, XCom

if TYPE_CHECKING:
    from airflow.sdk.types import TaskInstanceKey

log = logging.getLogger(__name__)


class DataSphereJobLink(BaseOperatorLink):
    """Link to the job's page, from the XCom ``job_url`` that the operators push as soon as there is a job.

    Airflow 3 asks for it on the worker when the task ends or defers, and shows what was pushed as
    ``_link_DataSphereJobLink`` before; Airflow 2 asks when the page is shown.
    """

    #: The XCom that it reads.
    url_key = "job_url"
    #: Where Airflow 3 keeps a link; an operator that pushes it itself has the button while the task is running.
    link_key = "_link_DataSphereJobLink"

    @property
    def name(self) -> str:
        """The button's text."""
        return "DataSphere job"

    def get_link(self, operator: Any, *, ti_key: TaskInstanceKey) -> str:
        """The job's page, empty while there is none. Never fails: the link isn't worth a task."""
        try:
            return XCom.get_value(ti_key=ti_key, key=self.url_key) or ""
        except Exception:
            log.debug("The job's link can't be read.", exc_info=True)
            return ""
