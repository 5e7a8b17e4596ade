"""The server that a client starts for itself."""

from __future__ import annotations

import pytest

from edge_client.transport import embedded
from splitters.bundle import Bundle


async def test_a_slow_start_is_told_once_and_goes_on(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(embedded, "_LONG_S", 0.0)
    server = embedded.EmbeddedServer(str(bundle.path))
    try:
        assert await server.start()
    finally:
        server.stop()
    assert caplog.text.count("the server is still starting") == 1
