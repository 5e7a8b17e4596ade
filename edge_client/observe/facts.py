"""What a run's summary says beside its frames: source, prefilter, memory; as data and as lines for people."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from edge_client.capture.sources import Source, SourceFaults
from edge_client.gates.interest import InterestGate
from protos.text import printable


def source_facts(faults: SourceFaults) -> dict[str, Any]:
    """What the source could not give."""
    return {
        "unreadable_files": len(faults.unreadable),
        "left_out_files": len(faults.left_out),
        "source_faults": str(faults) or None,
    }


def prefilter_facts(gate: InterestGate | None) -> dict[str, Any] | None:
    """What the prefilter promised, and what became of it; None: there was none."""
    if gate is None:
        return None
    return {
        "interest": list(gate.promise.interest), "recall_promised": gate.promise.recall, "threshold": gate.threshold,
        "stopped": gate.stopped, "live_recall": gate.live_recall, "loosened": gate.loosened,
    }  # fmt: skip


def fact_lines(facts: Mapping[str, Any]) -> str:
    """The last lines of the summary, for people."""
    more = [f"{facts[key]} {text}" for key, text in (
        ("late_results", "results came too late"), ("reconnects", "reconnects"), ("bundle_switches", "bundle switches"),
        ("unreadable_files", "unreadable files left out"), ("left_out_files", "files that are no pictures left out"),
    ) if facts[key]]  # fmt: skip
    model = f"\nmodel    {printable(facts['model'])} ({str(facts['bundle_sha256'])[:12]})" if facts["model"] else ""
    also = f"\nalso     {', '.join(more)}" if more else ""
    gone = f"\nserver   none at the end: {facts['server_error']}" if facts["server_error"] else ""
    lacks = f"\nsource   {facts['source_faults']}" if facts["source_faults"] else ""
    return f"{model}{also}{lacks}{gone}\nmemory   {facts['peak_memory_bytes'] / 2**20:.0f} MiB at its peak"


def shown_name(source: Source) -> str:
    """What people call a camera that nobody named: a file by its name alone."""
    return source.shown if source.camera else Path(source.shown).name


def peak_memory_bytes() -> int:
    """The most memory this process held. Not ``ru_maxrss`` where that can be avoided: it begins with the parent's."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
