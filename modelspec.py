"""The contract: how a picture becomes a tensor, and how a tensor becomes an answer.

This one file is imported by training from the repository's root and by the TorchServe handler from the
`.mar`'s root. Whatever trained is what serves, because it is the same code fed with the same card.

It runs unchanged on Python 3.9 with torch 2.4 (the official TorchServe image), and imports torch only
where a tensor is made, so that commands which merely read a card stay quick.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

from PIL import Image, ImageCms, ImageOps

if TYPE_CHECKING:
    import torch

CARD_FORMAT = "marten-card/1"
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "AVIF", "BMP", "TIFF")
MAX_PIXELS = 50_000_000
"""Largest picture decoded, in pixels: 50 megapixels are 150 MB as RGB. Beyond it: status 413."""
MAX_ASPECT = 100
"""Longest side over shortest side from which a long picture (over 1,000 px) is refused with status 422."""
RESIZE_RULES = ("squash", "crop", "pad")
TASKS = ("classification", "regression", "embedding")
_BILINEAR, _BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC
_ORIENTATION = 0x0112  # of EXIF
_INTERPOLATIONS = {"bilinear": _BILINEAR, "bicubic": _BICUBIC}

# Pillow warns at MAX_IMAGE_PIXELS and refuses at twice that; our own check gives the answer, before any decoding.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# It also grumbles about broken EXIF blocks of pictures that it decodes all the same, and Python keeps each such text.
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")


class MartenError(Exception):
    """Root of every error meant for a person: what was found, where, and what to do."""


class CardError(MartenError):
    """A model card, its weights or its labels disagree with each other or with this code."""


class PictureError(MartenError):
    """A picture that cannot be answered, with the HTTP status that says whose fault it is."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


# ---------------------------------------------------------------------------------------------- from bytes to RGB


def sniff_format(data: Union[bytes, bytearray]) -> Optional[str]:
    """Name the picture format that the first bytes announce, or None when it is not an allowed one."""
    if data[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if data[:4] == b"\x89PNG":
        return "PNG"
    if data[:4] == b"GIF8":
        return "GIF"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp" and data[8:12] in (b"avif", b"avis"):
        return "AVIF"
    if data[:2] == b"BM" and int.from_bytes(data[14:18], "little") in (12, 16, 40, 52, 56, 64, 108, 124):
        return "BMP"
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "TIFF"
    return None


def read_picture(source: Union[bytes, str, Path], min_size_px: Optional[int] = None) -> Image.Image:
    """Decode a picture to upright 8-bit RGB: the only way in, for training and for serving.

    First frame; EXIF orientation applied; 16-bit and float scaled to 8 bits; alpha composited over white;
    CMYK, Lab, palette, grey and bilevel converted. A JPEG much larger than `min_size_px` is decoded at 1/2, 1/4
    or 1/8 scale, never below `min_size_px` on its shorter side.

    Args:
        source: the encoded picture, or the path of its file.
        min_size_px: shorter side in pixels that must survive a reduced decode; None decodes in full.

    Returns:
        Picture of mode "RGB", any size.

    Raises:
        PictureError: 400 empty, 404 no such file, 413 too large, 415 not an allowed format, 422 damaged or too long.
    """
    try:
        data = source if isinstance(source, (bytes, bytearray)) else Path(source).read_bytes()
    except OSError as error:
        raise PictureError(404, "cannot read the picture: {}".format(error)) from error
    if not data:
        raise PictureError(400, "the body is empty: send the bytes of one picture")
    name = sniff_format(data)
    if name is None or name not in Image.registered_extensions().values():
        raise PictureError(415, "not a picture in an allowed format ({})".format(", ".join(FORMATS)))
    try:
        with Image.open(io.BytesIO(data), formats=[name]) as opened:
            _check_size(opened.size, name)
            if min_size_px is not None and name == "JPEG":
                scale = min(1.0, min_size_px / min(opened.size))
                opened.draft(None, (math.ceil(opened.width * scale), math.ceil(opened.height * scale)))
            opened.load()
            return _to_rgb(_upright(opened))
    except PictureError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # the latter where warnings raise
        raise PictureError(413, _too_large()) from error
    except MemoryError as error:
        raise PictureError(413, "the picture does not fit into memory") from error
    except Exception as error:  # Pillow's parsers raise almost anything on damaged bytes: struct, Index, Key, Syntax…
        raise PictureError(422, "a damaged {} picture: {}".format(name, _short(error))) from error


def _too_large() -> str:
    return "the picture has more than {:,} pixels: send a smaller one".format(MAX_PIXELS)


def _short(error: Exception) -> str:
    """First line of an error in printable ASCII, so that neither the input nor an object's address is echoed."""
    text = re.sub(r" ?<[^>]*>", "", (str(error).splitlines() or [""])[0])
    return "".join(c for c in text if " " <= c <= "~" and c not in "<>&")[:120] or type(error).__name__


def _check_size(size: Tuple[int, int], name: str) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise PictureError(422, "a damaged {} picture: {}x{} pixels".format(name, width, height))
    if width * height > MAX_PIXELS:
        raise PictureError(413, _too_large())
    if max(size) > 1000 and max(size) > MAX_ASPECT * min(size):
        raise PictureError(422, "a picture of {}x{} pixels is too long to be judged".format(width, height))


def _upright(picture: Image.Image) -> Image.Image:
    try:
        if picture.getexif().get(_ORIENTATION, 1) == 1:
            return picture  # which exif_transpose would copy
        return ImageOps.exif_transpose(picture)
    except Exception:  # a broken EXIF block must not cost the picture its answer
        return picture


def _to_rgb(picture: Image.Image) -> Image.Image:
    mode = picture.mode
    if mode == "RGB" and "transparency" not in picture.info:
        return picture
    if mode in ("I", "F") or mode.startswith("I;16"):
        return _scale_deep(picture).convert("RGB")
    if mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(picture, lab, srgb, outputMode="RGB") or picture
    if mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        rgba = picture.convert({"La": "LA", "RGBa": "RGBA"}.get(mode, mode)).convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return picture.convert("RGB")


def _scale_deep(picture: Image.Image) -> Image.Image:
    """Bring a 16-bit, 32-bit or float grey picture to 8 bits by the full range its values announce.

    16-bit files by 65535; floats by 1, 255 or 65535, whichever first holds the largest value; anything beyond
    by its own minimum and maximum.
    """
    is_float = picture.mode == "F"
    values = picture.convert("F")
    low, high = (float(v) for v in values.getextrema())  # type: ignore[arg-type]
    if not (math.isfinite(low) and math.isfinite(high)):
        raise PictureError(422, "a damaged picture: its values are not finite")
    tops = (1.0, 255.0, 65535.0) if is_float else (65535.0,)
    top = next((t for t in tops if high <= t and low >= 0), None)
    offset, span = (0.0, top) if top is not None else (low, max(high - low, 1e-12))
    return values.point(lambda v: v * (255.0 / span) + (0.5 - offset * 255.0 / span)).convert("L")


# ------------------------------------------------------------------------------------------- from RGB to a tensor


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """How a picture becomes the tensor that a network was trained on. Data, not code: it is stored in the card.

    Attributes:
        size_px: (height, width) of the network's input.
        resize: "squash" to the size whatever the aspect; "crop" the centre of the right aspect; "pad" with grey.
        crop_fraction: share of the centre crop's side that is kept, in (0, 1]; only with "crop".
        interpolation: "bilinear" or "bicubic", both antialiased.
        mean, std: per channel, of values in 0..1.
    """

    size_px: Tuple[int, int] = (224, 224)
    resize: str = "squash"
    crop_fraction: float = 1.0
    interpolation: str = "bilinear"
    mean: Tuple[float, ...] = (0.485, 0.456, 0.406)
    std: Tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        problems = []
        if len(self.size_px) != 2 or min(self.size_px) < 1:
            problems.append("size_px must be two positive numbers, found {}".format(self.size_px))
        if self.resize not in RESIZE_RULES:
            problems.append("resize must be one of {}, found {!r}".format(", ".join(RESIZE_RULES), self.resize))
        if self.interpolation not in _INTERPOLATIONS:
            problems.append("interpolation must be bilinear or bicubic, found {!r}".format(self.interpolation))
        if not 0 < self.crop_fraction <= 1:
            problems.append("crop_fraction must lie in (0, 1], found {}".format(self.crop_fraction))
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            problems.append("mean and std must hold three numbers, std positive")
        if problems:
            raise CardError("preprocess: " + "; ".join(problems))

    @property
    def min_size_px(self) -> int:
        """Shorter side that a reduced JPEG decode must keep: twice the input's longer side."""
        return 2 * math.ceil(max(self.size_px) / self.crop_fraction)

    def read(self, source: Union[bytes, str, Path]) -> Image.Image:
        """Decode a picture no finer than this network can use; see `read_picture`."""
        return read_picture(source, self.min_size_px)

    def resized(self, picture: Image.Image) -> Image.Image:
        """Bring an RGB picture to `size_px` by the card's rule; cost is bounded whatever the aspect."""
        height, width = self.size_px
        filter_ = _INTERPOLATIONS[self.interpolation]
        if self.resize == "squash":
            return picture.resize((width, height), filter_)
        full_w, full_h = picture.size
        if self.resize == "crop":
            side = min(full_w / width, full_h / height) * self.crop_fraction
            crop_w, crop_h = side * width, side * height
            left, top = (full_w - crop_w) / 2, (full_h - crop_h) / 2
            return picture.resize((width, height), filter_, box=(left, top, left + crop_w, top + crop_h))
        scale = min(width / full_w, height / full_h)
        inner = (max(1, round(full_w * scale)), max(1, round(full_h * scale)))
        canvas = Image.new("RGB", (width, height), tuple(round(255 * m) for m in self.mean))
        canvas.paste(picture.resize(inner, filter_), ((width - inner[0]) // 2, (height - inner[1]) // 2))
        return canvas

    def pixels(self, picture: Image.Image) -> torch.Tensor:
        """Resize an RGB picture by the card's rule.

        Returns:
            uint8 tensor of shape (height, width, 3), values 0..255.
        """
        return to_pixels(self.resized(picture))

    def normalize(self, pixels_NHWC: torch.Tensor) -> torch.Tensor:
        """Scale, shift and lay out a batch as the network wants it, on the batch's own device.

        Args:
            pixels_NHWC: uint8, shape (batch, height, width, 3).

        Returns:
            float32, shape (batch, 3, height, width), (value / 255 - mean) / std, in channels_last memory.
        """
        import torch

        count, height, width, channels = pixels_NHWC.shape
        # for each value of a row: four times as fast as for each channel, and the same to the bit
        mean, std = (torch.tensor(each, device=pixels_NHWC.device).repeat(width) for each in (self.mean, self.std))
        rows = pixels_NHWC.to(torch.float32).reshape(count, height, width * channels)
        return rows.div_(255.0).sub_(mean).div_(std).view(pixels_NHWC.shape).permute(0, 3, 1, 2)

    def __call__(self, source: Union[bytes, str, Path]) -> torch.Tensor:
        """Turn one encoded picture into a float32 tensor of shape (1, 3, height, width)."""
        return self.normalize(self.pixels(self.read(source)).unsqueeze(0))


def to_pixels(picture: Image.Image) -> torch.Tensor:
    """Copy an RGB picture into a uint8 tensor of shape (height, width, 3)."""
    import torch

    flat = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return flat.view(picture.height, picture.width, 3)


# --------------------------------------------------------------------------------------- from a tensor to an answer


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Everything that turns weights into answers.

    Attributes:
        name: the endpoint, /predictions/<name>.
        arch: file of the architecture, models/<arch>/<arch>.py; its one class is built with `arch_args`.
        task: "classification", "regression" or "embedding".
        labels: class names by index; empty unless classification.
        topk: how many labels an answer holds.
        score_offset, score_scale: a regression's answer is its output times the scale, plus the offset.
        temperature: logits are divided by it before the softmax (calibration; 1 changes nothing).
        mirror: average the logits of the picture and of its mirror image.
    """

    name: str
    arch: str
    labels: Tuple[str, ...] = ()
    arch_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    task: str = "classification"
    topk: int = 1
    temperature: float = 1.0
    mirror: bool = False
    score_offset: float = 0.0
    score_scale: float = 1.0
    version: str = "1.0"
    preprocess: Preprocess = dataclasses.field(default_factory=Preprocess)

    def __post_init__(self) -> None:
        problems = []
        if self.task not in TASKS:
            problems.append("task must be one of {}, found {!r}".format(", ".join(TASKS), self.task))
        if self.task == "classification" and len(self.labels) < 2:
            problems.append("a classifier needs at least two labels, found {}".format(list(self.labels)))
        if len(set(self.labels)) != len(self.labels):
            problems.append("labels repeat: {}".format(list(self.labels)))
        if self.topk < 1:
            problems.append("topk must be at least 1, found {}".format(self.topk))
        if not all(isinstance(label, str) for label in self.labels):
            problems.append("labels must be text, found {}".format(list(self.labels)))
        if not self.temperature > 0:
            problems.append("temperature must be positive, found {}".format(self.temperature))
        if problems:
            raise CardError("model {!r}: ".format(self.name) + "; ".join(problems))

    def logits(self, model: Callable[[torch.Tensor], torch.Tensor], images_NCHW: torch.Tensor) -> torch.Tensor:
        """Run the network, or an engine in its place; returns float32 outputs of shape (batch, outputs)."""
        out: torch.Tensor = model(images_NCHW)
        if self.mirror:
            out = (out + model(images_NCHW.flip(3))) / 2
        return out.float()

    def probabilities(self, logits_NK: torch.Tensor) -> torch.Tensor:
        """Calibrated class probabilities, float32 of shape (batch, classes), rows summing to 1."""
        return (logits_NK.float() / self.temperature).softmax(1)

    def answers(self, logits_NK: torch.Tensor, topk: Optional[int] = None) -> List[Dict[str, Any]]:
        """Turn a batch of outputs into what the client reads.

        Returns:
            One dict per row: {label: probability} of the `topk` likeliest, likeliest first; {"score": x} for
            regression; {"embedding": [...]} for embedding.
        """
        if self.task == "regression":
            return [{"score": float(row[0]) * self.score_scale + self.score_offset} for row in logits_NK.float().cpu()]
        if self.task == "embedding":
            return [{"embedding": row.tolist()} for row in logits_NK.float().cpu()]
        probs_NK = self.probabilities(logits_NK).cpu()
        values, indices = probs_NK.topk(min(topk or self.topk, len(self.labels)), dim=1)
        return [
            {self.labels[i]: p for i, p in zip(row_i, row_p)} for row_i, row_p in zip(indices.tolist(), values.tolist())
        ]


# -------------------------------------------------------------------------------------------------- the model card


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """The `.json` beside the weights: what the model is, what it saw, how good it is, where it comes from.

    Attributes:
        spec: the contract of this model.
        weights_sha256: of the state dict's file.
        data: name, counts by label and split, digest of the pictures.
        training: the settings of the run, its seed and what it ended with.
        metrics: each with the count it rests on and its interval.
        provenance: command, commit, versions, date.
    """

    spec: ModelSpec
    weights_sha256: str
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        """The card as indented JSON text, keys in the order of this class, ending with a newline."""
        return json.dumps({"format": CARD_FORMAT, **dataclasses.asdict(self)}, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, path: Union[str, Path]) -> ModelCard:
        """Read a card and check every key of it.

        Raises:
            CardError: no such file, not JSON, an unknown format, a missing, unknown or wrong key.
        """
        path = Path(path)
        if not path.is_file():
            raise CardError("no model card at {}: it is written beside the weights by train_main.py".format(path))
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CardError("{} is not JSON: {}".format(path, error)) from error
        if not isinstance(raw, dict) or raw.pop("format", None) != CARD_FORMAT:
            raise CardError("{} is not a card of the format {}".format(path, CARD_FORMAT))
        try:
            spec = _record(ModelSpec, raw.pop("spec"))
            return cls(spec=spec, **raw)
        except (TypeError, KeyError, ValueError, AttributeError, CardError) as error:
            raise CardError("{}: {}".format(path, error)) from error


def _record(kind: Any, raw: Mapping[str, Any]) -> Any:
    """Build a dataclass from JSON, lists as tuples, refusing unknown keys by name."""
    known = {field.name for field in dataclasses.fields(kind)}
    unknown = sorted(set(raw) - known)
    if unknown:
        raise CardError("unknown key {} in {}; known: {}".format(unknown, kind.__name__, sorted(known)))
    values: Dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
    if "preprocess" in values:
        values["preprocess"] = _record(Preprocess, values["preprocess"])
    return kind(**values)


# ------------------------------------------------------------------------------------------------- weights, labels


def sha256_file(path: Union[str, Path]) -> str:
    """Hex sha256 of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def load_state_dict(path: Union[str, Path]) -> Dict[str, torch.Tensor]:
    """Read a bare state dict onto the CPU, tensors only, never a program.

    Raises:
        CardError: no such file, not readable as weights alone, or a training checkpoint instead of a state dict.
    """
    import torch

    if not Path(path).is_file():
        raise CardError("no weights at {}: train them with train_main.py --model_path {}".format(path, path))
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a truncated zip, a pickle with code, another kind of file
        raise CardError("{} cannot be read: cut short, or something else than tensors in it".format(path)) from error
    if not isinstance(loaded, dict) or not all(isinstance(v, torch.Tensor) for v in loaded.values()):
        raise CardError("{} is no bare state dict: give the .pth that training saved".format(path))
    return loaded


def check_labels(labels: Sequence[str], index_to_name: Mapping[str, Any], where: Union[str, Path]) -> None:
    """Refuse an index_to_name.json that says otherwise than the card.

    Raises:
        CardError: with both lists.
    """
    listed = [index_to_name.get(str(i)) for i in range(len(labels))]
    if len(index_to_name) != len(labels) or listed != list(labels):
        raise CardError("{} names {}, but the model was trained on {}".format(where, dict(index_to_name), list(labels)))
