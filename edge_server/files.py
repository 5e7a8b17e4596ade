"""Small files that the operator names: read with a bound, so that a device or a pipe given by mistake is an error and no hang."""

from __future__ import annotations

import stat
from pathlib import Path

from protos.errors import ConfigError


def read_small(path: Path, what: str, *, most_bytes: int) -> bytes:
    """The bytes of a regular file.

    Args:
        path: where it is.
        what: it is, for the message.
        most_bytes: larger ones are refused.

    Raises:
        ConfigError: it cannot be read, is no regular file, or is too large.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ConfigError(f"cannot read the {what} {path}: it is no regular file")
        with path.open("rb") as file:
            data = file.read(most_bytes + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"cannot read the {what} {path}: {reason}") from error
    if len(data) > most_bytes:
        raise ConfigError(f"the {what} {path} is larger than {most_bytes} bytes")
    return data
