"""Logs: text or JSON lines on stderr, and what requests said where that is asked for."""

from __future__ import annotations

import json
import logging
import sys
import uuid
from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from langchain_vllm_server.settings import Settings

logger = logging.getLogger(__name__)

_TRACE = 5  # uvicorn's


def set_up_logging(settings: Settings) -> None:
    """Send all that is logged to stderr, as the settings say, and warn of flags without effect."""
    level = settings.log_level.upper()
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else text)
    logging.basicConfig(level=level, handlers=[handler])
    http = (settings.uvicorn_log_level or level).upper()
    logging.addLevelName(_TRACE, "TRACE")
    logging.getLogger("uvicorn").setLevel(http)
    # Uvicorn tells of its own start and stop at INFO; our lines say more.
    logging.getLogger("uvicorn.error").setLevel("WARNING" if http == "INFO" else http)
    if silent := settings.disable_access_log_for_endpoints:
        paths = frozenset(path.strip() for path in silent.split(","))
        logging.getLogger("uvicorn.access").addFilter(lambda record: _path(record) not in paths)
    if settings.without_effect:
        logger.warning("without effect on this server: %s", " ".join(settings.without_effect))


class JsonFormatter(logging.Formatter):
    """An object a line: time, level, logger, message, and exception where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class RequestLog:
    """Logs the bodies of requests, and of their answers.

    Args:
        app: The application.
        max_len: Longest body that is logged, in bytes; None: all of it.
        outputs: Log answers, too.
    """

    def __init__(self, app: ASGIApp, max_len: int | None, *, outputs: bool) -> None:
        self._app = app
        self._max_len = max_len
        self._outputs = outputs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        request_id = given.decode("latin-1") or uuid.uuid4().hex
        received, sent, status = bytearray(), bytearray(), 0

        async def receive_logged() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                self._add(received, message.get("body", b""))
                if not message.get("more_body", False):
                    logger.info("request %s: POST %s %s", request_id, scope["path"], _text(received))
            return message

        async def send_logged(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            self._add(sent, message.get("body", b""))
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                logger.info("answer %s: %d %s", request_id, status, _text(sent))

        await self._app(scope, receive_logged, send_logged if self._outputs else send)

    def _add(self, log: bytearray, body: bytes) -> None:
        log += body if self._max_len is None else body[: max(self._max_len - len(log), 0)]


def _text(body: bytearray) -> str:
    """On one line, whatever a client sent: no line of the log can be forged."""
    text = body.decode("utf-8", "replace")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _path(record: logging.LogRecord) -> str:
    """The path of a line of uvicorn's access log, whose arguments are client, method, path, version and status."""
    return str(record.args[2]).partition("?")[0] if isinstance(record.args, tuple) and len(record.args) > 2 else ""
