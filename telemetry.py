"""What a worker tells of its work: metrics for Prometheus, one JSON line for each request, and a Server-Timing header.

It travels in every .mar beside modelspec.py, and runs on Python 3.9 as well.

TorchServe hands a worker's metrics on at its metrics address with `metrics_mode=prometheus` and
`model_metrics_auto_detect=true`. Its histograms have one set of buckets, from 0.005 to 10, so everything here is in
units that fall between: seconds and megabytes. docs/metrics.md lists the names.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import io
import json
import logging
import re
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple

logger = logging.getLogger(__name__)

_ID = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)
_TRACE = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")


@dataclasses.dataclass
class Record:
    """What became of one request.

    Attributes:
        request_id: TorchServe's, which its answer carries as X-Request-Id.
        caller_id: the X-Request-Id that came with the request, from a front door or a client.
        trace_id: of the W3C `traceparent` that came with it, where somebody traces.
        status: HTTP status of the answer.
        size_bytes: of the encoded picture, or pictures; 0 where none was found.
        decode_s, explain_s: spent on this request alone.
        answers: label and probability of what was answered, one for each picture; empty for a refusal.
    """

    request_id: str = ""
    caller_id: str = ""
    trace_id: str = ""
    status: int = 200
    size_bytes: int = 0
    decode_s: float = 0.0
    explain_s: float = 0.0
    answers: List[Tuple[str, float]] = dataclasses.field(default_factory=list)

    def note_answer(self, answer: Mapping[str, Any]) -> None:
        """Keep the likeliest label of a classifier's answer; scores and embeddings have none."""
        shares = [(label, share) for label, share in answer.items() if isinstance(share, float) and label != "score"]
        self.answers += shares[:1]


def new_record(context: Any, i: int) -> Record:
    """Begin the record of a batch's i-th request with the ids that it came with."""
    headers = {str(k).lower(): str(v) for k, v in context.get_all_request_header(i).items()}
    caller = headers.get("x-request-id", "")
    trace = _TRACE.fullmatch(headers.get("traceparent", ""))
    return Record(
        request_id=context.get_request_id(i) or "",
        caller_id=caller if _ID.fullmatch(caller) else "",
        trace_id=trace.group(1) if trace else "",
    )


def tell(context: Any, records: List[Record], forward_s: float, log_requests: bool) -> None:
    """Tell of a batch that has been answered.

    Args:
        context: TorchServe's, of this batch.
        records: one for each request.
        forward_s: that the network took for all of them; 0 when no picture reached it.
        log_requests: write the JSON lines.
    """
    for i, record in enumerate(records):
        parts = "decode;dur={:.2f}, forward;dur={:.2f}".format(record.decode_s * 1000, forward_s * 1000)
        explained = ", explain;dur={:.2f}".format(record.explain_s * 1000) if record.explain_s else ""
        context.set_response_header(i, "Server-Timing", parts + explained)
    with _one_write():
        if log_requests:
            for record in records:
                logger.info(log_line(context.model_name, record, forward_s, len(records)))
        if getattr(context, "metrics", None) is not None:
            _count(context.metrics, records, forward_s)


@contextlib.contextmanager
def _one_write() -> Iterator[None]:
    """Let what is logged meanwhile go out at once, at its end: five lines a picture would each wake TorchServe."""
    found = [handler for handler in logging.getLogger().handlers if type(handler) is logging.StreamHandler]
    if len(found) != 1:  # not TorchServe's worker, who has one, on its standard output
        yield
        return
    lines, stream = io.StringIO(), found[0].stream
    found[0].setStream(lines)
    try:
        yield
    finally:
        found[0].setStream(stream)
        stream.write(lines.getvalue())
        stream.flush()


def log_line(model: str, record: Record, forward_s: float, batch: int) -> str:
    """One request as JSON on one line; deployment/log4j2.xml puts lines that begin so into requests.jsonl."""
    told: Dict[str, Any] = {"request_id": record.request_id}
    told.update({name: value for name in ("caller_id", "trace_id") for value in [getattr(record, name)] if value})
    told.update(model=model, status=record.status, bytes=record.size_bytes, batch=batch)
    told.update(decode_ms=round(record.decode_s * 1000, 2), forward_ms=round(forward_s * 1000, 2))
    if record.explain_s:
        told["explain_ms"] = round(record.explain_s * 1000, 2)
    if record.answers:
        told["answers"] = [{label: round(share, 6)} for label, share in record.answers]
    return json.dumps(told)


def tell_expected(context: Any, counts: Any, version: str, weights_sha256: str) -> None:
    """Tell once, when a model is loaded, what it is and how often each label was seen in training.

    Args:
        context: TorchServe's.
        counts: pictures by label, as the card's `data` has them under "train"; anything else tells nothing.
        version: of the card.
        weights_sha256: of the card.
    """
    if getattr(context, "metrics", None) is None:
        return
    model = {"ModelName": context.model_name, "Level": "Model"}
    _add(
        context.metrics, "GAUGE", "marten_model_info", 1, {**model, "version": version, "weights": weights_sha256[:16]}
    )
    if isinstance(counts, Mapping) and all(type(n) is int and n >= 0 for n in counts.values()) and sum(counts.values()):
        for label, count in counts.items():
            share = count / sum(counts.values())
            _add(context.metrics, "GAUGE", "marten_expected_share", round(share, 6), {**model, "label": label})


def _count(metrics: Any, records: List[Record], forward_s: float) -> None:
    if forward_s:
        _add(metrics, "HISTOGRAM", "marten_forward_seconds", forward_s)
    _add(metrics, "HISTOGRAM", "marten_batch_size", len(records))
    for i, record in enumerate(records):
        if record.size_bytes:
            _add(metrics, "HISTOGRAM", "marten_decode_seconds", record.decode_s, i=i)
            _add(metrics, "HISTOGRAM", "marten_picture_megabytes", record.size_bytes / 1e6, i=i)
        if record.explain_s:
            _add(metrics, "HISTOGRAM", "marten_explain_seconds", record.explain_s, i=i)
        for _, share in record.answers:
            # what is left to certainty: most answers are nearly sure, and the buckets are fine near 0, not near 1
            _add(metrics, "HISTOGRAM", "marten_doubt", 1 - share, i=i)
    for status, count in collections.Counter(record.status for record in records).items():
        _add(metrics, "COUNTER", "marten_responses_total", count, {"status": str(status)})
    labels = collections.Counter(label for record in records for label, _ in record.answers)
    for label, count in labels.items():
        _add(metrics, "COUNTER", "marten_answers_total", count, {"label": label})


def _add(
    metrics: Any, kind: str, name: str, value: float, dimensions: Optional[Mapping[str, str]] = None, i: Any = None
) -> None:
    """Hand one value to TorchServe, which adds the model's name where it is not among the dimensions."""
    from ts.metrics.dimension import Dimension
    from ts.metrics.metric_type_enum import MetricTypes

    # a new list each time: TorchServe appends to the one it is given
    listed = [Dimension(key, _plain(text)) for key, text in (dimensions or {}).items()]
    metrics.add_metric(name, round(value, 6), name.rpartition("_")[2], i, listed, MetricTypes[kind])


def _plain(text: str) -> str:
    """A label's text without the signs that TorchServe's lines of metrics are made of."""
    return re.sub(r"[|#:,\[\]\s]+", " ", text).strip() or "-"
