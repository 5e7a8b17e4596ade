"""The relay: packets between two namespaces really take the link's time. Skipped where root or TUN is missing."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from deploy.testbed.link import LinkConfig
from deploy.testbed.relay import SERVER_ADDRESS, Relay, why_not
from deploy.testbed.trace import constant
from protos.errors import ConfigError

REASON = why_not()
DELAY_NS = 30_000_000

_SERVER = f"""
import socket
listener = socket.create_server(("{SERVER_ADDRESS}", 5000))
print("up", flush=True)
connection, _ = listener.accept()
while data := connection.recv(4096):
    connection.sendall(data)
"""
_CLIENT = f"""
import socket, time
connection = socket.create_connection(("{SERVER_ADDRESS}", 5000), timeout=20)
for _ in range(10):
    begin = time.monotonic()
    connection.sendall(b"x" * 1000)
    left = 1000
    while left:
        left -= len(connection.recv(left))
    print((time.monotonic() - begin) * 1e3, flush=True)
"""


@pytest.mark.skipif(bool(REASON), reason=REASON)
async def test_a_round_trip_takes_what_the_link_says() -> None:
    config = LinkConfig(trace=constant(2e6), delay_ns=DELAY_NS)
    try:
        async with Relay(config, config) as relay:
            pipe = asyncio.subprocess.PIPE
            server = await asyncio.create_subprocess_exec(*relay.command("server", [sys.executable, "-c", _SERVER]), stdout=pipe)
            assert server.stdout is not None
            await asyncio.wait_for(server.stdout.readline(), 30)
            client = await asyncio.create_subprocess_exec(*relay.command("client", [sys.executable, "-c", _CLIENT]), stdout=pipe)
            out, _ = await asyncio.wait_for(client.communicate(), 60)
            server.kill()
            await server.wait()
    except ConfigError as error:
        pytest.skip(error.message)
    times = sorted(float(line) for line in out.splitlines())
    assert len(times) == 10
    assert times[5] + 0.5 >= 60 + 2 * 1052 * 8 / 2e3, "two propagations and two transmissions"
    assert times[0] < 120
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout
    assert "ht" not in left, "the namespaces are gone again"
