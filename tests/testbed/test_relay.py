"""The relays: packets between two namespaces really take the link's time. Skipped where root or TUN is missing."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from contextlib import suppress

import pytest

from deploy.testbed.link.model import LinkConfig, LossModel
from deploy.testbed.link.trace import Trace, constant
from deploy.testbed.real.netem import NetemRelay, discipline, has_netem, ip
from deploy.testbed.real.relay import CLIENT_ADDRESS, SERVER_ADDRESS, Relay, open_relay, why_not
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


def own_namespaces() -> list[str]:
    """Of this process's relays."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout
    return [line for line in listed.splitlines() if line.startswith(f"ht{os.getpid() % 100_000}")]


async def round_trips(relay: Relay | NetemRelay) -> list[float]:
    """Ten echoes of 1 kB, ms, sorted."""
    pipe = asyncio.subprocess.PIPE
    server = await asyncio.create_subprocess_exec(*relay.command("server", [sys.executable, "-c", _SERVER]), stdout=pipe)
    assert server.stdout is not None
    await asyncio.wait_for(server.stdout.readline(), 30)
    client = await asyncio.create_subprocess_exec(*relay.command("client", [sys.executable, "-c", _CLIENT]), stdout=pipe)
    out, _ = await asyncio.wait_for(client.communicate(), 60)
    with suppress(ProcessLookupError):
        server.kill()
    await server.wait()
    return sorted(float(line) for line in out.splitlines())


@pytest.mark.skipif(bool(REASON), reason=REASON)
async def test_a_round_trip_takes_what_the_link_says() -> None:
    config = LinkConfig(trace=constant(2e6), delay_ns=DELAY_NS)
    try:
        async with Relay(config, config) as relay:
            times = await round_trips(relay)
    except ConfigError as error:
        pytest.skip(error.message)
    assert len(times) == 10
    assert times[5] + 0.5 >= 60 + 2 * 1052 * 8 / 2e3, "two propagations and two transmissions"
    assert times[0] < 120
    assert not own_namespaces(), "they are gone again"


@pytest.mark.skipif(bool(REASON), reason=REASON)
async def test_the_kernels_cubic_runs_over_it_whatever_the_machine_prefers() -> None:
    config = LinkConfig(trace=constant(2e6), delay_ns=1_000_000)
    async with Relay(config, config) as relay:
        words = relay.command("client", ["ip", "route", "show", SERVER_ADDRESS])
        route = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "congctl cubic" in route.stdout


GILBERT = LinkConfig(
    trace=constant(8e6), delay_ns=40_000_000, jitter_ns=2_000_000, queue_bytes=100_000, loss=LossModel(loss=0.02, burst_packets=4)
)


def test_a_link_in_netems_words() -> None:
    assert discipline(LinkConfig(trace=constant(8e6), delay_ns=40_000_000, queue_bytes=100_000), 8e6) == [
        *("netem", "delay", "40.000ms", "rate", "8000000bit", "limit", "93"),
    ], "100 kB may wait and 40 kB are under way"
    bursts = discipline(GILBERT, 8e6)
    begin = bursts.index("gemodel")
    to_bad, to_good, in_bad, in_good = (float(word.rstrip("%")) / 100 for word in bursts[begin + 1 : begin + 5])
    assert to_good == pytest.approx(1 / 4)
    assert in_bad * to_bad / (to_bad + to_good) == pytest.approx(0.02), "the mean loss is what was asked for"
    assert in_good == 0
    outage = discipline(GILBERT, 0.0)
    assert outage[outage.index("loss") + 1] == "100%"
    assert "rate" not in outage


@pytest.mark.skipif(bool(REASON), reason=REASON)
@pytest.mark.parametrize("bps", [8e6, 0.0])
def test_tc_understands_the_words(bps: float) -> None:
    """``tc`` reads its arguments before it asks the kernel: one without netem answers with its own, other, refusal."""
    space = "htwords"
    ip("netns", "add", space)
    try:
        words = ["tc", "qdisc", "add", "dev", "lo", "root", *discipline(GILBERT, bps)]
        done = subprocess.run(["ip", "netns", "exec", space, *words], capture_output=True, text=True, check=False)
        wrong = subprocess.run(["ip", "netns", "exec", space, *words, "nonsense"], capture_output=True, text=True, check=False)
    finally:
        ip("netns", "del", space)
    assert done.returncode == 0 or "qdisc kind is unknown" in done.stderr
    assert "qdisc kind is unknown" not in wrong.stderr
    assert wrong.returncode


@pytest.mark.skipif(bool(REASON), reason=REASON)
async def test_the_cables_of_the_netem_relay_join_two_namespaces() -> None:
    """With netem where the kernel has it, else with the token bucket, which takes the same place."""

    def bucket(config: LinkConfig, bps: float) -> list[str]:
        del config
        return ["tbf", "rate", f"{int(bps)}bit", "burst", "1600", "limit", "100000"]

    config = LinkConfig(trace=Trace([(0, 4e6), (600_000_000, 2e6)], 10_000_000_000), delay_ns=DELAY_NS)
    addresses = (CLIENT_ADDRESS, SERVER_ADDRESS)
    netem = has_netem()
    relay = NetemRelay(config, config, addresses=addresses, discipline=discipline if netem else bucket)
    async with relay:
        shown = ["tc", "qdisc", "show", "dev", relay.command("client", ["true"])[3][:-1] + "a"]
        before = subprocess.run(relay.command("client", shown), capture_output=True, text=True, check=True).stdout
        times = await round_trips(relay)
        await asyncio.sleep(max(0.0, 1.0 - relay.time.since_ns() / 1e9))
        after = subprocess.run(relay.command("client", shown), capture_output=True, text=True, check=True).stdout
    assert "rate 4Mbit" in before
    assert "rate 2Mbit" in after, "the trace's step was followed"
    if netem:  # the bucket lets a packet pass at once that comes alone
        assert times[5] + 1.0 >= 2 * 1052 * 8 / 4e3 + 60
    assert not own_namespaces()


@pytest.mark.parametrize("lacks", ["ip", "netns", "tc", ""])
def test_netem_is_looked_for_and_its_lack_is_no_error(lacks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spaces: set[str] = set()

    def ip(*words: str) -> str:
        if lacks == "ip":
            raise FileNotFoundError("ip")
        if lacks == "netns" or (lacks == "tc" and "tc" in words):
            raise subprocess.CalledProcessError(1, words)
        if words[:2] == ("netns", "add"):
            spaces.add(words[2])
        if words[:2] == ("netns", "del"):
            spaces.remove(words[2])
        return ""

    monkeypatch.setattr("deploy.testbed.real.netem.ip", ip)
    assert has_netem() is (lacks == "")
    assert not spaces, "the namespace it was tried in is gone"


@pytest.mark.parametrize(("netem", "name"), [(True, "netem"), (False, "tun")])
def test_the_relay_is_the_kernels_own_where_it_has_one(netem: bool, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LinkConfig(trace=constant(2e6))
    monkeypatch.setattr("deploy.testbed.real.relay.why_not", lambda: "")
    monkeypatch.setattr("deploy.testbed.real.relay.has_netem", lambda: netem)
    assert open_relay(config, config).name == name
    monkeypatch.setattr("deploy.testbed.real.relay.why_not", lambda: "no root")
    with pytest.raises(ConfigError, match="no root; use --mode shape"):
        open_relay(config, config)
