"""Pictures with their answers below them, and which pictures words name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from marten.errors import DataError, MartenError
from marten.files import ROOT
from marten.predict import Prediction, caption_files, captioned, save_captioned, show_captioned
from marten.wording import expand_paths
from tests.pictures import draw, encode, odd_pictures


@pytest.mark.parametrize("name", sorted(odd_pictures()))
def test_the_captioned_picture_is_what_the_network_saw(tmp_path: Path, name: str) -> None:
    # 16-bit pictures were white, alpha black, rotated ones lay on their side
    from modelspec import read_picture

    path = tmp_path / "picture"
    path.write_bytes(odd_pictures()[name])
    seen = read_picture(path)
    sheet = captioned(path, "x", longest_px=max(seen.size))
    left = (sheet.width - seen.width) // 2
    assert sheet.crop((left, 0, left + seen.width, seen.height)).tobytes() == seen.tobytes()


def test_long_words_are_not_cut_off(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encode(draw(1, (40, 60)), "PNG"))
    text = "a label of many words 0.5000, another one 0.4000"
    sheet = captioned(tmp_path / "a.png", text)
    assert sheet.width > 300
    edge = sheet.crop((0, 60, 4, sheet.height))
    assert edge.getextrema() == ((255, 255),) * 3


def test_pictures_of_one_name_do_not_overwrite_each_other(tmp_path: Path) -> None:
    # cats/1.jpg and dogs/1.jpg were both saved as 1.png
    paths = [Path("cats/1.jpg"), Path("dogs/1.jpg"), Path("dogs/1.png"), Path("dogs/1-2.png")]
    names = [path.name for path in caption_files(paths, tmp_path)]
    assert names == ["1.png", "1-2.png", "1-3.png", "1-2-2.png"]


def test_a_file_in_place_of_the_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encode(draw(1, (40, 60)), "PNG"))
    with pytest.raises(MartenError, match="cannot write"):
        save_captioned(Prediction(tmp_path / "a.png", {}), "x", tmp_path / "a.png" / "b.png")


def test_without_a_screen_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # --show showed nothing, without a word
    (tmp_path / "a.png").write_bytes(encode(draw(1, (40, 60)), "PNG"))
    monkeypatch.setattr("marten.predict.ImageShow._viewers", [])
    with pytest.raises(MartenError, match="--save"):
        show_captioned(Prediction(tmp_path / "a.png", {}), "x")


def test_words_name_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/1.jpg", "a/b/2.PNG", "a/notes.txt", "a/._1.jpg", "a/.thumbs/1.jpg", "c/3.jpg", "empty/x.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    both = [Path("a/1.jpg"), Path("a/b/2.PNG")]
    assert expand_paths(["a"]) == both
    assert expand_paths(["a/1.jpg", "a"]) == both
    assert expand_paths(["[ac]"]) == [*both, Path("c/3.jpg")]  # was nothing at all, and exit code 0
    assert expand_paths(["a/notes.txt"]) == [Path("a/notes.txt")]
    for word in ("nowhere", "empty", "e*y", "*.gif"):
        with pytest.raises(DataError, match="no picture"):
            expand_paths([word])


def test_the_program_tells_the_answer_and_nothing_else(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    # Pillow's warnings came between, with the paths of its own files
    for name, data in odd_pictures().items():
        (tmp_path / f"{name}.jpg").write_bytes(data)
    words = ["--model_path", str(tiny_model()), "--img_path", str(tmp_path), "--device", "cpu"]
    program = [sys.executable, str(ROOT / "predict_main.py"), *words]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == len(odd_pictures())


def test_a_saved_picture_opens(tmp_path: Path) -> None:
    (tmp_path / "a.webp").write_bytes(encode(draw(1, (900, 600)), "WEBP"))
    save_captioned(Prediction(tmp_path / "a.webp", {}), "dog 0.9", tmp_path / "told" / "a.png")
    with Image.open(tmp_path / "told" / "a.png") as picture:
        assert picture.size[0] == 800
