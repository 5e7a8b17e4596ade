"""Where answers go: ``results.jsonl``, annotated pictures or a clip, a window. In the order of capture."""

from edge_client.sinks.base import InOrder, Labels, Sink
from edge_client.sinks.console import PictureLines
from edge_client.sinks.jsonl import JsonFile, JsonLines, open_json_file
from edge_client.sinks.lines import to_json, to_line
from edge_client.sinks.video import open_video
from edge_client.sinks.window import Window

__all__ = [
    "InOrder",
    "JsonFile",
    "JsonLines",
    "Labels",
    "PictureLines",
    "Sink",
    "Window",
    "open_json_file",
    "open_video",
    "to_json",
    "to_line",
]
