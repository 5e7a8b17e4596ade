"""A bundle's local model on frames: the whole model that the device carries for when no server answers."""

from __future__ import annotations

from collections.abc import Callable

from protos.messages import Answer
from splitters.bundle import Bundle
from splitters.runtime.sessions import open_graph
from splitters.tasks.postprocess import build_postprocess
from splitters.tasks.preprocess import Frame, preprocess


def open_local(bundle: Bundle) -> Callable[[Frame], Answer] | None:
    """From a BGR frame to the local model's answer; None where the bundle has none."""
    model = bundle.manifest.local
    if model is None:
        return None
    run = open_graph(bundle.part_path(model.path))
    spec, post = model.preprocess, dict(bundle.manifest.postprocess)
    read = build_postprocess(post, spec)
    # Where a local model gives boxes and scores, its boxes are decoded already.
    decoded = build_postprocess({**post, "kind": "dense_boxes"}, spec) if post.get("kind") == "yolox" else read

    def answer(frame: Frame) -> Answer:
        outputs = run([preprocess(frame, spec)])
        return (decoded if len(outputs) > 1 else read)(outputs, [(frame.shape[1], frame.shape[0])])[0]

    return answer
