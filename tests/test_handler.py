"""The TorchServe handler through ts's own Service: every row of a batch gets its own answer or its own refusal."""

from __future__ import annotations

import ast
import base64
import functools
import io
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import engines
import protocols
from handlers import image_classifier
from handlers.image_classifier import MartenClassifier, read_settings
from marten import archive_probe
from marten.answer_check import answer_distance, expected_outputs
from marten.archive_probe import read_replies
from modelspec import CardError, ModelCard, ModelSpec, PictureError, Preprocess
from protocols import as_outputs, encoded_picture
from tests.conftest import ROOT, save_untrained
from tests.pictures import as_base64, bad_pictures, draw, encode, odd_pictures

ODD, BAD = odd_pictures(), bad_pictures()
JPEG = ODD["jpeg_rgb"]
TEXT = as_base64(JPEG)
QUICK = {"handler": {"engine": "torch"}}
"""Loads at once; the other engines have tests of their own."""


LEAN = """
import sys
import threading
import torch
import engines
from handlers.image_classifier import ImageClassifier
from models.cat_dog_conv_net.cat_dog_conv_net import CatAndDogConvNet

def loaded():
    return [name for name in ("captum", "torchvision", "torch._dynamo", "sympy") if name in sys.modules]

assert loaded() == [], loaded()
network = CatAndDogConvNet().eval()
engine = engines.build_openvino(network, (224, 224), "fp32", 1)
assert loaded() == [], loaded()
assert len(threading.enumerate()) == 1, "a conversion is reported to its makers: " + str(threading.enumerate())
images_NCHW = torch.rand(1, 3, 224, 224)
with torch.inference_mode():
    assert torch.allclose(engine(images_NCHW), network(images_NCHW), atol=1e-5)

engines.import_torchvision()
from torchvision.models import resnet18
assert loaded() == ["torchvision"], loaded()
assert resnet18(num_classes=2)(images_NCHW.repeat(2, 1, 1, 1)).shape == (2, 2)

import captum.attr
import torch._dynamo.utils
assert captum.attr.IntegratedGradients(network).attribute(images_NCHW, target=0).shape == images_NCHW.shape
assert isinstance(torch._dynamo.utils.is_compile_supported("cpu"), bool)
"""


def test_a_worker_loads_nothing_that_it_never_calls() -> None:
    pytest.importorskip("openvino")
    done = subprocess.run([sys.executable, "-c", LEAN], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@functools.cache
def ts_metrics() -> Any:
    """TorchServe's own metrics, as a worker has them."""
    import ts
    from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl

    metrics = MetricsCacheYamlImpl(str(Path(ts.__file__).parent / "configs" / "metrics.yaml"))
    metrics.initialize_cache()
    metrics.model_name = "tested"
    return metrics


class Server:
    """One worker's Service around a handler, asked as TorchServe's front asks it."""

    def __init__(self, folder: Path, arch: str, weights: str, config: Mapping[str, Any] | None = None) -> None:
        from ts.service import Service

        manifest = {"model": {"modelName": "tested", "serializedFile": weights, "modelFile": f"{arch}.py"}}
        self.handler = MartenClassifier()
        self.service = Service("tested", str(folder), manifest, self.handler.handle, None, 8, True, ts_metrics())
        self.service.context.model_yaml_config = dict(config or {})
        self.service.set_cl_socket(None)
        self.handler.initialize(self.service.context)

    def ask(self, *bodies: bytes) -> list[dict[str, Any]]:
        """Send a batch of raw bodies."""
        return self.send([[("body", "application/octet-stream", body)] for body in bodies])

    def send(
        self, batch: Sequence[Sequence[tuple[str, str, Any]]], headers: Mapping[str, str] | None = None
    ) -> list[dict[str, Any]]:
        """Send a batch; each request is a list of (name, content type, value) parameters."""
        lines = [{"name": name.encode(), "value": value.encode()} for name, value in (headers or {}).items()]
        requests = [
            {
                "requestId": f"id-{i}".encode(),
                "headers": lines,
                "parameters": [{"name": n, "contentType": kind, "value": value} for n, kind, value in parameters],
            }
            for i, parameters in enumerate(batch)
        ]
        return read_replies(bytes(self.service.predict(requests)))


@pytest.fixture
def serve(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: Callable[..., Path]
) -> Iterator[Callable[..., Server]]:
    """Lay a model's files side by side, as an archive does, and put a Service around them."""
    monkeypatch.setattr(image_classifier, "check_own", lambda folder, *files: None)  # tested on its own below

    def served(conv_net: str = "cat_dog_conv_net", config: Mapping[str, Any] = QUICK, **fields: Any) -> Server:
        weights = tiny_model(conv_net, **fields)
        lay_out(weights, tmp_path)
        arch = ModelCard.read(weights.with_suffix(".json")).spec.arch
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, arch, raising=False)
        return Server(tmp_path, arch, weights.name, config)

    yield served
    for arch in ("cat_dog_conv_net", "resnet"):
        sys.modules.pop(arch, None)


def lay_out(weights: Path, folder: Path) -> ModelCard:
    """Copy what the handler reads into one folder."""
    card = ModelCard.read(weights.with_suffix(".json"))
    shutil.copy(weights, folder)
    shutil.copy(weights.with_suffix(".json"), folder)
    shutil.copy(ROOT / "models" / card.spec.arch / f"{card.spec.arch}.py", folder)
    names = {str(i): label for i, label in enumerate(card.spec.labels)}
    (folder / "index_to_name.json").write_text(json.dumps(names), encoding="utf-8")
    return card


# -------------------------------------------------------------------------------------------------------- answers


def test_odd_pictures_are_answered_as_the_state_dict_answers(
    serve: Callable[..., Server], tiny_model: Callable[..., Path]
) -> None:
    replies = serve().ask(*ODD.values())
    weights = tiny_model()
    spec = ModelCard.read(weights.with_suffix(".json")).spec
    wanted = spec.answers(expected_outputs(spec, weights, list(ODD.values())), topk=2)
    for name, reply, expected in zip(ODD, replies, wanted, strict=True):
        assert reply["code"] == 200, (name, reply)
        assert reply["content_type"] == "application/json"
        assert answer_distance(reply["body"], expected, spec) <= 1e-6, name
    assert len({reply["body"].get("cat") for reply in replies}) > 30, "the network must tell them apart"


@pytest.mark.parametrize("seed", range(4))
def test_each_row_of_a_mixed_batch_has_its_own_fate(serve: Callable[..., Server], seed: int) -> None:
    server = serve()
    rng = random.Random(seed)
    rows = [(name, status, data) for name, (status, data) in rng.sample(sorted(BAD.items()), 9)]
    rows += [(name, 200, data) for name, data in rng.sample(sorted(ODD.items()), 7)]
    rng.shuffle(rows)
    for i, (row, reply) in enumerate(zip(rows, server.ask(*(data for _, _, data in rows)), strict=True)):
        name, status, data = row
        assert reply["code"] == status, name
        if status == 200:
            (alone,) = server.ask(data)
            ((label, value),) = reply["body"].items()
            assert abs(alone["body"][label] - value) < 1e-5
        else:
            assert set(reply["body"]) == {"code", "type", "message", "request_id"}
            assert reply["body"]["code"] == status
            assert reply["body"]["request_id"] == f"id-{i}"
            assert reply["phrase"].replace(" ", "") == reply["body"]["type"]


def test_a_batch_without_a_good_picture_is_refused_row_by_row(serve: Callable[..., Server]) -> None:
    assert [reply["code"] for reply in serve().ask(b"", b"text", JPEG[:200])] == [400, 415, 422]


@pytest.mark.parametrize(
    ("fields", "keys"),
    [
        ({"topk": 3, "labels": ("ant", "bee", "cat", "dog", "eel")}, 3),
        ({"topk": 9}, 2),
        ({"temperature": 3.0, "mirror": True}, 1),
        ({"task": "regression", "labels": (), "outputs": 1}, 1),
        ({"task": "embedding", "labels": (), "outputs": 6}, 1),
        ({"preprocess": Preprocess((96, 128), "pad")}, 1),
    ],
)
def test_the_card_decides_what_an_answer_is(
    serve: Callable[..., Server], tiny_model: Callable[..., Path], fields: dict[str, Any], keys: int
) -> None:
    conv_net = "resnet18" if "preprocess" in fields else "cat_dog_conv_net"
    replies = serve(conv_net, **fields).ask(JPEG, ODD["png_rgba"])
    weights = tiny_model(conv_net, **fields)
    spec = ModelCard.read(weights.with_suffix(".json")).spec
    wanted = spec.answers(expected_outputs(spec, weights, [JPEG, ODD["png_rgba"]]), topk=max(1, len(spec.labels)))
    for reply, expected in zip(replies, wanted, strict=True):
        assert len(reply["body"]) == keys
        assert answer_distance(reply["body"], expected, spec) <= 1e-6


def test_bf16_answers_nearly_the_same(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(engines.TOLERANCE, "bf16", (0.05, 0.05))  # untrained networks differ by more than trained ones
    plain = [reply["body"] for reply in serve(topk=2).ask(*list(ODD.values())[:8])]
    rough = serve(topk=2, config={"handler": {"precision": "bf16", "engine": "torch"}})
    answers = [reply["body"] for reply in rough.ask(*list(ODD.values())[:8])]
    gaps = [abs(a["cat"] - b["cat"]) for a, b in zip(plain, answers, strict=True)]
    assert 0 < max(gaps) < 0.05


@pytest.mark.parametrize("engine", ["auto", "torch"])
@pytest.mark.parametrize("precision", ["fp32", "auto"])
def test_every_engine_answers_as_the_state_dict_answers(
    serve: Callable[..., Server], tiny_model: Callable[..., Path], engine: str, precision: str
) -> None:
    fields: dict[str, Any] = {"topk": 2, "temperature": 1.5, "mirror": True}
    server = serve(config={"handler": {"precision": precision, "engine": engine, "threads": 2}}, **fields)
    replies = server.ask(*ODD.values())
    weights = tiny_model(**fields)
    spec = ModelCard.read(weights.with_suffix(".json")).spec
    wanted = spec.answers(expected_outputs(spec, weights, list(ODD.values())), topk=2)
    allowed = 1e-5 if precision == "fp32" else 0.01  # trained networks stay within 0.002
    for name, reply, expected in zip(ODD, replies, wanted, strict=True):
        assert answer_distance(reply["body"], expected, spec) <= allowed, name
    assert (server.ask(b"", JPEG, b"text")[1]["body"]).keys() == {"cat", "dog"}


# --------------------------------------------------------------------------------------------- shapes of a request

RAW = "application/octet-stream"
JSON = "application/json"
SHAPES: dict[str, tuple[int, list[tuple[str, str, Any]]]] = {
    "raw": (200, [("body", RAW, bytearray(JPEG))]),
    "raw typed as text": (200, [("body", "text/plain", JPEG)]),
    "form field data": (200, [("data", "image/jpeg", JPEG)]),
    "form field file": (200, [("file", "image/jpeg", JPEG)]),
    "form field image": (200, [("image", "image/jpeg", JPEG)]),
    "form field beside another": (200, [("image", "image/jpeg", JPEG), ("note", "text/plain", "hello")]),
    "form field of another name": (400, [("photo", "image/jpeg", JPEG)]),
    "two pictures": (400, [("image", "image/jpeg", JPEG), ("data", "image/jpeg", JPEG)]),
    "no field": (400, []),
    "JSON data": (200, [("body", JSON, {"data": TEXT})]),
    "JSON body": (200, [("body", JSON, {"body": TEXT})]),
    "JSON b64": (200, [("body", JSON, {"b64": TEXT})]),
    "JSON instances": (200, [("body", JSON, {"instances": [{"b64": TEXT}]})]),
    "JSON instances data": (200, [("body", JSON, {"instances": [{"data": TEXT}]})]),
    "JSON instances image_bytes": (200, [("body", JSON, {"instances": [{"image_bytes": {"b64": TEXT}}]})]),
    "JSON text": (200, [("body", JSON, TEXT)]),
    "JSON untyped": (200, [("body", RAW, json.dumps({"data": TEXT}).encode())]),
    "JSON text untyped": (200, [("body", RAW, json.dumps(TEXT).encode())]),
    "JSON picture typed": (200, [("body", JSON, JPEG)]),
    "JSON two instances": (200, [("body", JSON, {"instances": [{"b64": TEXT}, TEXT]})]),
    "JSON instances untyped": (200, [("body", RAW, json.dumps({"signature": "x", "instances": [TEXT]}).encode())]),
    "JSON one bad instance": (415, [("body", JSON, {"instances": [TEXT, as_base64(b"just a sentence")]})]),
    "JSON too many instances": (400, [("body", JSON, {"instances": [TEXT] * 17})]),
    "JSON no instances": (400, [("body", JSON, {"instances": []})]),
    "JSON instances null": (400, [("body", JSON, {"instances": None})]),
    "JSON null": (400, [("body", JSON, None)]),
    "JSON number": (400, [("body", JSON, 7)]),
    "JSON list": (400, [("body", JSON, [1, 2])]),
    "JSON empty": (400, [("body", JSON, {})]),
    "JSON data twice": (400, [("body", JSON, {"data": TEXT, "b64": TEXT})]),
    "JSON data of no base64": (400, [("body", JSON, {"data": "!!!"})]),
    "JSON data of a lone surrogate": (400, [("body", JSON, {"data": "\ud800"})]),
    "JSON data of no picture": (415, [("body", JSON, {"data": as_base64(b"just a sentence")})]),
    "JSON broken": (400, [("body", RAW, b'{"data":')]),
    "JSON deep": (400, [("body", RAW, b"[" * 100_000)]),
    "base64": (200, [("body", RAW, TEXT.encode())]),
    "base64 as text": (200, [("body", "text/plain", TEXT)]),
    "base64 in lines": (200, [("body", RAW, base64.encodebytes(JPEG))]),
    "base64 for addresses": (200, [("body", RAW, base64.urlsafe_b64encode(JPEG).rstrip(b"="))]),
    "base64 in a data address": (200, [("body", RAW, b"data:image/jpeg;base64," + TEXT.encode())]),
    "base64 broken": (400, [("body", RAW, TEXT[:400].encode() + b"*" + TEXT[400:].encode())]),
    "base64 cut": (422, [("body", RAW, TEXT[:400].encode())]),
    "a path": (415, [("body", "text/plain", "/etc/passwd")]),
    "an address": (415, [("body", "text/plain", "http://127.0.0.1/cat.jpg")]),
    "a short word": (415, [("body", "text/plain", "cats")]),
}


def test_every_shape_of_a_request_has_its_status(serve: Callable[..., Server]) -> None:
    replies = serve().send([parameters for _, parameters in SHAPES.values()])
    found = {name: reply["code"] for name, reply in zip(SHAPES, replies, strict=True)}
    assert found == {name: status for name, (status, _) in SHAPES.items()}
    answered = {name: reply["body"] for name, reply in zip(SHAPES, replies, strict=True) if reply["code"] == 200}
    for name, answer in answered.items():
        told = answer["predictions"] if "instances" in name else [answer]
        assert len(told) == (2 if name == "JSON two instances" else 1)
        assert all(each == pytest.approx(answered["raw"], abs=1e-6) for each in told), name


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["data", "b64", "body", "instances", "image", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.sampled_from(["body", "data", "image", "x"]), json_values | st.binary(max_size=80) | st.text(max_size=80))
@settings(max_examples=300, deadline=None)
def test_no_request_raises_anything_but_a_picture_error(name: str, value: Any) -> None:
    try:
        found: bytes | int = encoded_picture({name: value})
    except PictureError as refusal:
        found = refusal.status
    assert isinstance(found, bytes) or found == 400


# ------------------------------------------------------------------------------------------- faults within a batch


def test_one_picture_that_breaks_the_network_fails_alone(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve()
    black = encode(draw(0).point(lambda v: 0), "PNG")
    inference = server.handler.inference

    def breaks_on_black(pixels_NHWC: torch.Tensor) -> torch.Tensor:
        if any(int(pixels.max()) == 0 for pixels in pixels_NHWC):
            raise RuntimeError("CUDA error: an illegal memory access")
        return inference(pixels_NHWC)

    monkeypatch.setattr(server.handler, "inference", breaks_on_black)
    replies = server.ask(JPEG, black, b"text", ODD["gif_palette"])
    assert [reply["code"] for reply in replies] == [200, 500, 415, 200]
    assert "illegal" not in json.dumps(replies[1])
    assert "a batch of 3 failed" in caplog.text


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")])
def test_a_batch_too_large_for_memory_is_answered_one_by_one(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    server = serve()
    inference = server.handler.inference

    def only_one(pixels_NHWC: torch.Tensor) -> torch.Tensor:
        if len(pixels_NHWC) > 1:
            raise error
        return inference(pixels_NHWC)

    monkeypatch.setattr(server.handler, "inference", only_one)
    assert [reply["code"] for reply in server.ask(JPEG, JPEG, ODD["bmp_rgb"])] == [200, 200, 200]

    def none_at_all(pixels_NHWC: torch.Tensor) -> torch.Tensor:
        raise error

    monkeypatch.setattr(server.handler, "inference", none_at_all)
    assert [reply["code"] for reply in server.ask(JPEG, b"")] == [503, 400]


def test_a_fault_of_our_own_while_decoding_is_a_500_of_one_row(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve()
    real = protocols.encoded_picture

    def faulty(row: Mapping[str, Any]) -> bytes:
        if row["body"] == b"boom":
            raise KeyError("secret")
        return real(row)

    monkeypatch.setattr(protocols, "encoded_picture", faulty)
    replies = server.ask(b"boom", JPEG)
    assert [reply["code"] for reply in replies] == [500, 200]
    assert "secret" not in json.dumps(replies)


def test_nothing_breaks_without_metrics(serve: Callable[..., Server]) -> None:
    server = serve()
    server.ask(JPEG)
    context = server.service.context
    context.metrics = None
    assert set(server.handler.handle([{"body": JPEG}], context)[0]) <= {"cat", "dog"}


def v2(*texts: str, **changes: Any) -> list[tuple[str, str, Any]]:
    """A request of the Open Inference Protocol."""
    image = {"name": "image", "shape": [len(texts)], "datatype": "BYTES", "data": list(texts), **changes}
    return [("body", JSON, {"id": "mine", "inputs": [image]})]


def test_the_open_inference_protocol_is_spoken(serve: Callable[..., Server]) -> None:
    server = serve()
    plain = [reply["body"] for reply in server.ask(JPEG, ODD["jpeg_444"])]
    one, two = server.send([v2(TEXT), v2(TEXT, as_base64(ODD["jpeg_444"]))])
    assert (one["code"], two["code"]) == (200, 200)
    assert {key: one["body"][key] for key in ("id", "model_version")} == {"id": "mine", "model_version": "1.0"}
    label, probability = two["body"]["outputs"]
    assert (label["name"], label["datatype"], label["shape"]) == ("label", "BYTES", [2])
    assert (probability["name"], probability["datatype"], probability["shape"]) == ("probability", "FP32", [2])
    told = [{name: share} for name, share in zip(label["data"], probability["data"], strict=True)]
    for answer, expected in zip(told, plain, strict=True):
        assert answer == pytest.approx(expected, abs=1e-5)


def test_the_open_inference_protocol_tells_every_label_of_topk(serve: Callable[..., Server]) -> None:
    (reply,) = serve(topk=2).send([v2(TEXT, TEXT, TEXT)])
    label, probability = reply["body"]["outputs"]
    assert label["shape"] == probability["shape"] == [3, 2]
    assert [sorted(label["data"][i : i + 2]) for i in (0, 2, 4)] == [["cat", "dog"]] * 3
    assert sum(probability["data"]) == pytest.approx(3)


def test_scores_and_embeddings_are_tensors_too() -> None:
    regression = ModelSpec("s", "a", task="regression")
    (output,) = as_outputs(regression, None, [{"score": 1.5}, {"score": 2.5}])["outputs"]
    assert output == {"name": "score", "datatype": "FP32", "shape": [2], "data": [1.5, 2.5]}
    embedding = ModelSpec("e", "a", task="embedding")
    (output,) = as_outputs(embedding, 3, [{"embedding": [1.0, 2.0, 3.0]}])["outputs"]
    assert output == {"name": "embedding", "datatype": "FP32", "shape": [1, 3], "data": [1.0, 2.0, 3.0]}


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (v2(), 400),
        (v2(TEXT, datatype="FP32"), 400),
        (v2(TEXT, data=TEXT), 400),
        (v2(*[TEXT] * 17), 400),
        ([("body", JSON, {"inputs": []})], 400),
        ([("body", JSON, {"inputs": ["x"]})], 400),
        (v2(TEXT, as_base64(b"just a sentence")), 415),
    ],
    ids=["none", "numbers", "no list", "too many", "no input", "no object", "one bad"],
)
def test_what_is_no_v2_request_is_refused(serve: Callable[..., Server], request_: Any, status: int) -> None:
    told = serve().send([request_, v2(TEXT)])
    assert [reply["code"] for reply in told] == [status, 200]


def test_explanations_are_heat_maps_bounded_in_number(serve: Callable[..., Server]) -> None:
    server = serve()
    row, bad = [("body", RAW, JPEG)], [("body", RAW, b"no picture")]
    several = [("body", JSON, {"instances": [TEXT]})]
    told = server.send([row, bad, row, row, several], {"explain": "True"})
    assert [reply["code"] for reply in told] == [200, 415, 200, 429, 400]
    for reply in (told[0], told[2]):
        assert reply["body"]["label"] in ("cat", "dog")
        png = Image.open(io.BytesIO(base64.b64decode(reply["body"]["heat_map_png"])))
        assert (png.format, png.size) == ("PNG", (224, 224))
    assert server.send([row])[0]["code"] == 200


def test_explanations_can_be_switched_off(serve: Callable[..., Server]) -> None:
    server = serve(config={"handler": {**QUICK["handler"], "explanations": 0}})
    assert server.send([[("body", RAW, JPEG)]], {"explain": "True"})[0]["code"] == 404
    with pytest.raises(CardError, match="explanations"):
        read_settings({"handler": {"explanations": -1}})


def test_descriptions_are_told_row_by_row(serve: Callable[..., Server]) -> None:
    server = serve()
    row = [("body", RAW, JPEG)]
    told = server.send([row, row], {"describe": "True"})
    assert [reply["body"]["spec"]["labels"] for reply in told] == [["cat", "dog"]] * 2


# ---------------------------------------------------------------------------------------------- what is not loaded


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "index_to_name.json").write_text('{"0": "dog", "1": "cat"}'), "trained on"),
        (lambda folder: (folder / "index_to_name.json").unlink(), "missing"),
        (lambda folder: (folder / "model_cat_dog_conv_net.json").unlink(), "no model card"),
        (lambda folder: change_byte(folder / "model_cat_dog_conv_net.pth"), "sha256"),
    ],
)
def test_files_that_do_not_belong_together_are_not_served(
    serve: Callable[..., Server], tmp_path: Path, spoil: Callable[[Path], Any], said: str
) -> None:
    serve()
    spoil(tmp_path)
    with pytest.raises(CardError, match=said):
        Server(tmp_path, "cat_dog_conv_net", "model_cat_dog_conv_net.pth")


def change_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_weights_that_give_no_numbers_are_not_served(
    serve: Callable[..., Server], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    serve()
    folder = tmp_path_factory.mktemp("nan")
    weights = save_untrained(folder, "cat_dog_conv_net", 0)
    state = torch.load(weights, weights_only=True)
    state["classifier.7.bias"][0] = torch.nan
    torch.save(state, weights)
    raw = json.loads(weights.with_suffix(".json").read_text())
    raw["weights_sha256"] = image_classifier.modelspec.sha256_file(weights)
    weights.with_suffix(".json").write_text(json.dumps(raw))
    lay_out(weights, tmp_path)
    with pytest.raises(CardError, match="finite"):
        Server(tmp_path, "cat_dog_conv_net", weights.name)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"handler": {"precison": "bf16"}}, "precison"),
        ({"handler": {"precision": "int8"}}, "fp32, bf16"),
        ({"handler": {"engine": "onnx"}}, "auto, openvino, torch"),
        ({"handler": {"threads": 0}}, "threads must be"),
        ({"handler": {"threads": "two"}}, "threads must be"),
        ({"handler": {"log_requests": "yes"}}, "log_requests must be"),
    ],
)
def test_unknown_settings_are_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(CardError, match=said):
        read_settings(config)


@pytest.mark.parametrize("config", [None, {}, {"handler": None}, {"batchSize": 8}])
def test_settings_have_defaults(config: Any) -> None:
    assert read_settings(config) == image_classifier.SETTINGS


@pytest.mark.parametrize(
    "shadow", ["modelspec.py", "protocols.py", "engines.py", "explain.py", "telemetry.py", "cat_dog_conv_net.py"]
)
def test_foreign_code_is_refused(tiny_model: Callable[..., Path], tmp_path: Path, shadow: str) -> None:
    folder, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    lay_out(tiny_model(), folder)
    for source in (
        "handlers/image_classifier.py",
        "modelspec.py",
        "protocols.py",
        "engines.py",
        "explain.py",
        "telemetry.py",
    ):
        shutil.copy(ROOT / source, folder)
    (folder / "MAR-INF").mkdir()
    model = {"modelName": "m", "handler": "image_classifier.py", "modelFile": "cat_dog_conv_net.py"}
    manifest = {"model": {**model, "serializedFile": "model_cat_dog_conv_net.pth"}}
    (folder / "MAR-INF" / "MANIFEST.json").write_text(json.dumps(manifest))
    requests = tmp_path / "requests"
    requests.mkdir()
    (requests / "0").write_bytes(JPEG)
    shutil.copy(folder / shadow, elsewhere)

    words = [sys.executable, archive_probe.__file__, str(folder), str(requests), str(tmp_path / "report.json")]
    env = {**os.environ, "PYTHONPATH": f"{elsewhere}:{folder}"}  # as a worker inherits it
    done = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"{elsewhere}/{shadow} would run instead of" in done.stderr


def test_the_handler_is_one_class_and_imports_what_travels_with_it_alone() -> None:
    tree = ast.parse(Path(image_classifier.__file__).read_text(encoding="utf-8"))
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported - sys.stdlib_module_names == {
        "engines",
        "explain",
        "modelspec",
        "protocols",
        "telemetry",
        "torch",
        "ts",
    }
    assert sum(isinstance(node, ast.ClassDef) for node in ast.walk(tree)) == 1
