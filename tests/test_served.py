"""An archive behind a real TorchServe: parity on odd pictures, and each request of a batch with its own status."""

from __future__ import annotations

import io
import json
import random
import re
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from PIL import Image

from marten.answer_check import answer_distance, expected_outputs
from marten.archive import MODEL_CONFIG, Archive, plan_archive, write_archive
from marten.readiness import request, worker_pids
from tests.pictures import as_base64, bad_pictures, odd_pictures
from tests.servers import Address, Serve, free_ports, wait_until

pytestmark = pytest.mark.server
ODD, BAD = odd_pictures(), bad_pictures()


@pytest.fixture(scope="module")
def archive(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Archive:
    """A .mar alone in its store."""
    planned = plan_archive(tiny_model(), name="pets", export_path=tmp_path_factory.mktemp("served") / "store")
    write_archive(planned)
    return planned


@pytest.fixture(scope="module")
def server(archive: Archive) -> Iterator[Serve]:
    """One TorchServe with that archive for this whole module."""
    made = Serve(archive.export_path, archive.export_path.parent / "run", free_ports())
    started = made.run("start", "pets")
    assert started.returncode == 0, started.stderr
    yield made
    assert made.run("stop", "--drain_s", "0").returncode == 0


def ask_all(server: Serve, bodies: list[bytes], clients: int = 16) -> list[tuple[int, dict[str, object]]]:
    """Ask from many clients at once, so that TorchServe forms batches."""
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda body: server.ask("pets", body), bodies))
    return [(status, json.loads(body)) for status, body in answers]


def test_odd_pictures_are_answered_as_the_state_dict_answers(server: Serve, archive: Archive) -> None:
    spec = archive.card.spec
    assert len(ODD) >= 50
    wanted = spec.answers(expected_outputs(spec, archive.weights, list(ODD.values())), topk=2)
    for name, (status, answer), expected in zip(ODD, ask_all(server, list(ODD.values())), wanted, strict=True):
        assert status == 200, (name, answer)
        assert answer_distance(answer, expected, spec) <= 1e-5, name


def test_an_explanation_is_a_png_or_json_by_what_is_accepted(server: Serve, tmp_path: Path) -> None:
    path = tmp_path / "picture.jpg"
    path.write_bytes(next(data for name, data in ODD.items() if "jpeg" in name))
    url = f"http://127.0.0.1:{server.ports[0]}/explanations/pets"
    told = subprocess.run(["curl", "-sS", "-T", str(path), url], capture_output=True, check=True, timeout=60)
    assert json.loads(told.stdout)["label"] in ("cat", "dog")
    words = ["curl", "-sS", "-H", "Accept: image/png", "-w", "%{content_type}", "-T", str(path), url]
    told = subprocess.run(words, capture_output=True, check=True, timeout=60)
    assert told.stdout.endswith(b"image/png")
    shown = Image.open(io.BytesIO(told.stdout[: -len("image/png")]))
    assert (shown.format, shown.size) == ("PNG", (224, 224))


def test_bad_pictures_cost_their_neighbours_nothing(server: Serve) -> None:
    workers = worker_pids(Address("127.0.0.1", server.ports[1]), "pets")
    rows = [(name, 200, data) for name, data in ODD.items()]
    rows += [(name, status, data) for name, (status, data) in BAD.items()] * 2
    random.Random(0).shuffle(rows)
    for (name, wanted, _), (status, answer) in zip(rows, ask_all(server, [row[2] for row in rows]), strict=True):
        assert status == wanted, (name, answer)
        if status != 200:
            assert answer["code"] == wanted
            assert len(str(answer["request_id"])) == 36
    assert worker_pids(Address("127.0.0.1", server.ports[1]), "pets") == workers


@pytest.mark.parametrize(
    "words",
    [
        ("-T", "{path}"),
        ("-X", "POST", "-T", "{path}"),
        ("-H", "Content-Type: image/jpeg", "--data-binary", "@{path}"),
        ("-F", "data=@{path}"),
        ("-F", "file=@{path}"),
        ("-F", "image=@{path}"),
        ("-H", "Content-Type: application/json", "-d", '{{"data":"{text}"}}'),
    ],
    ids=lambda words: " ".join(words[:3]),
)
def test_curl_is_answered_however_it_sends_a_picture(server: Serve, tmp_path: Path, words: tuple[str, ...]) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(ODD["jpeg_rgb"])
    spoken = [word.format(path=path, text=as_base64(ODD["jpeg_rgb"])) for word in words]
    address = f"http://127.0.0.1:{server.ports[0]}/predictions/pets"
    done = subprocess.run(["curl", "-sS", *spoken, address], capture_output=True, text=True, timeout=30, check=True)
    ((label, probability),) = json.loads(done.stdout).items()
    assert label in ("cat", "dog")
    assert 0.5 <= probability <= 1


def test_kserve_v1_is_spoken(server: Serve) -> None:
    instances = [{"b64": as_base64(ODD[name])} for name in ("jpeg_rgb", "jpeg_444")]
    address = f"http://127.0.0.1:{server.ports[0]}/v1/models/pets:predict"
    words = ["curl", "-sS", "-H", "Content-Type: application/json", "-d", json.dumps({"instances": instances}), address]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=True)
    for name, told in zip(("jpeg_rgb", "jpeg_444"), json.loads(done.stdout)["predictions"], strict=True):
        assert told == pytest.approx(json.loads(server.ask("pets", ODD[name])[1]), abs=1e-5)


def test_kserve_v2_is_spoken(server: Serve) -> None:
    data = [as_base64(ODD[name]) for name in ("jpeg_rgb", "jpeg_444")]
    body = json.dumps({"id": "mine", "inputs": [{"name": "x", "shape": [2], "datatype": "BYTES", "data": data}]})
    address = f"http://127.0.0.1:{server.ports[0]}/v2/models/pets/infer"
    words = ["curl", "-sS", "-H", "Content-Type: application/json", "-d", body, address]
    told = json.loads(subprocess.run(words, capture_output=True, text=True, timeout=30, check=True).stdout)
    assert (told["id"], [output["shape"] for output in told["outputs"]]) == ("mine", [[2], [2]])


def test_the_archives_settings_reach_torchserve(server: Serve) -> None:
    done = subprocess.run(
        ["curl", "-sS", f"http://127.0.0.1:{server.ports[1]}/models/pets"], capture_output=True, timeout=30, check=True
    )
    (model,) = json.loads(done.stdout)
    asked = yaml.safe_load(MODEL_CONFIG.read_text(encoding="utf-8"))
    asked.pop("handler")
    assert {"batchSize", "maxBatchDelay", "responseTimeout", "startupTimeout"} <= set(asked)
    assert {key: model[key] for key in asked} == asked
    assert len(model["workers"]) == 1


def test_metrics_and_logs_tell_what_was_done(server: Serve) -> None:
    """Through TorchServe's own pipe, which drops a line that it cannot parse without a word."""
    before = read_metrics(server)
    ids = {"X-Request-Id": "mine-42", "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    words = [word for name, value in ids.items() for word in ("-H", f"{name}: {value}")]
    for name, body in (("good", ODD["jpeg_rgb"]), ("bad", b"no picture")):
        url = f"http://127.0.0.1:{server.ports[0]}/predictions/pets"
        told = subprocess.run(
            ["curl", "-sS", "-D-", *words, "-T", "-", url], input=body, capture_output=True, check=True, timeout=30
        ).stdout.decode()
        assert re.search(r"(?im)^server-timing: decode;dur=[\d.]+, forward;dur=[\d.]+", told), name
    answered = re.search(r"(?im)^x-request-id: (\S+)", told)
    assert answered
    log = server.folder / "logs" / "requests.jsonl"
    wait_until(lambda: answered[1] in log.read_text(encoding="utf-8"), 10)
    good, bad = (json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()[-2:])
    assert (good["status"], bad["status"], bad["request_id"], bad["model"]) == (200, 415, answered[1], "pets")
    assert good["caller_id"] == bad["caller_id"] == "mine-42"
    assert good["trace_id"] == "0af7651916cd43dd8448eb211c80319c"
    assert list(good["answers"][0]) in (["cat"], ["dog"])
    assert "request_id" not in (server.folder / "logs" / "model_log.log").read_text(encoding="utf-8")

    def gained(name: str) -> float:
        return read_metrics(server).get(name, 0) - before.get(name, 0)

    wait_until(lambda: gained('marten_responses_total{status="415"}') == 1, 10)
    assert gained('marten_responses_total{status="200"}') == 1
    assert sum(gained(f'marten_answers_total{{label="{label}"}}') for label in ("cat", "dog")) == 1
    for name in ("decode_seconds", "picture_megabytes", "batch_size"):
        assert gained(f"marten_{name}_count{{}}") == 2, name
    for name in ("forward_seconds", "doubt"):
        assert gained(f"marten_{name}_count{{}}") == 1, name
    assert gained("marten_picture_megabytes_sum{}") == pytest.approx((len(ODD["jpeg_rgb"]) + 10) / 1e6, abs=2e-6)


def read_metrics(server: Serve) -> dict[str, float]:
    """Values by name and our own labels: the model's, level's and host's are left out, and buckets."""
    page = request(Address("127.0.0.1", server.ports[2]), "GET", "/metrics")[1].decode()
    found = {}
    for name, labels, value in re.findall(r"(?m)^(\w+){(.*?),?} (\S+)$", page):
        own = [pair for pair in labels.split(",") if not re.match("ModelName|Level|Hostname", pair)]
        found[f"{name}{{{','.join(own)}}}"] = float(value)
    return found
