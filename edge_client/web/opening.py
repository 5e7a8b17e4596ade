"""Opens the page where ``--web`` asks for one; the only module that the rest of the client needs to know."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge_client.control import Controller, Policy
from edge_client.frames import NS_PER_MS
from edge_client.web.history import LinkEstimate
from protos.web.address import needing_aiohttp, page_address

if TYPE_CHECKING:
    from edge_client.web.page import LivePage


def open_page(listen: str) -> LivePage:
    """The page of ``--web``, not yet listening.

    Raises:
        MissingDependencyError: aiohttp is not installed.
        ConfigError: no address; or others can reach it and no token is set.
    """
    with needing_aiohttp():
        from edge_client.web.page import LivePage
    return LivePage(*page_address(listen))


def link_estimate(policy: Policy) -> LinkEstimate | None:
    """What a policy believes of the link; None: it is another one than ours, and does not say."""
    if not isinstance(policy, Controller):
        return None
    estimator = policy.estimator
    return LinkEstimate(bitrate_bps=estimator.delivery_bps, rtt_ms=estimator.rtt_ns(0.5) / NS_PER_MS)
