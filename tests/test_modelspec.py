"""The contract: every picture is answered or refused with its reason, and a card says all that serving needs."""

from __future__ import annotations

import io
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageStat

import modelspec
from modelspec import CardError, ModelCard, ModelSpec, PictureError, Preprocess, read_picture
from tests.pictures import bad_pictures, deep, draw, encode, odd_pictures, oriented

ODD, BAD = odd_pictures(), bad_pictures()
LABELS = ("cat", "dog", "fox")
quick = settings(max_examples=40, deadline=None)


def difference(a: Image.Image, b: Image.Image) -> float:
    """Mean absolute difference of two pictures of one size, 0..255."""
    assert a.size == b.size
    return sum(ImageStat.Stat(ImageChops.difference(a, b)).mean) / 3


# ------------------------------------------------------------------------------------------------ reading pictures


@pytest.mark.parametrize("name", ODD)
def test_every_odd_picture_becomes_rgb(name: str) -> None:
    picture = read_picture(ODD[name], 448)
    assert picture.mode == "RGB"
    assert min(picture.size) >= 1


@pytest.mark.parametrize("name", BAD)
def test_every_bad_picture_is_refused_with_its_status(name: str) -> None:
    status, data = BAD[name]
    with pytest.raises(PictureError) as refusal:
        read_picture(data)
    assert refusal.value.status == status
    assert str(refusal.value).isascii()
    assert str(refusal.value).isprintable()


def outcome(data: bytes) -> str | int:
    """The mode of the picture that was read, or the status it was refused with."""
    try:
        return read_picture(data, 448).mode
    except PictureError as error:
        return error.status


@given(st.binary(max_size=300), st.sampled_from(sorted(ODD)), st.integers(0, 64))
@quick
def test_no_bytes_raise_anything_but_a_picture_error(noise: bytes, name: str, kept: int) -> None:
    for data in (noise, ODD[name][:kept] + noise):
        assert outcome(data) in ("RGB", 400, 413, 415, 422)


@given(st.sampled_from(sorted(ODD)), st.data())
@settings(max_examples=150, deadline=None)
def test_flipped_bits_never_raise_anything_but_a_picture_error(name: str, data: Any) -> None:
    damaged = bytearray(ODD[name])
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, min(len(damaged), 3000) - 1))] ^= data.draw(st.integers(1, 255))
    assert outcome(bytes(damaged)) in ("RGB", 413, 415, 422)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(kind: str, orientation: int) -> None:
    upright = read_picture(oriented(0, orientation, kind))
    assert difference(upright, draw(0)) < (6 if kind == "JPEG" else 0.01)


def test_alpha_is_laid_over_white() -> None:
    clear = Image.new("RGBA", (4, 4), (9, 80, 200, 0))
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert read_picture(encode(clear, "PNG")).getpixel((1, 1)) == (255, 255, 255)
    assert read_picture(encode(half, "PNG")).getpixel((1, 1)) == (127, 127, 127)
    assert read_picture(encode(Image.new("RGB", (4, 4)), "PNG", transparency=(0, 0, 0))).getpixel((1, 1)) == (255,) * 3
    assert read_picture(encode(clear.convert("LA"), "PNG")).getpixel((1, 1)) == (255, 255, 255)
    assert read_picture(encode(clear, "GIF")).getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize(("mode", "top"), [("I;16", 65535), ("I;16B", 65535), ("I", 65535), ("F", 1.0), ("F", 255.0)])
def test_deep_grey_keeps_its_range(mode: str, top: float) -> None:
    plain = draw(0).convert("L").convert("RGB")
    assert difference(read_picture(encode(deep(0, mode, top), "TIFF")), plain) <= 1


def test_deep_grey_beyond_the_known_ranges_is_stretched() -> None:
    picture = read_picture(encode(deep(0, "F", 1e6, -1e6), "TIFF"))
    assert picture.getextrema()[0] == (0, 255)


def test_only_the_first_frame_is_read() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for kind in ("TIFF", "PNG", "WEBP", "GIF"):
        data = encode(
            frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
        )
        assert read_picture(data).getpixel((4, 4)) == (255, 0, 0), kind


def test_cmyk_answers_like_the_same_picture_in_rgb() -> None:
    assert difference(read_picture(encode(draw(0).convert("CMYK"), "TIFF")), draw(0)) < 0.01
    assert difference(read_picture(encode(draw(0).convert("CMYK"), "JPEG", quality=95)), draw(0)) < 6


def test_a_reduced_decode_keeps_enough_for_the_network() -> None:
    data = encode(draw(3, (2400, 1600)), "JPEG", quality=95)
    full, reduced = read_picture(data), read_picture(data, 448)
    assert reduced.size == (1200, 800)
    assert difference(reduced.resize((224, 224)), full.resize((224, 224))) < 2
    assert read_picture(data, 1601).size == full.size == (2400, 1600)


def test_a_file_and_its_bytes_are_one_picture(tmp_path: Path) -> None:
    path = tmp_path / "misnamed.txt"
    path.write_bytes(ODD["png_rgba"])
    assert read_picture(path) == read_picture(str(path)) == read_picture(ODD["png_rgba"])
    with pytest.raises(PictureError, match=r"missing\.jpg") as refusal:
        read_picture(tmp_path / "missing.jpg")
    assert refusal.value.status == 404


# ------------------------------------------------------------------------------------------------- pixels, tensors


@given(
    st.tuples(st.integers(1, 80), st.integers(1, 80)),
    st.tuples(st.integers(1, 400), st.integers(1, 400)),
    st.sampled_from(modelspec.RESIZE_RULES),
    st.floats(0.2, 1.0),
    st.sampled_from(["bilinear", "bicubic"]),
)
@quick
def test_any_picture_fits_any_input(
    size_px: tuple[int, int], picture_size: tuple[int, int], resize: str, fraction: float, interpolation: str
) -> None:
    preprocess = Preprocess(size_px, resize, fraction, interpolation)
    pixels_HWC = preprocess.pixels(draw(1, picture_size))
    assert pixels_HWC.shape == (*size_px, 3)
    assert pixels_HWC.dtype == torch.uint8
    images_NCHW = preprocess.normalize(pixels_HWC.unsqueeze(0))
    assert images_NCHW.shape == (1, 3, *size_px)
    assert images_NCHW.dtype == torch.float32
    wanted = (pixels_HWC.double() / 255 - torch.tensor(preprocess.mean)) / torch.tensor(preprocess.std)
    assert (images_NCHW[0].permute(1, 2, 0) - wanted).abs().max() < 1e-5


def test_resize_rules_differ_as_they_say() -> None:
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste("blue", (0, 0, 100, 100))
    wide.paste("lime", (200, 0, 300, 100))
    squashed = Preprocess((50, 50), "squash").resized(wide)
    cropped = Preprocess((50, 50), "crop").resized(wide)
    padded = Preprocess((60, 60), "pad", mean=(0.5, 0.5, 0.5)).resized(wide)
    assert [squashed.getpixel((x, 25)) for x in (2, 25, 47)] == [(0, 0, 255), (255, 0, 0), (0, 255, 0)]
    assert cropped.crop((2, 0, 48, 50)).getcolors() == [(46 * 50, (255, 0, 0))]
    assert padded.getpixel((30, 5)) == (128, 128, 128)
    assert padded.getpixel((2, 30)) == (0, 0, 255)


def test_the_input_of_a_network_is_channels_last_memory() -> None:
    images_NCHW = Preprocess((8, 9))(ODD["jpeg_rgb"])
    assert images_NCHW.shape == (1, 3, 8, 9)
    assert images_NCHW.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "wrong",
    [
        {"size_px": (0, 5)},
        {"size_px": (5,)},
        {"resize": "stretch"},
        {"interpolation": "nearest"},
        {"crop_fraction": 0.0},
        {"crop_fraction": 1.5},
        {"std": (1.0, 0.0, 1.0)},
        {"mean": (0.5,)},
    ],
)
def test_an_impossible_preprocess_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(CardError, match=next(iter(wrong))):
        Preprocess(**wrong)


# -------------------------------------------------------------------------------------------------------- answers

rows = st.lists(st.lists(st.floats(-50, 50, width=32), min_size=3, max_size=3), min_size=1, max_size=4)


@given(rows, st.integers(1, 5), st.floats(0.1, 10))
@quick
def test_answers_are_probabilities_likeliest_first(logits: list[list[float]], topk: int, temperature: float) -> None:
    logits_NK = torch.tensor(logits)
    answers = ModelSpec("m", "a", LABELS, topk=topk, temperature=temperature).answers(logits_NK)
    assert len(answers) == len(logits)
    for row, answer in zip(logits, answers, strict=True):
        values = list(answer.values())
        assert len(answer) == min(topk, 3)
        assert values == sorted(values, reverse=True)
        assert all(0 <= value <= 1 for value in values)
        assert topk < 3 or math.isclose(sum(values), 1, abs_tol=1e-5)
        assert row[LABELS.index(next(iter(answer)))] >= max(row) - 1e-4


def test_other_tasks_answer_in_their_own_words() -> None:
    outputs_NK = torch.tensor([[0.25, 2.0]])
    assert ModelSpec("m", "a", task="regression").answers(outputs_NK) == [{"score": 0.25}]
    assert ModelSpec("m", "a", task="embedding").answers(outputs_NK) == [{"embedding": [0.25, 2.0]}]


def test_mirror_averages_a_picture_and_its_mirror_image() -> None:
    spec = ModelSpec("m", "a", ("cat", "dog"), mirror=True)
    images_NCHW = torch.rand(2, 3, 4, 5)

    class Corner(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, :2, 0, 0]

    outputs = spec.logits(Corner(), images_NCHW)
    assert torch.equal(outputs, (images_NCHW[:, :2, 0, 0] + images_NCHW[:, :2, 0, -1]) / 2)
    assert torch.equal(outputs, spec.logits(Corner(), images_NCHW.flip(3)))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"labels": ("cat",)}, "two labels"),
        ({"labels": ("cat", "cat")}, "repeat"),
        ({"labels": (0, 1)}, "text"),
        ({"labels": LABELS, "topk": 0}, "topk"),
        ({"labels": LABELS, "temperature": 0.0}, "temperature"),
        ({"labels": LABELS, "temperature": math.nan}, "temperature"),
        ({"labels": LABELS, "task": "guessing"}, "guessing"),
    ],
)
def test_an_impossible_model_is_refused(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(CardError, match=named):
        ModelSpec("m", "a", **wrong)


# ------------------------------------------------------------------------------------------ cards, weights, labels

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
preprocesses = st.builds(
    Preprocess,
    size_px=st.tuples(st.integers(1, 999), st.integers(1, 999)),
    resize=st.sampled_from(modelspec.RESIZE_RULES),
    crop_fraction=st.floats(0.01, 1),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
)
specs = st.builds(
    ModelSpec,
    name=names,
    arch=names,
    labels=st.lists(names, min_size=2, max_size=5, unique=True).map(tuple),
    arch_args=st.dictionaries(names, st.integers() | st.floats(0, 1) | names, max_size=3),
    topk=st.integers(1, 9),
    temperature=st.floats(0.1, 9),
    mirror=st.booleans(),
    preprocess=preprocesses,
)


@given(specs, st.dictionaries(names, st.integers() | names, max_size=3))
@quick
def test_a_card_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, spec: ModelSpec, facts: Any
) -> None:
    path = tmp_path_factory.mktemp("card") / "model_x.json"
    card = ModelCard(spec, "0" * 64, data=facts, metrics=facts)
    path.write_text(card.to_json(), encoding="utf-8")
    assert ModelCard.read(path) == card


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda raw: raw.update(format="marten-card/9"), "format"),
        (lambda raw: raw.update(colour="blue"), "colour"),
        (lambda raw: raw["spec"].update(colour="blue"), "colour"),
        (lambda raw: raw["spec"]["preprocess"].update(colour="blue"), "colour"),
        (lambda raw: raw["spec"]["preprocess"].update(resize="wrong"), "resize"),
        (lambda raw: raw["spec"].update(topk="many"), "topk|not supported"),
        (lambda raw: raw["spec"].pop("arch"), "arch"),
        (lambda raw: raw.pop("spec"), "spec"),
        (lambda raw: raw.pop("weights_sha256"), "weights_sha256"),
        (lambda raw: raw.update(spec=7), "7|int"),
    ],
)
def test_a_wrong_card_is_refused_by_name(tmp_path: Path, change: Any, named: str) -> None:
    raw = json.loads(ModelCard(ModelSpec("m", "a", LABELS), "0" * 64).to_json())
    change(raw)
    path = tmp_path / "model_x.json"
    path.write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(CardError, match=named):
        ModelCard.read(path)


def test_a_card_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CardError, match="no model card"):
        ModelCard.read(tmp_path / "model_x.json")
    (tmp_path / "list.json").write_text("[1]", encoding="utf-8")
    (tmp_path / "half.json").write_text('{"format":', encoding="utf-8")
    with pytest.raises(CardError, match="format"):
        ModelCard.read(tmp_path / "list.json")
    with pytest.raises(CardError, match="not JSON"):
        ModelCard.read(tmp_path / "half.json")


def test_only_bare_state_dicts_are_weights(tmp_path: Path) -> None:
    state = {"layer.weight": torch.rand(3, 2)}
    torch.save(state, tmp_path / "good.pth")
    torch.save({"model": state, "epoch": 3}, tmp_path / "checkpoint.pth")
    torch.save(torch.rand(3), tmp_path / "tensor.pth")
    (tmp_path / "program.pth").write_bytes(pickle.dumps(io.StringIO("code")))
    (tmp_path / "cut.pth").write_bytes((tmp_path / "good.pth").read_bytes()[:500])
    assert torch.equal(modelspec.load_state_dict(tmp_path / "good.pth")["layer.weight"], state["layer.weight"])
    for name, said in {
        "checkpoint": "no bare state dict",
        "tensor": "no bare state dict",
        "program": "cannot be read",
        "cut": "cannot be read",
        "missing": "no weights at",
    }.items():
        with pytest.raises(CardError, match=said):
            modelspec.load_state_dict(tmp_path / f"{name}.pth")


@given(st.permutations(LABELS), st.permutations(LABELS))
@quick
def test_labels_must_agree_in_order(card: list[str], listed: list[str]) -> None:
    index_to_name = {str(i): label for i, label in enumerate(listed)}
    if card == listed:
        modelspec.check_labels(card, index_to_name, "here")
    else:
        with pytest.raises(CardError, match="here"):
            modelspec.check_labels(card, index_to_name, "here")
    with pytest.raises(CardError):
        modelspec.check_labels(card, {**index_to_name, "3": "owl"}, "here")
