"""The tail as a LitServe API; a module of its own, since LitServe's workers are spawned and import it."""

import base64
from typing import Any

import litserve as ls

from tests.fakes.http_tails import PinnedTail


class Api(ls.LitAPI):
    """Decodes, batches and answers in LitServe's worker.

    Args:
        bundle: its directory.
        core: of the worker.
        max_batch: frames in one run of the tail.
    """

    def __init__(self, bundle: str, core: int, max_batch: int) -> None:
        super().__init__(max_batch_size=max_batch)
        self._bundle = bundle
        self._core = core

    def setup(self, device: str) -> None:
        self.model = PinnedTail(self._bundle, self._core)

    def decode_request(self, request):  # type: ignore[no-untyped-def]  # unannotated, it is the request's JSON
        return self.model.decode(base64.b64decode(request["payload"]))

    def batch(self, inputs: list[Any]) -> list[Any]:
        return inputs

    def predict(self, batch: Any) -> list[dict[str, Any]]:
        return self.model.run(batch)

    def unbatch(self, output: list[Any]) -> list[Any]:
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        return output
