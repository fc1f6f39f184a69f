"""Link from a task's page to its job's page."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from airflow_provider_datasphere.compat import BaseOperatorLink, XCom

if TYPE_CHECKING:
    from airflow.sdk.types import TaskInstanceKey

log = logging.getLogger(__name__)


class DataSphereJobLink(BaseOperatorLink):
    """Link to the job's page, from the XCom ``job_url`` that operators push as soon as the job exists.

    Airflow 3 calls it on the worker when the task ends or defers, and until then shows the XCom
    ``_link_DataSphereJobLink``; Airflow 2 calls it when the page is shown.
    """

    #: XCom key of the job's URL.
    url_key = "job_url"
    #: XCom key of a link in Airflow 3; operators push it so that running tasks have the button.
    link_key = "_link_DataSphereJobLink"

    @property
    def name(self) -> str:
        """The button's text."""
        return "DataSphere job"

    def get_link(self, operator: Any, *, ti_key: TaskInstanceKey) -> str:
        """Return the URL of the job's page; empty while there is no job. Never fails."""
        guard = getattr(operator, "_guard", None)
        if guard is not None and guard.never_had_a_job:
            # Airflow 3 would log the error "XCom not found" below the task's own.
            return ""
        try:
            return XCom.get_value(ti_key=ti_key, key=self.url_key) or ""
        except Exception:
            log.debug("Failed to read the job's link.", exc_info=True)
            return ""
