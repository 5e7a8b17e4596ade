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
    post = dict(bundle.manifest.postprocess)
    if post.get("kind") == "yolox":
        post["kind"] = "dense_boxes"  # a local model's boxes are decoded already
    read = build_postprocess(post, model.preprocess)
    spec = model.preprocess

    def answer(frame: Frame) -> Answer:
        return read(run([preprocess(frame, spec)]), [(frame.shape[1], frame.shape[0])])[0]

    return answer
