"""Whether sdist and wheel hold every file of the packages that git tracks, and nothing that is no part of them.

usage: check_package.py FOLDER
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

PACKAGES = ("edge_client", "edge_server", "splitters", "protos", "deploy")
# The files of `deploy` that only a checkout needs.
ONLY_PYTHON = "deploy"


def main() -> int:
    """Prints what is missing or too much; returns the exit code."""
    folder = Path(sys.argv[1])
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    tracked = subprocess.run(["git", "ls-files", *PACKAGES], capture_output=True, text=True, check=True).stdout.split("\n")
    wanted = {f for f in tracked if f and (f.endswith(".py") or not f.startswith(ONLY_PYTHON))}
    held = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    with tarfile.open(sdist) as archive:
        source = {name.partition("/")[2] for name in archive.getnames()}
    wrong = {
        "missing in the wheel": wanted - held,
        "missing in the sdist": wanted - source,
        "too much in the wheel": {n for n in held if n.partition("/")[0] not in PACKAGES or "__pycache__" in n},
    }
    for what, files in wrong.items():
        if files:
            print(f"{what}: {', '.join(sorted(files)[:20])}")
    print(
        f"{wheel.name}: {len(held)} files, {wheel.stat().st_size / 1e6:.1f} MB; {sdist.name}: {sdist.stat().st_size / 1e6:.1f} MB"
    )
    return any(wrong.values())


if __name__ == "__main__":
    sys.exit(main())
