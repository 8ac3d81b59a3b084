"""BentoML, as its quickstart has it: python -m bentoml serve marten.bench.peers.with_bentoml:Classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import bentoml
from bentoml.validators import ContentType

from marten.bench.peers.answering import Order, build

ORDER = Order.found()


@bentoml.service(workers=ORDER.workers)
class Classifier:
    """What each worker runs."""

    def __init__(self) -> None:
        self._answerer = build(ORDER)

    @bentoml.api
    def predict(self, picture: Annotated[Path, ContentType("image/jpeg")], /) -> dict[str, float]:
        """Answer the picture that is the request's body; BentoML hands it over as a file."""
        return self._answerer.answers([picture.read_bytes()])[0]
