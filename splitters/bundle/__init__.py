"""The bundle: the directory that a model is shipped as, and what it says of itself."""

from splitters.bundle.bundle import (
    OFFLOADS,
    POINTS,
    Bundle,
    BundleWriter,
    Measure,
    Measured,
    cache_dir,
    exported_path,
    open_bundle,
    replace_parts,
    rewrite_points,
    sha256_file,
    sha256_hex,
    verify_part,
)
from splitters.bundle.manifest import MANIFEST

__all__ = [
    "MANIFEST",
    "OFFLOADS",
    "POINTS",
    "Bundle",
    "BundleWriter",
    "Measure",
    "Measured",
    "cache_dir",
    "exported_path",
    "open_bundle",
    "replace_parts",
    "rewrite_points",
    "sha256_file",
    "sha256_hex",
    "verify_part",
]
