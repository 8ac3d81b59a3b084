"""What a worker tells of its work: records, lines and metrics, as TorchServe's own metrics print them."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from telemetry import Record, log_line, new_record, tell, tell_expected


class Context:
    """What a worker's context offers, for requests with the given headers."""

    model_name = "pets"

    def __init__(self, *headers: dict[str, str], metrics: Any = None) -> None:
        self.headers = headers
        self.metrics = metrics
        self.sent: dict[int, dict[str, str]] = {}

    def get_all_request_header(self, i: int) -> dict[str, str]:
        return self.headers[i]

    def get_request_id(self, i: int) -> str:
        return f"id-{i}"

    def set_response_header(self, i: int, name: str, value: str) -> None:
        self.sent.setdefault(i, {})[name] = value


@pytest.fixture
def metrics() -> Any:
    import ts
    from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl

    made = MetricsCacheYamlImpl(str(Path(ts.__file__).parent / "configs" / "metrics.yaml"))
    made.initialize_cache()
    made.model_name = "pets"
    made.request_ids = {0: "id-0", 1: "id-1"}
    return made


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Metrics as they were printed, up to what TorchServe adds: name.unit:value|#dimensions|#type."""
    said = [record.getMessage() for record in caplog.records]
    return [text.partition("|#hostname")[0].removeprefix("[METRICS]") for text in said if text.startswith("[METRICS]")]


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        ({"cat": 0.75, "dog": 0.25}, [("cat", 0.75)]),
        ({"score": 3.5}, []),
        ({"embedding": [0.5, 0.25]}, []),
    ],
)
def test_the_likeliest_label_is_kept(answer: dict[str, Any], kept: list[tuple[str, float]]) -> None:
    record = Record()
    record.note_answer(answer)
    assert record.answers == kept


def test_ids_of_the_caller_are_kept() -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    record = new_record(Context({"x-REQUEST-id": "mine-42", "Traceparent": trace, "body": "x"}), 0)
    assert (record.request_id, record.caller_id) == ("id-0", "mine-42")
    assert record.trace_id == "0af7651916cd43dd8448eb211c80319c"


@given(st.text())
def test_a_line_stays_one_line_whatever_a_caller_sends(text: str) -> None:
    line = log_line("pets", new_record(Context({"X-Request-Id": text, "traceparent": text}), 0), 0.0, 1)
    assert line.isprintable()
    assert json.loads(line).get("caller_id", text) == text
    assert len(line) < 400


def test_a_batch_is_told(metrics: Any, caplog: pytest.LogCaptureFixture) -> None:
    context = Context({}, {}, metrics=metrics)
    good = Record("id-0", size_bytes=250_000, decode_s=0.0125, answers=[("cat", 0.75)])
    bad = Record("id-1", status=415, size_bytes=10, decode_s=0.001)
    with caplog.at_level(logging.INFO):
        tell(context, [good, bad], 0.05, log_requests=True)
    assert context.sent[0]["Server-Timing"] == "decode;dur=12.50, forward;dur=50.00"
    told = [json.loads(r.getMessage()) for r in caplog.records if r.getMessage().startswith("{")]
    assert [(one["request_id"], one["status"], one["batch"]) for one in told] == [("id-0", 200, 2), ("id-1", 415, 2)]
    model = "|#ModelName:pets,Level:Model|#type:"
    assert sorted(lines(caplog)) == sorted(
        [
            f"marten_forward_seconds.seconds:0.05{model}HISTOGRAM",
            f"marten_batch_size.size:2{model}HISTOGRAM",
            f"marten_decode_seconds.seconds:0.0125{model}HISTOGRAM",
            f"marten_decode_seconds.seconds:0.001{model}HISTOGRAM",
            f"marten_picture_megabytes.megabytes:0.25{model}HISTOGRAM",
            f"marten_picture_megabytes.megabytes:1e-05{model}HISTOGRAM",
            f"marten_doubt.doubt:0.25{model}HISTOGRAM",
            "marten_responses_total.total:1|#status:200,ModelName:pets,Level:Model|#type:COUNTER",
            "marten_responses_total.total:1|#status:415,ModelName:pets,Level:Model|#type:COUNTER",
            "marten_answers_total.total:1|#label:cat,ModelName:pets,Level:Model|#type:COUNTER",
        ]
    )


def test_a_worker_tells_of_a_batch_in_one_write(metrics: Any) -> None:
    class Pipe(io.StringIO):
        writes = 0

        def write(self, text: str) -> int:
            self.writes += 1
            return super().write(text)

    pipe = Pipe()
    handler = logging.StreamHandler(pipe)  # as ts.model_service_worker has it
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        tell(Context({}, {}, metrics=metrics), [Record("id-0", size_bytes=9), Record("id-1")], 0.05, log_requests=True)
        assert pipe.writes == 1
        logging.getLogger("telemetry").info("afterwards")
    finally:
        root.removeHandler(handler)
        root.setLevel(before)
    told = pipe.getvalue().splitlines()
    assert [json.loads(line)["request_id"] for line in told[:2]] == ["id-0", "id-1"]
    assert all(line.startswith("[METRICS]marten_") for line in told[2:-1])
    assert (len(told), told[-1]) == (8, "afterwards")


def test_lines_for_each_request_can_be_switched_off(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        tell(Context({}), [Record("id-0")], 0.0, log_requests=False)
    assert not caplog.records


def test_what_training_saw_is_told_once(metrics: Any, caplog: pytest.LogCaptureFixture) -> None:
    metrics.request_ids = None  # no request has come yet
    context = SimpleNamespace(model_name="pets", metrics=metrics)
    with caplog.at_level(logging.INFO):
        tell_expected(context, {"a cat|#:,x": 3, "dog": 1}, "1.0", "ab" * 32)
    assert lines(caplog) == [
        "marten_model_info.info:1|#ModelName:pets,Level:Model,version:1.0,weights:abababababababab|#type:GAUGE",
        "marten_expected_share.share:0.75|#ModelName:pets,Level:Model,label:a cat x|#type:GAUGE",
        "marten_expected_share.share:0.25|#ModelName:pets,Level:Model,label:dog|#type:GAUGE",
    ]


@pytest.mark.parametrize("counts", [None, {}, 1602, {"cat": "many"}, {"cat": 0}])
def test_a_card_without_counts_tells_no_wrong_share(
    metrics: Any, caplog: pytest.LogCaptureFixture, counts: Any
) -> None:
    with caplog.at_level(logging.INFO):
        tell_expected(SimpleNamespace(model_name="pets", metrics=metrics), counts, "1.0", "ab" * 32)
    assert not [line for line in lines(caplog) if "expected_share" in line]
