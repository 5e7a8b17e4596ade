"""`splitters adapt`: a bundle's codec fitted to one site's video."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from protos.errors import ConfigError
from splitters.bundle import Bundle, open_bundle
from splitters.cli import main
from splitters.codec import LearnedCodec, learned_spec
from splitters.codec.fit import fit_tables
from splitters.evaluation.measure import Device
from splitters.evaluation.run import open_codec
from splitters.runtime.preprocess import input_image
from tests.fakes.detector_bundle import write_cell_detector
from tests.unit.test_video_evaluation import frames, write_clip

av = pytest.importorskip("av")


def with_learned_codec(bundle: Bundle) -> Bundle:
    """The same bundle with a learned codec that has no tables of predicted frames."""
    raise NotImplementedError
