"""What a service writes to stderr: text, or a JSON object a line; and what it says of a request.

No line of a request has the name of a user in it, or a token: the route stands for the path.
"""

import json
import logging
import re
import secrets
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

from hstu_xd.serving.http.settings import LogSettings

_log = logging.getLogger(__name__)

# What is taken for a request's id: nothing that could be read as more than one word of a line.
_ID = re.compile(rb"[!-~]{1,128}")
_REQUEST = "hstu_xd_request"
_HANDLER = "hstu-xd"


@dataclass(frozen=True)
class Answered:
    """A request that is answered.

    Attributes:
        method: of HTTP.
        path: the route, with {user} in the place of a name.
        status: of the answer; 499 where the client was gone.
        ms: milliseconds from its headers to its answer.
        version: name of the model that answered.
        request_id: the client's, or one made here.
    """

    method: str
    path: str
    status: int
    ms: float
    version: str
    request_id: str


def set_up(settings: LogSettings, worker: int | None = None) -> None:
    """Write the log of this process to stderr from now on, in place of what was said before.

    Args:
        settings: level and format.
        worker: number of this process among those that serve; None: it serves nothing.
    """
    handler = logging.StreamHandler()
    if settings.format == "json":
        handler.setFormatter(JsonLines(worker))
        logging.captureWarnings(True)
    else:
        handler.setFormatter(logging.Formatter("hstu-xd: %(message)s"))
    handler.name = _HANDLER
    # A worker that is forked begins with that of the process that watches.
    for former in [each for each in logging.root.handlers if each.name == _HANDLER]:
        logging.root.removeHandler(former)
    logging.basicConfig(level=settings.level.upper(), handlers=[handler])


def id_of(header: bytes | None) -> str:
    """Return a request's id: that of its header ``X-Request-ID``, or a new one.

    Args:
        header: None: there is none. What is longer than 128 characters or has others than visible
            ASCII is not taken, as it would not stay one word of a line.
    """
    if header is not None and _ID.fullmatch(header):
        return header.decode("ascii")
    return secrets.token_hex(16)


def write(answered: Answered, client: str) -> None:
    """Write the line of a request, where the level is INFO.

    Args:
        answered: the request.
        client: its address, which stands in text only.
    """
    if not _log.isEnabledFor(logging.INFO):
        return
    _log.info(
        "%s %s %s %d %.1f ms %s",
        *(client, answered.method, answered.path, answered.status, answered.ms),
        answered.request_id,
        extra={_REQUEST: answered},
    )


class JsonLines(logging.Formatter):
    """One JSON object a record; what is known of a request is in fields of its own.

    Args:
        worker: see :func:`set_up`.
    """

    def __init__(self, worker: int | None) -> None:
        super().__init__()
        self._worker = {} if worker is None else {"worker": worker}

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        time = datetime.fromtimestamp(record.created, timezone.utc)
        line: dict[str, Any] = {
            "time": time.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            **self._worker,
        }
        answered = getattr(record, _REQUEST, None)
        if isinstance(answered, Answered):
            line |= asdict(answered) | {"ms": round(answered.ms, 3)}
        else:
            line["message"] = record.getMessage()
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)
