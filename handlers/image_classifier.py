"""The TorchServe handler: one class on ts's ImageClassifier, thin over what travels with it.

A batch goes through four steps, and only the third needs all its pictures at once:

    request -> encoded picture -> uint8 pixels -> outputs of the network -> answer

Every row has its own fate. A row that cannot be answered gets its own status and a JSON body that says why
(`{"code", "type", "message", "request_id"}`); its neighbours keep their answers.

TorchServe builds the one class of this file, whatever its name, so a second class of any kind must not stand here.
It runs on Python 3.9 with torch 2.4 as well; of ours it imports what travels along: modelspec, protocols, engines,
explain and telemetry.
"""

from __future__ import annotations

import base64
import dataclasses
import importlib
import json
import logging
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, List, Mapping, Union

import torch

import engines
import explain
import modelspec
import protocols
import telemetry
from modelspec import CardError, ModelCard, PictureError
from protocols import Told, Wrap, encoded_pictures

# ts's own explanations and transforms, and a backend of torch.compile: nothing of them is called here.
sys.modules.setdefault("openvino.torch", None)  # type: ignore[arg-type]
with engines.unloaded("captum", "captum.attr", "torchvision"):
    from ts.torch_handler.base_handler import BaseHandler
    from ts.torch_handler.image_classifier import ImageClassifier
    from ts.utils.util import list_classes_from_module

logger = logging.getLogger(__name__)

SETTINGS = {"precision": "fp32", "engine": "auto", "threads": "auto", "explanations": 2, "log_requests": True}
"""What model-config.yaml may say under `handler:`, with its defaults."""

PHRASES = {
    400: "Bad Request",
    404: "Not Found",
    413: "Payload Too Large",
    415: "Unsupported Media Type",
    422: "Unprocessable Entity",
    429: "Too Many Requests",
    500: "Internal Server Error",
    503: "Service Unavailable",
}

Reply = Union[Dict[str, Any], bytes]
Outcome = Union[torch.Tensor, List[torch.Tensor], Reply, PictureError]
"""What became of one row so far: its pixels (of each of its instances), its answer, or the reason why there is none."""


class MartenClassifier(ImageClassifier):  # type: ignore[misc]
    """Answers pictures exactly as the model card beside the weights says."""

    model: Any  # the network as loaded; set by BaseHandler

    def initialize(self, context: Any) -> None:
        """Load card, labels and weights, refuse whatever disagrees, and run the network once.

        Raises:
            CardError: the code is not this archive's own, or card, labels, weights and settings do not belong together.
        """
        folder = Path(context.system_properties["model_dir"])
        check_own(
            folder, __file__, *(module.__file__ for module in (modelspec, protocols, engines, explain, telemetry))
        )
        self.settings = read_settings(context.model_yaml_config)
        self.card = find_card(folder, context.manifest["model"]["serializedFile"])
        self.spec = self.card.spec
        self.threads = threads = engines.fit_threads(self.settings["threads"])
        torch.set_num_threads(threads)
        self.decoders = ThreadPoolExecutor(threads, "decoder") if threads > 1 else None
        # Not VisionHandler's: that one starts captum's explanations and lifts Pillow's limit.
        BaseHandler.initialize(self, context)
        self.initialized = False
        cores = engines.cores_told()
        self.engine, told = engines.choose_engine(self.model, self.spec, self.settings, self.device, threads, cores)
        logger.info(told)
        if told.startswith("engine openvino"):
            torch.set_num_threads(1)  # after normalising, torch's threads would spin where OpenVINO's compute
        self._warm_up()
        telemetry.tell_expected(context, self.card.data.get("train"), self.spec.version, self.card.weights_sha256)
        self.initialized = True

    def _load_pickled_model(self, model_dir: str, model_file: str, model_pt_path: str) -> torch.nn.Module:
        """Build the network with the card's arguments, where BaseHandler would pass none."""
        if "torchvision" in Path(model_dir, model_file).read_text(encoding="utf-8"):
            engines.import_torchvision()
        module = importlib.import_module(Path(model_file).stem)
        check_own(Path(model_dir), module.__file__)
        (network_class,) = list_classes_from_module(module)
        network: torch.nn.Module = network_class(**self.spec.arch_args)
        network.load_state_dict(modelspec.load_state_dict(model_pt_path))
        return network

    def _warm_up(self) -> None:
        height, width = self.spec.preprocess.size_px
        black_NHWC = torch.zeros(1, height, width, 3, dtype=torch.uint8)
        if not torch.isfinite(self.inference(black_NHWC)).all():
            raise CardError("the network's outputs are not finite: these weights cannot be served")

    def handle(self, data: List[Mapping[str, Any]], context: Any) -> List[Reply]:
        """Answer a batch of requests, each with its own status."""
        started = time.perf_counter()
        self.context = context
        self.records = [telemetry.new_record(context, i) for i in range(len(data))]
        self.forward_s = 0.0
        self.wrap: Dict[int, Wrap] = {}
        outcomes = self.preprocess(data)
        self._explain_rows(outcomes)
        rows = {i: pixels_of(outcome) for i, outcome in enumerate(outcomes) if pixels_of(outcome)}
        answers = iter(self._answer([pixels for pictures in rows.values() for pixels in pictures]))
        for i, pictures in rows.items():
            told = [next(answers) for _ in pictures]
            for answer in told:
                if isinstance(answer, dict):
                    self.records[i].note_answer(answer)
            outcomes[i] = self.wrap[i](told) if i in self.wrap else told[0]
        replies = [self._reply(i, outcome) for i, outcome in enumerate(outcomes)]
        telemetry.tell(context, self.records, self.forward_s, self.settings["log_requests"])
        if getattr(context, "metrics", None) is not None:
            context.metrics.add_time("HandlerTime", round((time.perf_counter() - started) * 1000, 2), None, "ms")
        return replies

    def preprocess(self, data: List[Mapping[str, Any]]) -> List[Outcome]:
        """Decode each row to uint8 pixels of shape (height, width, 3), or to the reason why it cannot be."""
        decode = map if self.decoders is None or len(data) == 1 else self.decoders.map  # Pillow frees the interpreter
        return list(decode(self._decode, range(len(data)), data))

    def inference(self, pixels_NHWC: torch.Tensor) -> torch.Tensor:
        """Run the network on uint8 pixels; returns float32 outputs of shape (batch, outputs)."""
        if self.device.type == "cuda":
            pixels_NHWC = pixels_NHWC.pin_memory()
        with torch.inference_mode():
            images_NCHW = self.spec.preprocess.normalize(pixels_NHWC.to(self.device, non_blocking=True))
            return self.spec.logits(self.engine, images_NCHW)

    def postprocess(self, logits_NK: torch.Tensor) -> List[Dict[str, Any]]:
        """Turn outputs into answers by the card."""
        return self.spec.answers(logits_NK)

    def _decode(self, i: int, row: Mapping[str, Any]) -> Outcome:
        started = time.perf_counter()
        try:
            if self.context.get_request_header(i, "describe") == "True":
                return {"spec": dataclasses.asdict(self.spec), "metrics": dict(self.card.metrics)}
            pictures, wrap = encoded_pictures(row, self.spec)
            self.records[i].size_bytes = sum(map(len, pictures))
            pixels = [self.spec.preprocess.pixels(self.spec.preprocess.read(picture)) for picture in pictures]
            if wrap is None:
                return pixels[0]
            self.wrap[i] = wrap
            return pixels
        except PictureError as error:
            return error
        except MemoryError:
            return PictureError(413, "the picture does not fit into memory")
        except Exception:
            logger.exception("decoding failed")
            return PictureError(500, "decoding failed: the server's log says why")
        finally:
            self.records[i].decode_s = time.perf_counter() - started

    def _answer(self, pixels: List[torch.Tensor]) -> List[Told]:
        """Answers for decoded rows; when the batch fails, each row is tried alone, so that one cannot fail all."""
        if not pixels:
            return []
        started = time.perf_counter()
        try:
            answers = self.postprocess(self.inference(torch.stack(pixels)))
            self.forward_s += time.perf_counter() - started
            return list(answers)
        except Exception as error:  # MemoryError, or torch's RuntimeError and its OutOfMemoryError
            logger.exception("a batch of %d failed", len(pixels))
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            if len(pixels) > 1:
                return [outcome for one in pixels for outcome in self._answer([one])]
            if isinstance(error, MemoryError) or "out of memory" in str(error):
                return [PictureError(503, "out of memory: try again later")]
            return [PictureError(500, "the prediction failed: the server's log says why")]

    def _explain_rows(self, outcomes: List[Outcome]) -> None:
        """Put heat maps in place of the decoded pictures of /explanations, a bounded number in each batch."""
        asked = [i for i in range(len(outcomes)) if self.context.get_request_header(i, "explain") == "True"]
        left = self.settings["explanations"]
        for i in asked:
            pixels = outcomes[i]
            if isinstance(pixels, list):
                outcomes[i] = PictureError(400, "an explanation is of one picture: send it as the body")
            if not isinstance(pixels, torch.Tensor):
                continue
            if not self.settings["explanations"]:
                outcomes[i] = PictureError(404, "explanations are not offered: ask /predictions")
            elif left:
                left -= 1
                started = time.perf_counter()
                outcomes[i] = self._explain(i, pixels)
                self.records[i].explain_s = time.perf_counter() - started
            else:
                outcomes[i] = PictureError(429, "too many explanations at once: ask again in a second")
                self.context.set_response_header(i, "Retry-After", "1")

    def _explain(self, i: int, pixels_HWC: torch.Tensor) -> Outcome:
        """The picture under its heat map as a PNG, or JSON with it inside, as the request accepts."""
        others = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            heat_HW, index = explain.heat_map(self.model, self.spec, pixels_HWC)
            png = explain.overlay_png(pixels_HWC, heat_HW)
        except ValueError as error:
            return PictureError(404, str(error))
        except Exception:
            logger.exception("an explanation failed")
            return PictureError(500, "the explanation failed: the server's log says why")
        finally:
            torch.set_num_threads(others)
        headers = self.context.get_all_request_header(i)
        if any(name.lower() == "accept" and "image/png" in str(value) for name, value in headers.items()):
            return png
        label = self.spec.labels[index] if self.spec.labels else str(index)
        return {"label": label, "heat_map_png": base64.b64encode(png).decode("ascii")}

    def _reply(self, i: int, outcome: Outcome) -> Reply:
        if isinstance(outcome, bytes):
            self.context.set_response_content_type(i, "image/png")
            return outcome
        self.context.set_response_content_type(i, "application/json")
        if isinstance(outcome, dict):
            return outcome
        assert isinstance(outcome, PictureError)
        phrase = PHRASES[outcome.status]
        self.records[i].status = outcome.status
        self.context.set_response_status(outcome.status, phrase, i)
        return {
            "code": outcome.status,
            "type": phrase.replace(" ", ""),
            "message": str(outcome),
            "request_id": self.context.get_request_id(i),
        }


def pixels_of(outcome: Outcome) -> List[torch.Tensor]:
    """The decoded pictures of a row, none where its fate is sealed already."""
    if isinstance(outcome, torch.Tensor):
        return [outcome]
    return outcome if isinstance(outcome, list) else []


# ------------------------------------------------------------------------------------------------- what is loaded


def check_own(folder: Path, *files: Any) -> None:
    """Refuse code that was not unpacked with these weights.

    TorchServe puts the archive's folder on PYTHONPATH after whatever was there, so a stray modelspec.py or vgg.py
    elsewhere would be taken instead of the archive's own, and would answer otherwise.

    Raises:
        CardError: a file lies outside the folder.
    """
    for file in files:
        if Path(file).resolve().parent != folder.resolve() and Path(file).parent != folder:
            raise CardError("{} would run instead of {}'s own copy: take it off PYTHONPATH".format(file, folder))


def find_card(folder: Path, weights: str) -> ModelCard:
    """Read the card beside the weights and check labels and weights against it.

    Raises:
        CardError: one is missing, or they disagree.
    """
    path = folder / weights
    card = ModelCard.read(path.with_suffix(".json"))
    found = modelspec.sha256_file(path)
    if found != card.weights_sha256:
        raise CardError("{} has sha256 {}, but its card says {}".format(path, found, card.weights_sha256))
    names = folder / "index_to_name.json"
    if not names.is_file():
        raise CardError("{} is missing: archive the model again".format(names))
    modelspec.check_labels(card.spec.labels, json.loads(names.read_text(encoding="utf-8")), names)
    return card


def read_settings(config: Any) -> Dict[str, Any]:
    """Take our settings from model-config.yaml's `handler:`, over their defaults.

    Raises:
        CardError: an unknown setting or value.
    """
    settings = {**SETTINGS, **((config or {}).get("handler") or {})}
    unknown = sorted(set(settings) - set(SETTINGS))
    if unknown:
        raise CardError("model-config.yaml, handler: unknown {}; known: {}".format(unknown, sorted(SETTINGS)))
    for name, known in engines.CHOICES.items():
        if settings[name] not in known:
            raise CardError("model-config.yaml, handler: {} must be one of {}".format(name, ", ".join(known)))
    threads = settings["threads"]
    if threads != "auto" and (type(threads) is not int or threads < 1):
        raise CardError("model-config.yaml, handler: threads must be auto or a number of 1 or more")
    if type(settings["explanations"]) is not int or settings["explanations"] < 0:
        raise CardError("model-config.yaml, handler: explanations must be a number of 0 or more")
    if type(settings["log_requests"]) is not bool:
        raise CardError("model-config.yaml, handler: log_requests must be true or false")
    return settings
