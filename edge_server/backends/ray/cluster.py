"""A Ray cluster as one door sees it: joined or started, applications deployed, shared and deleted.

The methods block; they run in threads. Every call into Ray goes through `_Gate`: Ray connects again on the first call after its
shutdown, which left a second cluster behind where a deployment was still waited for.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psutil

from edge_server.backends.ray.bundles import files_of
from edge_server.backends.ray.imports import ray, serve
from edge_server.backends.ray.register import TURN_S, Use, open_register
from edge_server.config import RayConfig
from protos.errors import ConfigError, DrainingError, ModelError
from splitters.bundle import Bundle

log = logging.getLogger(__name__)

_POLL_S = 0.2
_SAID_AFTER_S = 5.0  # a start takes that long; what takes longer is explained
_CALL_S = 30.0
_CLOSE_S = 0.5
_READY = ("RUNNING", "UNHEALTHY")  # states in which an application is used as it is


class _Gate:
    """Lets calls into Ray through until it is shut; whoever shuts it waits for those under way."""

    def __init__(self) -> None:
        self.shut = threading.Event()
        self._lock = threading.Condition()
        self._inside = 0

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if self.shut.is_set():
                raise DrainingError("the server is shutting down")
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                self._lock.notify_all()

    def close(self, patience_s: float) -> bool:
        """Whether nobody is inside any more."""
        with self._lock:
            self.shut.set()
            return self._lock.wait_for(lambda: not self._inside, patience_s)


class Cluster:
    """See the module.

    Args:
        config: which cluster, and how long a deployment may take.
    """

    def __init__(self, config: RayConfig) -> None:
        self._config = config
        self._door = uuid.uuid4().hex
        self._gate = _Gate()
        self._deploying = threading.Lock()
        self._ours = False
        self._register: Any = None
        self._nodes: list[psutil.Process] = []  # started here

    def connect(self) -> None:
        """Joins the cluster, or starts one on this machine when no address is given.

        Raises:
            ConfigError: no cluster answers at the address.
        """
        with self._gate():
            if not ray.is_initialized():
                self._begin()
            self._register = open_register()
        with self._turn("serve", time.monotonic() + self._config.deploy_s), self._gate():  # of two that start Serve one fails
            serve.start(proxy_location="Disabled")

    def _begin(self) -> None:
        self._ours = not self._config.address
        if self._ours and os.environ.pop("RAY_ADDRESS", None) is not None:  # of a cluster that may be gone; Ray would join it
            log.warning("RAY_ADDRESS is not used: a cluster is started on this machine; --ray-address names one to join")
        options: dict[str, Any] = (
            {"address": self._config.address}
            if self._config.address
            else {"address": "local", "include_dashboard": False, "num_cpus": self._config.cpus}
        )
        try:
            ray.init(log_to_driver=False, configure_logging=False, namespace="headtail", **options)
        except Exception as error:  # Ray raises bare ones as well, for a cluster that takes too long to start
            raise ConfigError(
                f"no Ray cluster can be joined at {self._config.address or 'this machine'}: {error}; a cluster's token goes "
                "into RAY_AUTH_TOKEN, beside RAY_AUTH_MODE=token"
            ) from error

        if self._ours:
            self._nodes = [child for child in psutil.Process().children() if child.name() == "raylet"]

    def lost(self) -> str:
        """How the node that was started here has ended; empty: it runs, or is not ours."""
        for node in self._nodes:
            with contextlib.suppress(psutil.TimeoutExpired):
                code = node.wait(timeout=0)
                return f"this machine's Ray node (raylet, process {node.pid}) has ended{'' if code is None else f' with {code}'}"
        return ""

    # ------------------------------------------------------------ applications

    def found(self, name: str) -> Any:
        """The handle of an application that runs, or that somebody is just starting; None: there is none."""
        if self._state(name) is None:
            return None
        return self._wait(name, time.monotonic() + self._config.deploy_s)

    def deploy(self, name: str, build: Callable[[], serve.Application]) -> Any:
        """The application's handle. Of several doors that start together one deploys, the others find it done.

        Raises:
            ModelError: it did not start in time, or failed to; the message says what was missing.
        """
        until_s = time.monotonic() + self._config.deploy_s
        with self._turn(name, until_s) as prolong:
            with self._deploying:  # a door loads bundles in several threads, and Serve cannot make two applications at a time
                ours = self._state(name) is None
                if ours:
                    target = serve.RunTarget(build(), name=name, route_prefix=None)
                    with self._gate():
                        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
            try:
                handle = self._wait(name, until_s, prolong)
            except ModelError:
                if ours:  # else it would start some time later, when nobody waits for it
                    self._delete(name)
                raise
        if handle is None:
            raise ModelError(f"{name} was deleted while it was started")
        return handle

    def missing(self, names: Sequence[str]) -> set[str]:
        """Those of the applications that are not there any more."""
        with self._gate():
            there = serve.status().applications
        return {name for name in names if name not in there or there[name].status.value == "DELETING"}

    def _state(self, name: str) -> Any:
        """An application's state; None: there is none, or it is past being waited for."""
        with self._gate():
            state = serve.status().applications.get(name)
        return None if state is None or state.status.value in ("DELETING", "DEPLOY_FAILED") else state

    def _wait(self, name: str, until_s: float, prolong: Callable[[], None] = lambda: None) -> Any:
        begun_s, said = time.monotonic(), ""
        while True:
            with self._gate():
                state = serve.status().applications.get(name)
                if state is not None and state.status.value in _READY:
                    return serve.get_app_handle(name)
            if state is None:
                return None
            now_s = time.monotonic()
            if state.status.value == "DEPLOY_FAILED":
                raise ModelError(f"{name} cannot start: {self.reasons(name) or state.message}")
            if now_s > until_s:
                raise ModelError(f"{name} did not start within {self._config.deploy_s:g} s: {self._lack(name, state)}")
            if now_s > begun_s + _SAID_AFTER_S and (lack := self._lack(name, state)) != said:
                log.warning("%s is not ready after %.0f s: %s", name, now_s - begun_s, lack)
                said = lack
            prolong()
            self._gate.shut.wait(_POLL_S)

    def _lack(self, name: str, state: Any) -> str:
        """What an application that does not start waits for, as far as can be seen."""
        reasons = self.reasons(name)
        if reasons:
            return reasons
        with self._gate():
            free, all_ = ray.available_resources(), ray.cluster_resources()
        running = sum(d.replica_states.get("RUNNING", 0) for d in state.deployments.values())
        wanted = [(self._config.cpus_per_replica, "CPU"), (self._config.gpus_per_replica, "GPU")]
        needs = [(n, kind, free.get(kind, 0.0), all_.get(kind, 0.0)) for n, kind in wanted if n]
        told = " and ".join(f"{n:g} {kind} ({f:g} of the cluster's {a:g} are free)" for n, kind, f, a in needs)
        advice = (
            "; add nodes, lower --cpus-per-replica or --replicas, or use --tails-per-replica 2, which loads a new bundle into "
            "the replicas there are"
        )
        short = any(f < n for n, _, f, _ in needs)
        return f"{running} of {self._config.replicas[0]} replicas run; each needs {told or 'nothing'}{advice if short else ''}"

    def reasons(self, name: str) -> str:
        """Why replicas of an application cannot start on some node; empty: none is known to have failed."""
        failures = self._asked("failures", name) or {}
        return "; ".join(f"on node {node}, {count} times: {reason}" for node, (count, reason) in sorted(failures.items()))

    def _delete(self, name: str) -> None:
        with self._gate():
            serve.delete(name, _blocking=False)

    # ------------------------------------------------------------ what doors share

    def hand_in(self, bundle: Bundle, app: str) -> None:
        """This door uses an application for a bundle, whose files are there for every node."""
        self.renew([(app, bundle.sha256)], {bundle.sha256: bundle})

    def renew(self, uses: Sequence[Use], bundles: dict[str, Bundle]) -> None:
        """Says what this door uses, and hands in what the register lacks."""
        with self._gate():
            lacking = ray.get(self._register.renew.remote(self._door, list(uses)), timeout=_CALL_S)
        for sha256 in lacking:
            files = files_of(bundles[sha256])
            with self._gate():
                ray.get(self._register.keep.remote(sha256, files), timeout=_CALL_S)

    def leave(self, use: Use, *, delete: bool) -> bool:
        """This door uses an application no more; nobody else does: it is deleted, if that is this door's to do.

        Returns:
            Whether that is settled; else to be asked again.
        """
        with self._gate():
            alone = ray.get(self._register.leave.remote(use, self._door, delete), timeout=_CALL_S)
        if alone and delete:
            self._delete(use[0])
        return alone is not None

    @contextlib.contextmanager
    def _turn(self, what: str, until_s: float) -> Iterator[Callable[[], None]]:
        """In this block of this name there is one door of the cluster at a time, which calls what it is given now and then.

        Raises:
            ModelError: another one has been in it for too long, or the cluster does not say.
        """
        while not (taken := self._take(what)):
            if time.monotonic() > until_s:
                why = "another door has been starting it" if taken is False else "the cluster's register does not answer"
                raise ModelError(f"{what} was not started within {self._config.deploy_s:g} s: {why}")
            self._gate.shut.wait(_POLL_S)
        taken_s = time.monotonic()

        def prolong() -> None:
            nonlocal taken_s
            if time.monotonic() > taken_s + TURN_S / 4:
                self._take(what)
                taken_s = time.monotonic()

        try:
            yield prolong
        finally:
            with contextlib.suppress(DrainingError, ray.exceptions.RayError), self._gate():
                self._register.end_turn.remote(what, self._door)

    def _take(self, what: str) -> bool | None:
        """Whether it is this door's turn; None: the register cannot be reached just now."""
        taken: bool | None = self._asked("take_turn", what, self._door)
        return taken

    def _asked(self, method: str, *args: Any) -> Any:
        """The register's answer; None: it cannot be reached just now, while nodes start on a busy machine or its own one goes."""
        with self._gate():
            try:
                return ray.get(getattr(self._register, method).remote(*args), timeout=_CALL_S)
            except (ray.exceptions.ActorUnavailableError, ray.exceptions.GetTimeoutError) as error:
                log.info("the cluster's register cannot be reached just now: %s", error)
                return None

    # ------------------------------------------------------------ the end

    def close(self) -> None:
        """No call goes into Ray from now on. A cluster that was there before keeps its tails, for other doors."""
        self._gate.close(_CLOSE_S)
        if self._ours and ray.is_initialized():
            for node in self._nodes:
                _end_workers(node)
            ray.shutdown()  # Serve with it; asking Serve to end first takes longer than a server has for its end


def _end_workers(node: psutil.Process) -> None:
    """Everything on a node. Left to themselves some wait a minute for the cluster's head."""
    with contextlib.suppress(psutil.Error):
        for worker in node.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                worker.kill()
