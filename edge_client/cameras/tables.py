"""``[[camera]]`` tables: what stands above them holds for all, what stands in one for that camera."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_client.config import ClientConfig, make_config, read_settings
from edge_client.events.rules import slug
from protos.errors import ConfigError

MAX_CAMERAS = 256
_PROCESS = ("web", "metrics_listen", "json", "display", "frigate", "explain")
_RENAMED = {"name": "camera_id", "source": "camera"}


@dataclass(frozen=True, kw_only=True, slots=True)
class CamerasConfig:
    """Several cameras and what they share.

    Attributes:
        cameras: each camera's own settings, complete; ``web`` and ``metrics_listen`` are None in them.
        web, metrics_listen, json: see ``ClientConfig``; of the process.
    """

    cameras: tuple[ClientConfig, ...]
    web: str | None = None
    metrics_listen: str | None = None
    json: bool = False

    def __post_init__(self) -> None:
        names = [camera.camera_id for camera in self.cameras]
        outputs = [c.output for c in self.cameras if c.output] + [c.save_video for c in self.cameras if c.save_video]
        for what, values in (("name", names), ("output", outputs)):
            twice = {value for value in values if values.count(value) > 1}
            if twice:
                hint = "; {camera} in a path stands for the camera's name" if what == "output" else ""
                raise ConfigError(f"two cameras have the {what} {min(twice)!r}{hint}")

    def metrics_address(self) -> tuple[str, int]:
        """Host and port of the metrics' endpoint."""
        return ClientConfig(camera="synthetic:", metrics_listen=self.metrics_listen).metrics_address()


def read_any(path: Path | None, given: Mapping[str, Any]) -> ClientConfig | CamerasConfig:
    """One camera's settings, or several where the file has tables ``[[camera]]``.

    Raises:
        ConfigError: see ``read_config``; the sentence names the camera.
    """
    what, from_file = read_settings(path)
    tables = from_file.get("camera")
    if not isinstance(tables, list):
        return make_config({**from_file, **given}, what=what)
    if "camera" in given or "camera_id" in given:
        raise ConfigError(f"{what} has tables [[camera]]; --camera and --camera-id do not go with them")
    if not 0 < len(tables) <= MAX_CAMERAS:
        raise ConfigError(f"{what} has {len(tables)} cameras; 1 to {MAX_CAMERAS} are possible")
    common = {**{k: v for k, v in from_file.items() if k != "camera"}, **given}
    shared = {name: common.pop(name) for name in _PROCESS if name in common}
    for name in ("display", "frigate", "explain"):
        if shared.pop(name, None):
            raise ConfigError(f"--{name} is for a single camera; {what} has tables [[camera]]")
    whole = make_config({"camera": "synthetic:", **shared}, what=what)  # checks the addresses
    cameras = tuple(_camera(table, common, f"{what}, camera {i + 1}") for i, table in enumerate(tables))
    return CamerasConfig(cameras=cameras, web=whole.web, metrics_listen=whole.metrics_listen, json=whole.json)


def _camera(table: object, common: Mapping[str, Any], what: str) -> ClientConfig:
    if not isinstance(table, dict):
        raise ConfigError(f"{what} is no table")
    own = {_RENAMED.get(key.replace("-", "_"), key.replace("-", "_")): value for key, value in table.items()}
    for name in ("camera_id", "camera"):
        if not isinstance(own.get(name), str) or not own[name]:
            raise ConfigError(f"{what} needs a name and a source")
    for name in _PROCESS:
        if name in own:
            raise ConfigError(f"{what}: {name} stands above the tables, since it is the whole process's")
    settings = {**common, **own}
    for name in ("output", "save_video"):
        if isinstance(settings.get(name), str):
            settings[name] = settings[name].replace("{camera}", slug(own["camera_id"]))
    return make_config(settings, what=f"{what} ({own['camera_id']!r})")
