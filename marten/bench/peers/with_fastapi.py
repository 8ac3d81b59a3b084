"""FastAPI behind uvicorn, as its page on uploaded files has it: python -m marten.bench.peers.with_fastapi."""

from __future__ import annotations

import uvicorn
from fastapi import FastAPI, UploadFile

from marten.bench.peers.answering import Order, build


def create_app() -> FastAPI:
    """The application of one worker process."""
    answerer = build(Order.found())

    def predict(file: UploadFile) -> dict[str, float]:  # no coroutine: FastAPI gives such work to its threads
        return answerer.answers([file.file.read()])[0]

    app = FastAPI()
    app.post("/predict")(predict)
    return app


if __name__ == "__main__":
    order = Order.found()
    name = "marten.bench.peers.with_fastapi:create_app"
    uvicorn.run(
        name,
        factory=True,
        port=order.port,
        workers=order.workers,
        log_level="warning",
        timeout_worker_healthcheck=120,  # of the usual 5 s, loading torch alone takes more
    )
