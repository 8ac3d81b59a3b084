"""LitServe, as its quickstart has it: python -m marten.bench.peers.with_litserve."""

import base64
from typing import Any

import litserve
from fastapi import Request  # LitServe looks at the annotation itself, which therefore may not be text

from marten.bench.peers.answering import BATCH, OURS, WAIT_S, Order, build


class Classifier(litserve.LitAPI):
    """Four steps, of which LitServe calls two in its front process and two in a worker."""

    def setup(self, device: str) -> None:
        """Load the network, once in each worker."""
        self._answerer = build(Order.found())

    def decode_request(self, request: Request) -> bytes:
        """The picture out of a request's JSON."""
        return base64.b64decode(request["image"])

    def predict(self, x: Any) -> Any:
        """Answer one picture, or a batch of them where batches are asked for."""
        return self._answerer.answers([x])[0] if isinstance(x, bytes) else self._answerer.answers(x)

    def encode_response(self, output: Any) -> Any:
        """The answer as it is."""
        return output


if __name__ == "__main__":
    order = Order.found()
    api = Classifier(max_batch_size=BATCH, batch_timeout=WAIT_S) if order.way == OURS else Classifier()
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=order.workers)
    server.run(host="127.0.0.1", port=order.port, generate_client_file=False, log_level="warning")
