"""The tests. What runs here reports to nobody, whichever import comes first (see ``splitters``)."""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
