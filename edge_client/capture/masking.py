"""Cameras take passwords in their URLs; people see none of them."""

from __future__ import annotations

import re

_HOST = re.compile(r"[A-Za-z0-9._-]+(:[0-9]+)?|\[[0-9A-Fa-f:.%]+\](:[0-9]+)?")


def shown_url(url: str) -> str:
    """A URL's scheme and host, and nothing else: cameras take secrets as user, password, path and query.

    People type passwords with ``/``, ``?``, ``#`` and ``@`` in them, and then no parser tells password from host. Where it is not
    certain what the host is, it is left out, too.
    """
    scheme, _, rest = url.partition("://")
    before, at, after = rest.rpartition("@")
    host = re.split(r"[/?#]", after, maxsplit=1)[0]
    if (at and re.search(r"[/?#\\]", before)) or not _HOST.fullmatch(host):
        return f"{scheme.lower()}://…"
    return f"{scheme.lower()}://{host}" + ("/…" if len(after) > len(host) else "")


def hide_secrets(text: str) -> str:
    """Text from a command line with whatever may be a camera's URL made safe to show."""
    return re.sub(r"\S+", lambda m: _without_secret(m[0]), text)


def _without_secret(word: str) -> str:
    if ":/" not in word and "@" not in word:
        return word
    return shown_url(word) if "://" in word else "…"


def may_hold_secret(text: str) -> bool:
    """Whether text that names no file may be a mistyped URL with a password in it."""
    return bool(re.search(r"[@?=]|^[A-Za-z][A-Za-z0-9+.-]+:/|^(rtsp|rtmp|http|srt|udp|tcp)s?\b", text, re.IGNORECASE))
