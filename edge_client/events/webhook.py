"""A webhook: an event is one POST of JSON, signed, and delivered once the server has said 2xx."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import os
import ssl
from urllib.parse import urlsplit

import aiohttp

from edge_client.events.courier import TargetError
from edge_client.events.queue import Message

log = logging.getLogger(__name__)

SECRET_VARIABLE = "HEADTAIL_WEBHOOK_SECRET"  # noqa: S105 - the variable's name
_WHOLE_S = 10.0
_LATER = {408, 409, 423, 425, 429}  # refused now, and worth another try


def sign(secret: str, body: bytes) -> str:
    """The signature header's value: ``sha256=`` and HMAC-SHA256 of the body, in hex."""
    return "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


class WebhookTarget:
    """One address.

    Args:
        url: where to; its path may hold a token, and is never shown.
        ca: certificate authority's file; empty: the system's.
        whole_s: a request that takes longer is given up, and tried again.
    """

    def __init__(self, url: str, *, ca: str = "", whole_s: float = _WHOLE_S) -> None:
        self._url = url
        parts = urlsplit(url)
        self.shown = f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")
        self._secret = os.environ.get(SECRET_VARIABLE, "")
        self._ssl = ssl.create_default_context(cafile=ca or None) if parts.scheme == "https" else True
        self._timeout = aiohttp.ClientTimeout(total=whole_s)

    def send(self, messages: list[Message]) -> int:
        """See ``Target``."""
        return asyncio.run(self._send(messages))

    async def _send(self, messages: list[Message]) -> int:
        taken = 0
        async with aiohttp.ClientSession(timeout=self._timeout) as session:
            for message in messages:
                try:
                    await self._post(session, message.body)
                except TargetError:
                    if taken:
                        return taken  # the next attempt begins with the one that failed
                    raise
                taken += 1
        return taken

    async def _post(self, session: aiohttp.ClientSession, body: bytes) -> None:
        headers = {"Content-Type": "application/json", "User-Agent": "headtail", "X-Headtail-Event": json.loads(body)["id"]}
        if self._secret:
            headers["X-Headtail-Signature"] = sign(self._secret, body)
        try:
            async with session.post(self._url, data=body, headers=headers, allow_redirects=False, ssl=self._ssl) as answer:
                status = answer.status
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise TargetError(str(error) or type(error).__name__) from error
        if 200 <= status < 300:
            return
        if 400 <= status < 500 and status not in _LATER:
            log.error("%s refuses an event for good (%d); it is given up", self.shown, status)
            return
        raise TargetError(f"it answered {status}")

    def close(self) -> None:
        """See ``Target``; nothing stays open between two batches."""
