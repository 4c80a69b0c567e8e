"""What --middleware may name."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Tag:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def tagged(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-class", b"yes")]
            await send(message)

        await self._app(scope, receive, tagged)


async def tag(request: Request, call_next: Callable[[Any], Awaitable[Response]]) -> Response:
    response = await call_next(request)
    response.headers["x-function"] = "yes"
    return response


async def tell_of_garbage(request: Request, call_next: Callable[[Any], Awaitable[Response]]) -> Response:
    response = await call_next(request)
    response.headers["x-garbage"] = f"collected: {gc.isenabled()}, in what was loaded: {gc.get_freeze_count() == 0}"
    return response
