"""From pictures to a served answer: train, archive, serve, curl and predict_main.py, for every kind of network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from marten.files import ROOT
from tests.pictures import odd_pictures
from tests.servers import Serve, free_ports

pytestmark = [pytest.mark.server, pytest.mark.slow]
NETWORKS = ("base_cnn", "vgg", "cat_dog_conv_net", "resnet18", "efficientnet_lite0")
QUICK = ("--epochs", "1", "--batch_size", "4", "--weights", "none", "--validation_split", "0.25", "--num_workers", "0")


def program(*words: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr + done.stdout
    return done


@pytest.fixture(scope="module")
def chain(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Serve]]:
    """Every network trained for a few steps on real pictures, archived, and served by one TorchServe."""
    base = tmp_path_factory.mktemp("chain")
    pictures = base / "cat_dog"
    pictures.mkdir()
    for number, path in enumerate(sorted((data_dir / "dogs-vs-cats" / "train").iterdir())[::250]):
        os.symlink(path, pictures / f"{path.name.split('.')[0]}.{number}.jpg")
    models = []
    for name in NETWORKS:
        models.append(str(base / "models" / f"model_{name}.pth"))
        program("train_main.py", "--conv_net", name, "--data_dir", str(pictures), "--model_path", models[-1], *QUICK)
    program("scripts/archive", "--model_path", *models, "--export_path", str(base / "store"))
    serve = Serve(base / "store", base / "run", free_ports())
    started = serve.run("start")
    assert started.returncode == 0, started.stderr
    yield base, serve
    assert serve.run("stop", "--drain_s", "0").returncode == 0


@pytest.mark.parametrize("name", NETWORKS)
def test_curl_is_answered_as_predict_main_answers(chain: tuple[Path, Serve], data_dir: Path, name: str) -> None:
    # B1-04, B1-06: the server saw another crop than training did, and predict_main.py a random head
    base, serve = chain
    picture = data_dir / "dogs-vs-cats" / "test1" / "1.jpg"
    url = f"http://127.0.0.1:{serve.ports[0]}/predictions/{name}"
    model = str(base / "models" / f"model_{name}.pth")
    done = program("predict_main.py", "--model_path", model, "--img_path", str(picture), "--json", "--device", "cpu")
    predicted = json.loads(done.stdout)
    predicted.pop("path")
    for words in (["-T", str(picture)], ["-X", "POST", "-T", str(picture)]):
        told = subprocess.run(["curl", "-sS", *words, url], capture_output=True, text=True, check=True, timeout=60)
        served = json.loads(told.stdout)
        assert len(served) == 1  # top-1 by default
        assert served == pytest.approx(predicted, abs=1e-5)


def test_odd_pictures_are_answered_as_predict_main_answers(chain: tuple[Path, Serve], tmp_path: Path) -> None:
    base, serve = chain
    odd = odd_pictures()
    assert len(odd) >= 50
    paths = []
    for number, data in enumerate(odd.values()):
        paths.append(tmp_path / f"{number}.picture")
        paths[-1].write_bytes(data)
    model = str(base / "models" / "model_cat_dog_conv_net.pth")
    words = ["predict_main.py", "--model_path", model, "--json", "--device", "cpu", "--topk", "2"]
    lines = program(*words, "--img_path", *map(str, paths)).stdout.splitlines()
    for (name, data), line in zip(odd.items(), lines, strict=True):
        predicted = json.loads(line)
        predicted.pop("path")
        status, body = serve.ask("cat_dog_conv_net", data)
        (label, served), *_ = json.loads(body).items()
        assert status == 200, name
        assert served == pytest.approx(predicted[label], abs=1e-5), name


def test_predict_main_names_a_bad_picture_and_answers_the_others(
    chain: tuple[Path, Serve], data_dir: Path, tmp_path: Path
) -> None:
    base, _ = chain
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    (tmp_path / "b.jpg").write_bytes((data_dir / "dogs-vs-cats" / "test1" / "2.jpg").read_bytes())
    model = str(base / "models" / "model_cat_dog_conv_net.pth")
    words = ["--model_path", model, "--img_path", str(tmp_path), "--save", str(tmp_path / "told"), "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "predict_main.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"{tmp_path / 'a.jpg'}: not a picture")
    assert done.stdout.startswith(f"{tmp_path / 'b.jpg'}: ")
    assert (tmp_path / "told" / "b.png").is_file()
