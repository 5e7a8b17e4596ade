"""Who may see a page: anybody on this machine's own address, and elsewhere whoever has the token.

A page on 127.0.0.1 without a token is still reachable for any website that the same person has open: a name of its own may
resolve to 127.0.0.1 (DNS rebinding). So a page without a token answers only where the browser says that it asked for localhost.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import web

from protos.web.address import TOKEN_VARIABLE, is_loopback

COOKIE: Final = "headtail_page"
LOGIN: Final = "/login"
_WRONG_S = 1.0
_TRIES_AT_A_TIME = 4
_FORM_BYTES = 4096

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Door:
    """Lets requests in or not.

    Args:
        token: what a visitor must know; empty: nothing, but the request must be for this machine's own name.
        login_page: the HTML of the form that asks for the token.
    """

    def __init__(self, token: str, login_page: bytes = b"") -> None:
        self._token = token.encode()
        self._login_page = login_page
        # The cookie is no use for the token, and dies with it.
        self._cookie = hmac.new(self._token, b"headtail page", hashlib.sha256).hexdigest() if token else ""
        self._tries = asyncio.Semaphore(_TRIES_AT_A_TIME)

    def admits(self, request: web.Request) -> bool:
        """Whether this request may see the page."""
        if not self._token:
            return is_loopback(_host_of(request.headers.get("Host", "")))
        kind, _, given = request.headers.get("Authorization", "").partition(" ")
        if kind.lower() == "bearer" and self._is_token(given):
            return True
        return hmac.compare_digest(request.cookies.get(COOKIE, "").encode(), self._cookie.encode())

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.strip().encode(), self._token)

    @web.middleware
    async def guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """A middleware: the form for who is not known, and nothing else."""
        if self.admits(request):
            return await handler(request)
        if not self._token:
            text = f"This page is for this machine only. To see it under another name, set {TOKEN_VARIABLE}."
            return web.Response(status=403, text=text)
        if request.path == LOGIN and request.method == "POST":
            return await self._log_in(request)
        if request.path in ("/", LOGIN) and request.method == "GET":
            return self._form(401 if request.path == "/" else 200)
        if request.path.startswith("/static/"):  # the form's own style
            return await handler(request)
        return web.Response(status=401, text="the token is missing", headers={"WWW-Authenticate": "Bearer"})

    async def _log_in(self, request: web.Request) -> web.StreamResponse:
        if (request.content_length or 0) > _FORM_BYTES:
            return web.Response(status=413, text="too long")
        if self._tries.locked():
            return web.Response(status=429, text="too many attempts at a time", headers={"Retry-After": "2"})
        async with self._tries:
            given = (await request.post()).get("token", "")
            if not isinstance(given, str) or not self._is_token(given):
                await asyncio.sleep(_WRONG_S)  # a guess costs its time
                return self._form(403)
        response = web.HTTPSeeOther("/")
        response.set_cookie(COOKIE, self._cookie, httponly=True, samesite="Strict", secure=request.secure, path="/")
        return response

    def _form(self, status: int) -> web.Response:
        page = self._login_page.replace(b"<!--wrong-->", b"<p role='alert'>That was not it.</p>" if status == 403 else b"")
        return web.Response(status=status, body=page, content_type="text/html", charset="utf-8")


def _host_of(header: str) -> str:
    """A Host header's name, without its port."""
    if header.startswith("["):
        return header.partition("]")[0] + "]"
    return header.partition(":")[0]
