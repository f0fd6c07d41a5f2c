"""The assembled network: shapes, variants that train, images of other sizes and types, what is refused."""

from __future__ import annotations

import copy
import math
import sys

import pytest
import torch
import torch.nn.functional as F

from lpmflow import create_model
from lpmflow.model.backbone import Features

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"image_size": (32, 48), "layout_depth": 1, "windows": (4, 3, 2), "superres_window": 3}


def tiny(**options):
    torch.manual_seed(0)
    return create_model("lpmflow-tiny", **{**SMALL, **options})


def stir(model):
    """No parameter at zero, so that every one has a say."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, dtype=parameter.dtype))


@pytest.fixture(scope="module")
def tiny_model():
    """Where nothing but an error comes out."""
    return tiny()


@pytest.fixture
def vit(small_vit):
    """Builds the small preset's structure, four correlations of four heads, on a ViT of width 32."""

    def build(**options):
        torch.manual_seed(0)
        chosen = {**SMALL, "backbone": small_vit(), "heads": 4, "refine_width": 24, "refine_heads": 4, **options}
        return create_model("lpmflow-small", **chosen)

    return build


def images(batch=2, size=(32, 48), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch, 3, *size, generator=generator).unbind(0)


def disturb(model):
    """A fresh refinement adds nothing; this one does. And no gate's few hidden channels are all below zero."""
    with torch.no_grad():
        model.integration.head_out.weight.normal_(std=0.1)
        for name, parameter in model.named_parameters():
            if name.endswith("fc1.weight") and ".gates." in name:
                parameter.abs_()
    return model


# What comes out


@pytest.mark.parametrize("image_size", [(32, 48), (80, 32)])
@pytest.mark.parametrize("preset", ["tiny", "vit"])
def test_shapes_and_ranges(vit, preset, image_size):
    model = (tiny if preset == "tiny" else vit)(image_size=image_size).eval()
    h, w = image_size[0] // 16, image_size[1] // 16
    with torch.inference_mode():
        out = model(*images(3, image_size), return_correlations=True)
    scales = ("11", "22") if preset == "tiny" else ("11", "12", "21", "22")
    heads = 6 if preset == "tiny" else 4
    assert out.flow.shape == (3, 2, 8 * h, 8 * w)
    assert out.mappings.shape == (3, len(scales), 2, 2 * h, 2 * w)
    assert out.confidence.shape == (3, 2 * h, 2 * w) and out.foreground.shape == (3, h, w)
    cells = {"1": h * w, "2": 4 * h * w}
    assert [tuple(corr.shape) for corr in out.correlations] == [(3, cells[s], cells[t]) for s, t in scales]
    for corr in out.correlations:
        assert (corr > 0).all() and (corr.sum(dim=2) < heads).all()
    assert out.mappings.abs().max() <= 1 + 1e-6
    assert (out.confidence > 0).all() and (out.confidence <= 1).all()
    assert out.foreground.amin(dim=(1, 2)).tolist() == [0] * 3 and out.foreground.amax(dim=(1, 2)).tolist() == [1] * 3
    assert all(tensor.dtype == torch.float32 for tensor in (*out[:4], *out.correlations)) and out.rptc_loss is None


def test_flow_is_the_finest_mapping_in_cells_and_what_the_refinement_adds():
    model = disturb(tiny()).eval()
    seen = []
    model.integration.head_out.register_forward_hook(lambda module, given, result: seen.append(result))
    with torch.inference_mode():
        out = model(*images())
        model.skip_refinement = True
        alone = model(*images())
    assert len(seen) == 1 and seen[0].abs().max() > 0.01
    x, y = torch.meshgrid(torch.arange(6), torch.arange(4), indexing="xy")
    finest = (out.mappings[:, -1] + 1) * torch.tensor([5, 3])[:, None, None] / 2 - torch.stack((x, y))
    torch.testing.assert_close(alone.flow, F.interpolate(4 * finest, scale_factor=4, mode="nearest"))
    torch.testing.assert_close(out.flow, alone.flow + seen[0])
    assert torch.equal(out.mappings, alone.mappings)


def test_a_fresh_network_starts_at_the_correlations_own_flow():
    model = tiny().eval()
    with torch.inference_mode():
        out = model(*images())
        model.skip_refinement = True
        assert torch.equal(model(*images()).flow, out.flow)


def test_a_fresh_cross_attention_is_a_similarity(vit):
    superres = vit().superres
    for block in (superres.match_coarse, superres.match_cross, superres.match_fine):
        query, key, value = block.cross_attn.qkv.weight.data.chunk(3)
        assert torch.equal(query, key) and not torch.equal(query, value)
        assert query.std() == pytest.approx(32**-0.5, rel=0.1)


def test_confidence_and_correlations_belong_together():
    """Of the finest tensor: softmax(corr / temperature), its largest entry."""
    model = tiny(temperature=0.3).eval()
    with torch.inference_mode():
        out = model(*images(), return_correlations=True)
    assert model(*images()).correlations is None
    probabilities = (out.correlations[-1] / 0.3).softmax(dim=-1)
    torch.testing.assert_close(out.confidence.flatten(1), probabilities.amax(dim=-1))


@pytest.mark.parametrize("training", [False, True])
def test_correlations_too_large_to_hold_are_streamed(vit, monkeypatch, training):
    """The same flow and the same gradients as with the whole tensors in memory."""
    model = vit(dropout=0.0, refine_dropout=0.0, rptc_top_k=0).double().train(training)
    stir(model)
    source, target = (x.double() for x in images())
    wanted = model(source, target, return_correlations=True)
    assert wanted.correlations is not None
    monkeypatch.setattr(sys.modules["lpmflow.ops.correlation_flow"], "BLOCK_BYTES", 1)
    found = model(source, target)
    assert found.correlations is None
    for name in ("flow", "mappings", "confidence"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name))
    gradients = []
    for out in (found, wanted):
        parameters = [p for name, p in model.named_parameters() if "match" in name or "normal" in name]
        gradients.append(torch.autograd.grad(out.flow.square().sum(), parameters))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_in_double_precision_they_are_twice_as_large(vit, monkeypatch):
    model = vit().eval()
    source, target = images()
    size = len(source) * math.prod(model.config.fine_grid) ** 2 * 4
    monkeypatch.setattr(sys.modules["lpmflow.ops.correlation_flow"], "BLOCK_BYTES", size)
    streamed = []
    correlate = model.integration.correlate
    monkeypatch.setattr(model.integration, "correlate", lambda *a, **o: streamed.append(1) or correlate(*a, **o))
    with torch.inference_mode():
        model(source, target)
        assert not streamed
        model.double()(source.double(), target.double())
        assert len(streamed) == 4


def test_pairs_of_a_batch_are_independent(vit):
    model = disturb(vit()).eval()
    source, target = images(3)
    with torch.inference_mode():
        whole = model(source, target)
        alone = model(source[1:2], target[1:2])
    torch.testing.assert_close(alone.flow, whole.flow[1:2], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(whole.flow[0], whole.flow[1])


def test_other_sizes_are_resized_bilinearly_without_antialias():
    model = disturb(tiny()).eval()
    source, target = images(size=(50, 33))[0], images(size=(16, 100))[1]
    resized = [F.interpolate(x, size=(32, 48), mode="bilinear", antialias=False) for x in (source, target)]
    with torch.inference_mode():
        assert torch.equal(model(source, target).flow, model(*resized).flow)


@pytest.mark.parametrize(("patch_size", "image_size"), [(8, (16, 24)), (14, (28, 42))])
def test_other_patch_sizes(vit, patch_size, image_size):
    model = vit(patch_size=patch_size, image_size=image_size)
    out = model(*images(size=image_size))
    assert out.flow.shape == (2, 2, 16, 24)
    out.flow.square().mean().backward()


def test_autocast_and_float64_agree_with_float32(vit):
    for model in (disturb(tiny()).eval(), disturb(vit()).eval()):
        model.integration.config = model.config.replace(temperature=10.0)  # a fresh network's argmax is a coin toss
        source, target = images()
        with torch.inference_mode():
            wanted = model(source, target).flow
            with torch.autocast("cpu", torch.bfloat16):
                half = model(source.bfloat16(), target.bfloat16()).flow
            double = model.double()(source.double(), target.double()).flow
        assert half.dtype == torch.float32 and double.dtype == torch.float64
        torch.testing.assert_close(half, wanted, rtol=0, atol=0.05 * float(wanted.abs().max()))
        torch.testing.assert_close(double.float(), wanted, rtol=0, atol=1e-3)


# Training


@pytest.mark.parametrize("preset", ["tiny", "vit"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"representation": "isolated"},
        {"representation": "bidirectional"},
        {"region_bias": False},
        {"cross_scale": False},
        {"cross_scale": True},
        {"windows": (8, 8, 8)},
        {"superres_depth": 2},
        {"fine_features": False},
        {"rptc_top_k": 0},
        {"rptc_top_k": 6, "rptc_ratio": 0.5},
    ],
)
def test_every_parameter_of_every_variant_is_trained(vit, preset, options):
    model = disturb((tiny if preset == "tiny" else vit)(**options)).train()
    out = model(*images())
    has_task = model.config.rptc_top_k > 0
    assert (out.rptc_loss is not None) == has_task
    loss = out.flow.square().mean() + (out.rptc_loss if has_task else 0)
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_rptc_is_a_task_of_training_only(vit):
    model = vit(rptc_top_k=4, rptc_ratio=0.5)
    source, target = images()
    assert model.eval()(source, target).rptc_loss is None
    task = model.train()(source, target).rptc_loss
    assert task.shape == () and task.requires_grad and task > 0
    # one replaced token has no negatives
    assert vit(rptc_top_k=1).train()(source, target).rptc_loss.item() == 0


def test_the_task_is_of_the_source_and_leaves_the_foreground_alone(vit):
    """Six of six patches replaced: the source's own patches do not matter any more, but its foreground does."""
    model = vit(dropout=0.0, refine_dropout=0.0, rptc_top_k=6, rptc_ratio=1.0).train()
    source, target = images()
    tokens = model.backbone(torch.cat((source, target))).tokens
    model.backbone.forward = lambda given: Features(tokens, None)
    before = model(source, target)
    tokens = torch.cat((tokens[:, :1], torch.cat((tokens[:2, 1:].flip(1), tokens[2:, 1:]))), dim=1)
    after = model(source, target)
    torch.testing.assert_close(after.flow, before.flow)
    torch.testing.assert_close(after.foreground.flatten(1), before.foreground.flatten(1).flip(1))


def test_without_refinement_its_parameters_rest():
    model = tiny().train()
    model.skip_refinement = True
    model(*images()).flow.square().mean().backward()
    idle = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    refinement = {name for name, _ in model.named_parameters() if name.startswith("integration.")}
    refinement -= {"integration.x_normal", "integration.y_normal"}
    last = "superres.match_fine.cross_attn.proj."
    assert idle == refinement | {f"{last}weight", f"{last}bias"}


# Refusals


@pytest.mark.parametrize("name", ["source", "target"])
@pytest.mark.parametrize(
    ("given", "error", "wanted"),
    [
        ([1], TypeError, r"must be a torch\.Tensor \(B, 3, H, W\), got list"),
        (torch.zeros(3, 32, 48), ValueError, r"must have shape \(B, 3, H, W\) .*, got \(3, 32, 48\)"),
        (torch.zeros(2, 1, 32, 48), ValueError, r"must have shape \(B, 3, H, W\) .*, got \(2, 1, 32, 48\)"),
        (torch.zeros(2, 32, 48, 3), ValueError, r"must have shape \(B, 3, H, W\) .*, got \(2, 32, 48, 3\)"),
        (torch.zeros(0, 3, 32, 48), ValueError, r"must have .* at least 1, got \(0, 3, 32, 48\)"),
        (torch.zeros(2, 3, 0, 48), ValueError, r"must have .* at least 1, got \(2, 3, 0, 48\)"),
        (torch.zeros(2, 3, 32, 48, dtype=torch.uint8), TypeError, "must be floating point .*, got torch.uint8"),
        (
            torch.zeros(2, 3, 32, 48).double(),
            TypeError,
            "must have the network's dtype torch.float32 .*, got torch.float64",
        ),
        (
            torch.zeros(2, 3, 32, 48).half(),
            TypeError,
            "must have the network's dtype torch.float32 .*, got torch.float16",
        ),
        (torch.zeros(2, 3, 32, 48, device="meta"), ValueError, "must be on the network's device cpu, got meta"),
    ],
)
def test_images_that_make_no_sense_are_named(tiny_model, name, given, error, wanted):
    pair = dict(zip(("source", "target"), images(), strict=True))
    pair[name] = given
    with pytest.raises(error, match=f"^{name} {wanted}"):
        tiny_model(**pair)


def test_batches_of_two_sizes_and_half_parameters_are_refused(tiny_model):
    with pytest.raises(ValueError, match="source and target must have the same batch size, got 2 and 1"):
        tiny_model(images(2)[0], images(1)[1])
    with pytest.raises(TypeError, match=r"parameters must be float32 or float64 .*, got torch\.float16"):
        tiny().half()(*(x.half() for x in images()))


def test_options_that_do_not_fit_the_backbone_are_named(vit):
    with pytest.raises(ValueError, match="heads must divide the backbone's width 192, got 5"):
        tiny(heads=5)
    with pytest.raises(ValueError, match="heads must divide the backbone's width 32, got 3"):
        vit(heads=3)
    with pytest.raises(ValueError, match="fine_features must be False for the backbone small_vit: it has one stride"):
        vit(fine_features=True)


def test_a_load_that_failed_leaves_the_weights_random(tiny_model):
    model = copy.deepcopy(tiny_model)
    model.weights = None
    state = model.state_dict()
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({**state, "integration.x_normal": torch.zeros(3)})
    model.load_state_dict({"integration.x_normal": state["integration.x_normal"]}, strict=False)
    assert model.weights is None
    model.load_state_dict(state)
    assert model.weights == "load_state_dict"
