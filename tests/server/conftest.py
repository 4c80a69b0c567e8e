from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.server.fakes import Server, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with running() as running_server:
        yield running_server
