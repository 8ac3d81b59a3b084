"""Load an unpacked archive as a TorchServe worker does, ask it a batch, and write its replies: a program, run alone.

    PYTHONPATH=UNPACKED python marten/archive_probe.py UNPACKED REQUESTS REPORT.json

Each file in the folder REQUESTS is the body of one request; together they are one batch, in the order of their names.
The report holds the worker's "replies", one for each, and the network's "outputs", one row for each picture that
reached it: a saturated softmax hides what its inputs show. It needs ts alone and runs on Python 3.9, so that any
interpreter, the official image's too, can be asked.
"""

from __future__ import annotations

import importlib
import json
import struct
import sys
from pathlib import Path
from typing import Any


def main(folder: Path, requests: Path, report: Path) -> None:
    """Ask the archive unpacked in `folder`, and write what it said."""
    import ts
    from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl
    from ts.model_loader import TsModelLoader

    manifest = json.loads((folder / "MAR-INF" / "MANIFEST.json").read_text(encoding="utf-8"))["model"]
    bodies = [path.read_bytes() for path in sorted(requests.iterdir())]
    metrics = MetricsCacheYamlImpl(str(Path(ts.__file__).parent / "configs" / "metrics.yaml"))
    metrics.initialize_cache()
    metrics.model_name = manifest["modelName"]
    importlib.import_module(Path(manifest["handler"]).stem)  # ts would hide its ImportError behind one of its own
    service = TsModelLoader().load(
        manifest["modelName"], str(folder), manifest["handler"], None, len(bodies), None, True, metrics
    )
    service.set_cl_socket(None)
    outputs = record_outputs(service._entry_point.__self__)
    batch = [
        {
            "requestId": bytearray(str(i).encode()),
            "headers": [],
            "parameters": [{"name": "body", "contentType": "application/octet-stream", "value": bytearray(body)}],
        }
        for i, body in enumerate(bodies)
    ]
    replies = read_replies(bytes(service.predict(batch)))
    report.write_text(json.dumps({"replies": replies, "outputs": outputs}), encoding="utf-8")


def record_outputs(handler: Any) -> list[list[float]]:
    """Keep a copy of everything that a handler's `postprocess` will be given; the list fills as it answers."""
    outputs: list[list[float]] = []
    postprocess = handler.postprocess

    def recording(logits_NK: Any) -> Any:
        outputs.extend(logits_NK.tolist())
        return postprocess(logits_NK)

    handler.postprocess = recording
    return outputs


def read_replies(message: bytes) -> list[dict[str, Any]]:
    """Read what a worker sends back to the server.

    Source: create_predict_response in ts/protocol/otf_message_handler.py.

    Returns:
        {"id", "code", "phrase", "content_type", "headers", "body"} for each request; JSON bodies are parsed.
    """
    position = 0

    def number() -> int:
        nonlocal position
        (value,) = struct.unpack_from("!i", message, position)
        position += 4
        return int(value)

    def text() -> str:
        nonlocal position
        length = number()
        position += length
        return message[position - length : position].decode("utf-8")

    number(), text()  # of the batch as a whole; the server looks at each request's own
    replies: list[dict[str, Any]] = []
    while True:
        length = number()
        if length < 0:
            return replies
        name = message[position : position + length].decode("utf-8")
        position += length
        content_type, code, phrase = text(), number(), text()
        headers = {text(): text() for _ in range(number())}
        body: Any = text()
        if content_type == "application/json":
            body = json.loads(body)
        replies.append(
            {
                "id": name,
                "code": code,
                "phrase": phrase,
                "content_type": content_type,
                "headers": headers,
                "body": body,
            }
        )


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: nothing of the repository may be importable
    main(*(Path(word).resolve() for word in sys.argv[1:4]))
