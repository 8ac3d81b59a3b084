"""Ray Serve, as its tutorial on PyTorch has it: python -m marten.bench.peers.with_ray."""

from __future__ import annotations

import signal
import sys
from typing import Any

import ray
from ray import serve
from starlette.requests import Request

from marten.bench.peers.answering import BATCH, OURS, WAIT_S, Order, build


class Classifier:
    """What each replica runs."""

    def __init__(self) -> None:
        self._batches = Order.found().way == OURS
        self._answerer = build(Order.found())

    async def __call__(self, request: Request) -> dict[str, float]:
        """Answer the picture that is the request's body."""
        picture = await request.body()
        answer: dict[str, float] = (
            await self._together(picture) if self._batches else self._answerer.answers([picture])[0]
        )
        return answer

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=WAIT_S)
    async def _together(self, pictures: Any) -> Any:
        return self._answerer.answers(pictures)


def main() -> None:
    """Serve until SIGTERM."""
    from marten.bench.peers import with_ray  # replicas find the class by this name, not by __main__

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    order = Order.found()
    ray.init(include_dashboard=False, _temp_dir=order.folder, logging_level="error")
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": order.port})
        # the usual 5 requests at once could never fill a batch
        more = {"max_ongoing_requests": 2 * BATCH} if order.way == OURS else {}
        serve.run(serve.deployment(with_ray.Classifier).options(num_replicas=order.workers, **more).bind())
        signal.pause()
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
