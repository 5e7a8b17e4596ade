"""The device's control loop: pure functions of time and acknowledgements, no I/O.

Use, with every time in nanoseconds of the caller's monotonic clock::

    controller = Controller(ControlConfig(fps=10), points, local=local, offloads=offloads, head_ms=measured)
    controller.on_connect(now_ns)                           # welcome arrived
    match controller.decide(frame_id, now_ns, deadline_ns): # once a frame, when the device is free for it
        case Split(point_id=...): ...                       # run the head, then per layer:
            if controller.may_send(frame_id, len(layer), now_ns, deadline_ns, layer=i):
                controller.on_sent(frame_id, len(layer), now_ns)
        ...
    controller.on_ack(frame_id, now_ns, server_ns)          # any result, late ones too
"""

from edge_client.control.budget import GrantBudget
from edge_client.control.config import ControlConfig
from edge_client.control.controller import Controller
from edge_client.control.decision import Candidate, Decision, Explanation, Local, LocalOption, Offload, Skip, Split
from edge_client.control.estimating.estimator import Estimator
from edge_client.control.estimating.window import CreditWindow
from edge_client.control.policy import Policy
from splitters.bundle.offload import OffloadOption

__all__ = [
    "Candidate",
    "ControlConfig",
    "Controller",
    "CreditWindow",
    "Decision",
    "Estimator",
    "Explanation",
    "GrantBudget",
    "Local",
    "LocalOption",
    "Offload",
    "OffloadOption",
    "Policy",
    "Skip",
    "Split",
]
