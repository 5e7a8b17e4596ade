"""A bundle's tables fitted to the runs that a server saw, in a process of its own: ``python -m edge_server.adapting.fit``.

A server sees symbols, not latents. Within its step each value could have been anything, so it is given one place there, the same
in all frames of a run until the symbol changes: what stood still at the camera stands still at every finer tier too.

Shape legend: T frames, C channels, H x W cells.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_server.adapting.seen import Run
from protos.errors import ConfigError, HeadtailError
from protos.schema import read_json
from splitters.bundle import Bundle, open_bundle, replace_parts
from splitters.codec import LatentCodec
from splitters.codec.fitting.fit import refit_predicted
from splitters.codec.learned import LearnedCodec
from splitters.codec.learned_spec import check_learned, tier_prices

_TESTED = 4  # one run in this many tests
_GAIN = 0.02  # of the tested runs' bytes: less is not worth a download
_NICE = 10


def fit(bundle: Bundle, runs: Sequence[Run], seed: int = 0) -> tuple[int, int]:
    """Fits a bundle's tables of predicted frames, in place, where that helps.

    Args:
        bundle: with a learned codec; altered only where the runs kept back take at least 2 % fewer bytes.
        runs: of what was decoded.
        seed: of the places within the steps.

    Returns:
        Bytes of the predicted frames of the runs kept back, before and after.

    Raises:
        ConfigError: another codec, too few runs, or nothing moves in them.
    """
    spec = read_json(bundle.read_part(bundle.manifest.codec), dict[str, Any], what=bundle.manifest.codec)
    check_learned(spec, bundle.manifest.name)
    if len(runs) < _TESTED:
        raise ConfigError(f"{len(runs)} runs are too few to fit on and to test with")
    rng = np.random.default_rng(seed)
    tiers = {str(p["id"]): int(p["tier"]) for p in spec["points"]}
    gains = np.asarray(spec["gains"], np.float64)
    latents = [latents_of(run.values, np.asarray(spec["ungains"], np.float32)[tiers[run.point_id]], rng) for run in runs]
    old = bundle.read_part(spec["tables"])
    learned = [clip for i, clip in enumerate(latents) if i % _TESTED]
    part = refit_predicted(old, learned, gains, prices=tier_prices(spec))
    tested = list(range(0, len(runs), _TESTED))
    sizes: list[int] = []
    for tables in (old, part):
        codec = LearnedCodec(spec, tables)
        sizes.append(sum(_bytes(codec, latents[i], runs[i].point_id) for i in tested))
    if sizes[1] < (1 - _GAIN) * sizes[0]:
        replace_parts(bundle, {spec["tables"]: part})
    return sizes[0], sizes[1]


def latents_of(values: NDArray[np.int16], ungain: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Latents (T, C, H, W) that could have been quantised to symbols ``values`` with one step a channel (C,)."""
    place = rng.uniform(-0.5, 0.5, values.shape[1:])
    found = np.empty(values.shape, np.float32)
    for t, now in enumerate(values):
        if t:
            moved = now != values[t - 1]
            place[moved] = rng.uniform(-0.5, 0.5, int(moved.sum()))
        found[t] = (now + place) * ungain[:, None, None]
    return found


def _bytes(codec: LatentCodec, clip: NDArray[np.float32], point_id: str) -> int:
    """Of a run's frames but the first, each predicted from the one before."""
    held, total = codec.quantise([clip[0]], point_id), 0
    for number, latent in enumerate(clip[1:], 1):
        coded = codec.compress([latent], point_id, held, number - 1)
        held = coded.symbols
        total += sum(map(len, coded.payloads))
    return total


def main(arguments: Sequence[str] | None = None) -> int:
    """Bundle and runs (``.npz``) to a line of JSON; an error is one line and its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("runs", type=Path)
    args = parser.parse_args(arguments)
    try:
        with np.load(args.runs) as held:
            points = [str(name) for name in held["points"]]
            runs = [Run(point_id=name, values=held[f"run{i}"]) for i, name in enumerate(points)]
        before, after = fit(open_bundle(args.bundle), runs)
    except HeadtailError as error:
        sys.stderr.write(f"{error.message}\n")
        return error.exit_code
    sys.stdout.write(json.dumps({"before": before, "after": after, "sha256": open_bundle(args.bundle).sha256}) + "\n")
    return 0


def save_runs(path: Path, runs: Sequence[Run]) -> None:
    """Writes runs as `main` reads them."""
    arrays = {f"run{i}": run.values for i, run in enumerate(runs)}
    np.savez(path, points=np.array([run.point_id for run in runs]), **arrays)  # type: ignore[arg-type]


if __name__ == "__main__":
    os.nice(_NICE)
    sys.exit(main())
