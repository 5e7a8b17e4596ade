"""A bundle's local model on frames: the whole model that the device carries for when no server answers."""

from __future__ import annotations

from collections.abc import Callable

from protos.messages import Answer
from splitters.bundle import Bundle
from splitters.runtime.sessions import open_graph
from splitters.tasks.base import open_task
from splitters.tasks.preprocess import Frame, preprocess


def open_local(bundle: Bundle) -> Callable[[Frame], Answer] | None:
    """From a BGR frame to the local model's answer; None where the bundle has none."""
    model = bundle.manifest.local
    if model is None:
        return None
    run = open_graph(bundle.part_path(model.path))
    spec, task = model.preprocess, open_task(bundle.manifest, local=True)

    def answer(frame: Frame) -> Answer:
        return task.decode(run([preprocess(frame, spec)]), [(frame.shape[1], frame.shape[0])])[0]

    return answer
