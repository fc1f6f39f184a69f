"""urllib3's own log lines without the queries of URLs: in a presigned URL the query is the credential."""

from __future__ import annotations

import logging
import re

# Each module of urllib3 that logs has a logger of its own, and a logger's filters see only its own records.
_LOGGERS = (
    "urllib3",
    "urllib3.connection",
    "urllib3.connectionpool",
    "urllib3.poolmanager",
    "urllib3.response",
    "urllib3.util.retry",
    "urllib3.http2.connection",
    "urllib3.contrib.pyopenssl",
)
# To the next blank, quote or bracket; none of them is in a valid URL.
_QUERY = re.compile(r"\?[^\s\"'<>()\[\]{}]+")
# Parameters that sign a URL, anywhere: a log line may quote a part of a header.
_SIGNATURE = re.compile(
    r"(?i)((?:x-amz-(?:signature|credential|security-token)|signature|awsaccesskeyid)=)[^\s&\"'<>]+"
)


class _HideQueries(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        try:
            text = record.getMessage()
        except Exception:
            return True  # logging itself reports a message that doesn't fit its arguments
        hidden = without_queries(text)
        if hidden != text:
            record.msg, record.args = hidden, ()
        if record.exc_info:
            # What could not be parsed of an answer is quoted in the error.
            record.exc_text = without_queries(logging.Formatter().formatException(record.exc_info))
            record.exc_info = None
        return True


def without_queries(text: str) -> str:
    """Return the text with each URL query replaced by ``?…``."""
    return _SIGNATURE.sub(r"\1…", _QUERY.sub("?…", text))


_FILTER = _HideQueries()


def hide_urls_in_logs() -> None:
    """Redact URL queries in urllib3's log lines, in this process. Idempotent.

    It logs redirects (INFO), unreadable headers (WARNING) and each request (DEBUG) with whole URLs.
    """
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_FILTER)
