"""What a request may look like, from a raw body to KServe's protocols, and how its answers are put together for it.

Archived beside the handler: Python 3.9, and of ours modelspec alone.
"""

from __future__ import annotations

import base64
import binascii
import functools
import json
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple, Union

import modelspec
from modelspec import ModelSpec, PictureError

FIELDS = ("body", "data", "file", "image")
"""Names under which a request may carry its picture: TorchServe calls a raw body "body", forms choose freely."""

MAX_INSTANCES = 16
"""Pictures that one KServe request may hold; TorchServe's largest body bounds them too."""

Told = Union[Dict[str, Any], PictureError]
"""The answer to one picture, or the reason why there is none."""

Wrap = Callable[[List[Told]], Told]
"""Puts the answers of one request's pictures together."""


def encoded_pictures(row: Mapping[str, Any], spec: ModelSpec) -> Tuple[List[bytes], Optional[Wrap]]:
    """The pictures of a request, and how their answers are put together where it spoke one of KServe's protocols.

    v1 is {"instances": [{"b64": "..."}]}; v2, the Open Inference Protocol, {"inputs": [{"datatype": "BYTES", "data":
    ["..."]}]}. Both may hold several pictures, in base64.

    Raises:
        PictureError: as `encoded_picture`; or no picture, or more than MAX_INSTANCES.
    """
    value = row.get("body")
    if isinstance(value, (bytes, bytearray)) and value.lstrip()[:1] == b"{":
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise PictureError(400, "the body is broken JSON") from error
        row = {**row, "body": value}
    if isinstance(value, dict) and "instances" in value:
        return [_from_json(instance) for instance in _bounded(value["instances"])], together
    if isinstance(value, dict) and "inputs" in value:
        inputs = value["inputs"]
        if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
            raise PictureError(400, "send one input, of pictures")
        if inputs[0].get("datatype") != "BYTES":
            raise PictureError(400, "send pictures as base64 in an input of the datatype BYTES")
        pictures = [_from_json(text) for text in _bounded(inputs[0].get("data"))]
        return pictures, functools.partial(as_outputs, spec, value.get("id"))
    return [encoded_picture(row)], None


def _bounded(listed: Any) -> List[Any]:
    if not isinstance(listed, list) or not 1 <= len(listed) <= MAX_INSTANCES:
        raise PictureError(400, "send 1 to {} instances per request".format(MAX_INSTANCES))
    return listed


def together(told: List[Told]) -> Told:
    """The answers of one row's instances as KServe v1 wants them, or the first of them that is none."""
    failed = [outcome for outcome in told if isinstance(outcome, PictureError)]
    return failed[0] if failed else {"predictions": told}


def as_outputs(spec: ModelSpec, request_id: Any, told: List[Told]) -> Told:
    """The answers of one row's pictures as the Open Inference Protocol's tensors, or the first of them that is none.

    A classifier's are `label` and `probability`, of shape [pictures] or, with a topk over 1, [pictures, topk].
    """
    answers = [outcome for outcome in told if isinstance(outcome, dict)]
    if len(answers) < len(told):
        return together(told)
    if spec.task == "classification":
        shape = [len(answers)] + ([len(answers[0])] if len(answers[0]) > 1 else [])
        columns = [
            ("label", "BYTES", shape, [label for answer in answers for label in answer]),
            ("probability", "FP32", shape, [share for answer in answers for share in answer.values()]),
        ]
    elif spec.task == "regression":
        columns = [("score", "FP32", [len(answers)], [answer["score"] for answer in answers])]
    else:
        rows = [answer["embedding"] for answer in answers]
        columns = [("embedding", "FP32", [len(rows), len(rows[0])], [value for row in rows for value in row])]
    outputs = [dict(zip(("name", "datatype", "shape", "data"), column)) for column in columns]
    told_id = {"id": request_id} if isinstance(request_id, str) else {}
    return {"model_name": spec.name, "model_version": spec.version, **told_id, "outputs": outputs}


def encoded_picture(row: Mapping[str, Any]) -> bytes:
    """Find the one picture of a request: a raw body, a form field, base64 text, or JSON around base64.

    Raises:
        PictureError: 400, no picture, several, or text that is neither JSON nor base64.
    """
    given = [row[name] for name in FIELDS if row.get(name) is not None]
    if len(given) != 1:
        raise PictureError(400, "send one picture: as the body, or as one form field called data, file or image")
    value = given[0]
    if isinstance(value, (dict, list)):
        return _from_json(value)
    data = value.encode("utf-8", "replace") if isinstance(value, str) else value
    if not isinstance(data, (bytes, bytearray)):
        raise PictureError(400, "the body is JSON, but holds no picture")
    if not data or modelspec.sniff_format(data):
        return bytes(data)
    text = data.lstrip()[:1]
    if text in (b"{", b"[", b'"'):
        try:
            return _from_json(json.loads(data))
        except (ValueError, RecursionError) as error:
            raise PictureError(400, "the body is broken JSON") from error
    return _from_text(data) if _is_base64_picture(data) else bytes(data)


def _from_json(value: Any) -> bytes:
    """Take base64 out of "..." or {"data": "..."} with any name of FIELDS or b64."""
    if isinstance(value, dict):
        given = [value[name] for name in (*FIELDS, "b64", "image_bytes") if name in value]
        value = given[0] if len(given) == 1 else None
    if isinstance(value, dict) and set(value) == {"b64"}:
        value = value["b64"]
    if not isinstance(value, str):
        raise PictureError(400, 'the JSON holds no picture: send {"data": "<base64>"}')
    return _from_text(value.encode("utf-8", "replace"))


def _is_base64_picture(data: Union[bytes, bytearray]) -> bool:
    """Whether text starts as a picture in base64 does; other text is no picture at all (415)."""
    head = _bare(bytes(data[:200]))[:24]
    try:
        return modelspec.sniff_format(base64.b64decode(head + b"=" * (-len(head) % 4))) is not None
    except binascii.Error:
        return False


def _from_text(text: Union[bytes, bytearray]) -> bytes:
    bare = _bare(bytes(text))
    try:
        return base64.b64decode(bare + b"=" * (-len(bare) % 4), validate=True)
    except binascii.Error as error:
        raise PictureError(400, "the picture's base64 is broken") from error


def _bare(text: bytes) -> bytes:
    """Base64 without a data: prefix, line breaks or the letters of its variant for addresses."""
    if text.lstrip()[:5] == b"data:":
        text = text.partition(b",")[2]
    return b"".join(text.split()).translate(bytes.maketrans(b"-_", b"+/"))
