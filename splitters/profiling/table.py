"""What every cut of a model would cost, measured: bytes that cross, work on each side, milliseconds on each side.

>>> table = splitters.profile(model, image)
>>> print(table)
>>> table.best(bitrate_bps=5e6, rtt_ms=30, device_slowdown=8)
Choice(where='cut', name='blocks.1.0', …)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from protos.errors import ConfigError

WORTH = 0.97  # a good cut saves at least 3 % of the bytes of the good cut before it

Where = Literal["local", "cut", "server"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CutCost:
    """One cut and what it costs, for one image.

    Attributes:
        name: the submodule after which the cut lies.
        shapes: of the tensors that cross, without the batch axis.
        float_bytes: crossing bytes as they are.
        int8_bytes: as 8-bit integers.
        zstd_bytes: as 8-bit integers with a scale per channel, zstandard-compressed; on the image given.
        head_macs, tail_macs: multiply-accumulates on each side.
        head_params, tail_params: weights and buffers on each side; those used on both count on both.
        head_ms, tail_ms: ONNX Runtime, one thread, the fastest of several runs.
        head_torch_ms, tail_torch_ms: eager torch, one thread, likewise.
        timed: whether the times were measured here or interpolated between measured neighbours.
        good: no other cut sends fewer compressed bytes for less work on the device, nor does the picture itself.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    float_bytes: int
    int8_bytes: int
    zstd_bytes: int
    head_macs: int
    tail_macs: int
    head_params: int
    tail_params: int
    head_ms: float
    tail_ms: float
    head_torch_ms: float
    tail_torch_ms: float
    timed: bool
    good: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """Where to run a model on a given network, and the latency that is to be expected.

    Attributes:
        where: ``local`` (all on the device), ``cut`` or ``server`` (the picture is sent).
        name: the cut's name; empty otherwise.
        latency_ms: the sum of device, network (round trip and serialisation) and server time.
        device_ms, network_ms, server_ms: its parts.
        sent_bytes: on the wire.
        meets_deadline: whether ``latency_ms`` is within the deadline asked for.
    """

    where: Where
    name: str
    latency_ms: float
    device_ms: float
    network_ms: float
    server_ms: float
    sent_bytes: int
    meets_deadline: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """The table: a row for every candidate cut, in the order of the network.

    Attributes:
        model: its name.
        rows: the cuts.
        input_bytes: the input as 8-bit integers, uncompressed.
        picture_bytes: what sending the picture instead costs (JPEG, quality 90; else the input, 8 bits, zstandard).
        total_macs: of the whole model.
        local_ms: the whole model in ONNX Runtime, one thread.
        local_torch_ms: the whole model in eager torch.
        notes: what limits the table.
    """

    model: str
    rows: tuple[CutCost, ...]
    input_bytes: int
    picture_bytes: int
    total_macs: int
    local_ms: float
    local_torch_ms: float
    notes: tuple[str, ...]

    def choices(
        self, *, bitrate_bps: float, rtt_ms: float, device_slowdown: float = 1.0, deadline_ms: float | None = None
    ) -> list[Choice]:
        """All places to run, fastest first; the arguments are those of :meth:`best`."""
        if not (bitrate_bps > 0 and rtt_ms >= 0 and device_slowdown > 0):
            raise ConfigError("bitrate_bps and device_slowdown must be positive, rtt_ms not negative")

        def choice(where: Where, name: str, device_ms: float, sent_bytes: int, server_ms: float) -> Choice:
            device = device_ms * device_slowdown
            network = 0.0 if where == "local" else rtt_ms + sent_bytes * 8e3 / bitrate_bps
            total = device + network + server_ms
            return Choice(
                where=where, name=name, latency_ms=total, device_ms=device, network_ms=network, server_ms=server_ms,
                sent_bytes=sent_bytes, meets_deadline=deadline_ms is None or total <= deadline_ms,
            )  # fmt: skip

        # Server times are the faster of the two engines there; the device runs ONNX Runtime.
        found = [
            choice("local", "", self.local_ms, 0, 0.0),
            choice("server", "", 0.0, self.picture_bytes, min(self.local_ms, self.local_torch_ms)),
            *(choice("cut", r.name, r.head_ms, r.zstd_bytes, min(r.tail_ms, r.tail_torch_ms)) for r in self.rows),
        ]
        return sorted(found, key=lambda c: c.latency_ms)

    def best(self, bitrate_bps: float, rtt_ms: float, device_slowdown: float = 1.0, deadline_ms: float | None = None) -> Choice:
        """The fastest place to run (Neurosurgeon, Kang et al. 2017), "all local" and "all at the server" included.

        Args:
            bitrate_bps: of the uplink.
            rtt_ms: round-trip time without serialisation.
            device_slowdown: how many times slower the device is than the machine this table was measured on.
            deadline_ms: for ``meets_deadline``; where nothing meets it, the fastest is returned all the same.

        Raises:
            ConfigError: a number is out of range.
        """
        return self.choices(bitrate_bps=bitrate_bps, rtt_ms=rtt_ms, device_slowdown=device_slowdown, deadline_ms=deadline_ms)[0]

    def to_json(self) -> dict[str, Any]:
        """The table as plain JSON types."""
        return asdict(self)

    def _least(self) -> list[CutCost]:
        """The cuts on the frontier of (device work, bytes), whatever the picture costs."""
        most = 1 + max((r.zstd_bytes for r in self.rows), default=0)
        marks = mark_good(
            [r.name for r in self.rows], [r.head_macs for r in self.rows], [r.zstd_bytes for r in self.rows], 2 * most
        )
        return [r for r, is_least in zip(self.rows, marks, strict=True) if is_least]

    def __str__(self) -> str:
        """A table for people: the good cuts first, then all others in the network's order."""
        return self.text()

    def text(self, *, every: bool = True) -> str:
        """A table for people: the good cuts, and with ``every`` the others after them."""
        good = [r for r in self.rows if r.good]
        # Where every cut sends more than the picture, those that come nearest to it are shown, and not marked.
        first = good or self._least()
        shown = [*first, *(r for r in self.rows if r not in first)] if every else first
        width = max([4, *(len(r.name) for r in shown)])
        other = f" or {self.local_torch_ms:.1f} ms (torch)" if self.local_torch_ms != self.local_ms else ""
        title = (
            f"{self.model}: {len(self.rows)} cuts, {self.total_macs / 1e6:,.0f} M MACs, whole model {self.local_ms:.1f} ms "
            f"(ONNX Runtime){other}, picture {self.picture_bytes / 1e3:.1f} kB"
        )
        columns = "tensors  float kB  8 bit kB   zstd kB  head MACs  head params  head ms (torch)    tail ms (torch)"
        lines = [title, f"   {'cut':{width}} {columns}"]
        for r in shown:
            near = "" if r.timed else "~"
            sizes = "".join(f"{b / 1e3:10.1f}" for b in (r.float_bytes, r.int8_bytes, r.zstd_bytes))
            work = f"{100 * r.head_macs / max(1, self.total_macs):9.1f}% {r.head_params:12,}"
            head, tail = (
                f"{near:>1}{runtime:7.2f} ({eager:6.2f})"
                for runtime, eager in ((r.head_ms, r.head_torch_ms), (r.tail_ms, r.tail_torch_ms))
            )
            lines.append(f" {'*' if r.good else ' '} {r.name:{width}} {len(r.shapes):7}{sizes} {work} {head}  {tail}")
        lines.append(
            " * good: no other cut sends fewer bytes for less work on the device" if good
            else " no cut sends less than the picture; these send the least for the work they ask of the device"
        )  # fmt: skip
        if len(shown) < len(self.rows):
            lines.append(f"   {len(self.rows) - len(shown)} others send more for as much work; --all lists them")
        lines += [f" note: {note}" for note in self.notes]
        return "\n".join(lines)


def mark_good(names: Sequence[str], work: Sequence[float], sent_bytes: Sequence[int], picture_bytes: int) -> list[bool]:
    """Which cuts are on the frontier of (device work, bytes) and send less than the picture itself.

    A step of the frontier saves at least 3 %; of cuts that differ by less at the same work, the outermost module's counts.
    """
    good, fewest = [False] * len(work), float(picture_bytes)
    order = sorted(range(len(work)), key=lambda i: (work[i], sent_bytes[i]))
    for i in order:
        if sent_bytes[i] < fewest * WORTH:
            alike = [j for j in order if work[j] == work[i] and sent_bytes[j] * WORTH <= sent_bytes[i]]
            good[min(alike, key=lambda j: (names[j].count("."), j))] = True
            fewest = sent_bytes[i]
    return good
