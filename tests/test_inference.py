"""Weights kept in the type that is computed in: the same answers bit for bit, half the memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lpmflow.config import lpmflow_tiny
from lpmflow.matcher import Matcher
from lpmflow.model import LPMFlow, create_model
from lpmflow.model.inference import keep_weights_in


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 1, 3, 96, 96, generator=torch.Generator().manual_seed(0))


def network() -> LPMFlow:
    torch.manual_seed(0)
    return LPMFlow(lpmflow_tiny().replace(image_size=96)).eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_answers_are_those_of_autocast(images, dtype):
    model = network()
    with torch.inference_mode(), torch.autocast("cpu", dtype):
        wanted = model(*images)
    keep_weights_in(model, dtype)
    with torch.inference_mode(), torch.autocast("cpu", dtype):
        found = model(*images)
    assert all(found[part].equal(wanted[part]) for part in range(4))


def test_what_is_kept_in_it():
    model = network()
    keep_weights_in(model, torch.bfloat16)
    types = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert types["layout.blocks.0.attn.qkv.weight"] == types["integration.head_out.weight"] == torch.bfloat16
    assert types["layout.blocks.0.norm1.weight"] == types["integration.x_normal"] == torch.float32
    assert types["layout.blocks.0.attn.bias_table"] == types["layout.position"] == torch.float32
    assert not model.layout.blocks[0].attn.qkv.weight.requires_grad


def test_layers_that_work_on_their_weights_keep_them():
    class Centred(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight - self.weight.mean(), self.bias)

    model = nn.Sequential(Centred(3, 4, 1), nn.Conv2d(4, 4, 1))
    keep_weights_in(model, torch.bfloat16)
    assert [layer.weight.dtype for layer in model] == [torch.float32, torch.bfloat16]


def test_a_matcher_keeps_them_in_it_where_the_network_is_its_own(photo):
    own, passed = Matcher(dtype="bfloat16"), create_model("lpmflow-tiny", pretrained=True)
    lent = Matcher(passed, dtype="bfloat16")
    assert own.model.layout.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in passed.parameters()} == {torch.float32}
    shifted = photo.copy()
    shifted[:, 5:] = photo[:, :-5]
    assert (own(photo, shifted).flow == lent(photo, shifted).flow).all()
