"""`ops.linear` at the base network's layers against PyTorch's own: where the whole network's time on a CPU goes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timing import interleaved

from lpmflow import ops

WIDTH = 768
HIDDEN = 4 * WIDTH
LAYERS = {"qkv": (WIDTH, 3 * WIDTH), "proj": (WIDTH, WIDTH), "fc1 and GELU": (WIDTH, HIDDEN), "fc2": (HIDDEN, WIDTH)}
TOKENS = {"both images": 514, "both images, super-resolution": 2048}


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("layer", LAYERS)
def test_linear(layer, tokens, device, dtype, seconds, peaks, report):
    if device.type != "cpu":
        pytest.skip("on other devices it is PyTorch's own")
    inputs, outputs = LAYERS[layer]
    gelu = "GELU" in layer
    shapes = (TOKENS[tokens], inputs), (outputs, inputs), (outputs,)
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in shapes)

    def plain():
        y = F.linear(x, weight, bias)
        return F.gelu(y) if gelu else y

    with torch.inference_mode():
        torch.testing.assert_close(ops.linear(x, weight, bias, gelu=gelu), plain(), rtol=2e-2, atol=1e-3 * inputs**0.5)
        runs = {"PyTorch": plain, "ops.linear": lambda: ops.linear(x, weight, bias, gelu=gelu)}
        times = interleaved(runs, device, seconds=seconds)
    for way, time in times.items():
        report.add(
            "linear layers, inference",
            layer=layer,
            tokens=TOKENS[tokens],
            way=way,
            ms=1e3 * time,
            ratio=times["PyTorch"] / time,
            roofline=f"{100 * 2 * TOKENS[tokens] * inputs * outputs / peaks.flops / time:.0f} %",
        )
