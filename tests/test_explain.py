"""A heat map is hot where the thing is that the network looks for."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from explain import heat_map, overlay_png
from marten.architectures import known_architectures
from marten.weights import load_model
from modelspec import ModelSpec, Preprocess
from tests.pictures import draw


class RedFinder(torch.nn.Module):
    """Says class 1 as strongly as there is red anywhere, class 0 for blue."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 2, 1, bias=False)
        self.conv.weight.data = torch.tensor([[-1.0, -1.0, 1.0], [1.0, -1.0, -1.0]]).view(2, 3, 1, 1)

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        return self.conv(images_NCHW).relu().mean((2, 3))


SPEC = ModelSpec("red", "red", ("blue", "red"), preprocess=Preprocess((40, 60), mean=(0.0,) * 3, std=(1.0,) * 3))


def test_it_is_hot_where_the_class_is() -> None:
    picture = Image.new("RGB", (60, 40), "black")
    picture.paste("red", (40, 5, 55, 20))
    picture.paste("blue", (2, 25, 8, 35))
    pixels = SPEC.preprocess.pixels(picture)
    heat, index = heat_map(RedFinder().eval(), SPEC, pixels)
    assert index == 1
    assert heat.shape == (40, 60)
    assert heat[10, 47] == pytest.approx(1.0)
    assert float(heat[25:, :20].max()) < 0.01
    blue, _ = heat_map(RedFinder().eval(), SPEC, pixels, label=0)
    assert blue[30, 5] == pytest.approx(1.0)
    assert float(blue[:20, 40:].max()) < 0.01
    shown = Image.open(io.BytesIO(overlay_png(pixels, heat)))
    assert (shown.size, shown.mode) == ((60, 40), "RGB")
    assert shown.getpixel((5, 2)) == (0, 0, 0)


@pytest.mark.parametrize("name", ["base_cnn", "efficientnet_lite0", "resnet18"])
def test_every_kind_of_network_is_looked_into_and_left_as_it_was(tiny_model: Callable[..., Path], name: str) -> None:
    assert name in known_architectures()
    network, card = load_model(tiny_model(name))
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    with torch.inference_mode():  # as a server calls it
        heat, _ = heat_map(network, card.spec, card.spec.preprocess.pixels(draw(1)))
    assert heat.shape == card.spec.preprocess.size_px
    assert 0 <= float(heat.min()) <= float(heat.max()) <= 1
    assert all(torch.equal(before[key], tensor) for key, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
