"""From time to time: every bundle fitted to what was seen, and rolled out by its new hash while the server runs."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import sys
import tempfile
from pathlib import Path

from edge_server.adapting.fit import save_runs
from edge_server.adapting.seen import Run, Seen
from edge_server.loading import Loading
from edge_server.models import Model, ModelStore
from protos.errors import HeadtailError

log = logging.getLogger(__name__)

LEAST_RUNS = 12


class Adapting:
    """Keeps bundles fitted.

    Args:
        folder: where the fitted copies lie; made where it is absent.
        every_s: between two fits.
        store: the models.
        loading: puts fitted copies into use.
        seen: what the server decoded.
        least_runs: of a bundle, before it is fitted.
    """

    def __init__(
        self, folder: Path, every_s: float, store: ModelStore, loading: Loading, seen: Seen, least_runs: int = LEAST_RUNS
    ) -> None:
        self._folder, self._every_s, self._least_runs = folder, every_s, least_runs
        self._store, self._loading, self._seen = store, loading, seen

    @staticmethod
    def sample(folder: Path | None) -> Seen | None:
        """Where what is decoded is kept; None: there is no folder, and nothing is."""
        return Seen() if folder is not None else None

    async def run(self) -> None:
        """For as long as the server runs."""
        while True:
            await asyncio.sleep(self._every_s)
            for model in self._store.all():
                try:
                    await self.adapt(model)
                except HeadtailError as error:
                    log.warning("%s was not fitted to what its cameras show: %s", model.name, error.message)
                except OSError as error:
                    log.warning("%s was not fitted to what its cameras show: %s", model.name, error)

    async def adapt(self, model: Model) -> Model | None:
        """Fits one bundle; returns what replaced it, None where nothing did.

        Raises:
            HeadtailError: the fitted copy cannot be loaded.
            OSError: the folder cannot be written.
        """
        runs = self._seen.runs(model.sha256)
        if len(runs) < self._least_runs or not model.codec.supports_reference:
            return None
        loop = asyncio.get_running_loop()
        with tempfile.TemporaryDirectory() as scratch:
            sample = Path(scratch) / "runs.npz"
            copy = await loop.run_in_executor(None, self._copied, model, runs, sample)
            child = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "edge_server.adapting.fit", str(copy), str(sample),
                stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            )  # fmt: skip
            try:
                out, told = await child.communicate()
            except asyncio.CancelledError:
                child.kill()
                await child.wait()
                raise
        if child.returncode != 0:
            reason = told.decode(errors="replace").strip().splitlines()[-1:] or [f"the fit ended with {child.returncode}"]
            log.warning("%s was not fitted to what its cameras show: %s", model.name, reason[0])
        found = json.loads(out) if child.returncode == 0 else {"sha256": model.sha256}
        self._seen.forget(model.sha256)
        if found["sha256"] == model.sha256:
            await loop.run_in_executor(None, shutil.rmtree, copy, True)
            return None
        place = copy.with_name(f"{model.name}-{found['sha256'][:12]}")
        await loop.run_in_executor(None, self._settled, copy, place, model)
        fresh = await self._loading.replace(model, place)
        log.info("%s: fitted to what its cameras show, %.0f → %.0f bytes in the test", model.name, found["before"], found["after"])
        return fresh

    def _copied(self, model: Model, runs: list[Run], sample: Path) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        copy = self._folder / f"{model.name}.new"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(model.bundle.path, copy)
        save_runs(sample, runs)
        return copy

    def _settled(self, copy: Path, place: Path, old: Model) -> None:
        """The copy at its place; of earlier ones only that in use stays."""
        shutil.rmtree(place, ignore_errors=True)
        copy.rename(place)
        for other in self._folder.glob(f"{old.name}-{'[0-9a-f]' * 12}"):
            if other not in (place, old.bundle.path):
                shutil.rmtree(other, ignore_errors=True)
