"""Released checkpoints: every name and shape as documented, the way there and back, refusals that list names."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import lpmflow
from lpmflow import create_model, load_checkpoint
from lpmflow.model import LPMFlow
from lpmflow.model.released import from_released, is_released, released_name, to_released

SMALL = {
    "image_size": (48, 80),
    "layout_depth": 2,
    "cross_scale": True,
    "fine_features": False,
    "superres_depth": 2,
    "superres_window": 2,
    "windows": (4, 3, 2),
}
UNUSED = [
    "masked_tokens",
    "pos_embed_src",
    "encoder.pos_embed_trg",
    "encoder.cls_pos_embed_src",
    "encoder.cls_token",
    "encoder.pos_embed",
    "encoder.patch_embed.proj.weight",
    "encoder.blocks.1.spatial_attention.weight",
    "encoder.blocks.0.attn.relative_position_index",
    "decoder_s1.last_block.0.norm3.weight",
    "decoder_s3.last_block.0.norm4.bias",
    "decoder_s1.last_block.0.pos_embed_src_up",
    "decoder_s3.last_block.0.pos_embed_trg",
    "SRBranches.refine_swin_decoder_8.0.transformer.layers.0.blocks.0.attn.relative_position_index",
    "feature_extraction.backbone.head.weight",
]


def documented() -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of what a released checkpoint holds and inference reads, written out from its description."""

    def linear(name: str, width_in: int, width_out: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (width_out, width_in)
        yield f"{name}.bias", (width_out,)

    def norms(name: str, width: int, *leaves: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        for leaf in leaves:
            yield f"{name}.{leaf}.weight", (width,)
            yield f"{name}.{leaf}.bias", (width,)

    def block(name: str, width: int, *attentions: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from norms(name, width, "norm1", "norm2")
        for attention in attentions:
            yield from linear(f"{name}.{attention}.qkv", width, 3 * width)
            yield from linear(f"{name}.{attention}.proj", width, width)
        yield from linear(f"{name}.mlp.fc1", width, 4 * width)
        yield from linear(f"{name}.mlp.fc2", 4 * width, width)

    def swin(name: str, width: int, window: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        inner = f"{name}.0.transformer.layers.0.blocks.0"
        yield from block(inner, width, "attn")
        yield f"{inner}.attn.relative_position_bias_table", ((2 * window - 1) ** 2, 8)
        yield from norms(f"{name}.0.transformer", width, "norm")
        yield f"{name}.1.fc.0.weight", (width // 16, width, 1, 1)
        yield f"{name}.1.fc.2.weight", (width, width // 16, 1, 1)

    yield from (("x_normal", (32,)), ("y_normal", (32,)))
    vit = "feature_extraction.backbone"
    yield from ((f"{vit}.cls_token", (1, 1, 768)), (f"{vit}.pos_embed", (1, 197, 768)))
    yield from ((f"{vit}.patch_embed.proj.weight", (768, 3, 16, 16)), (f"{vit}.patch_embed.proj.bias", (768,)))
    yield from norms(vit, 768, "norm")
    for number in range(12):
        yield from block(f"{vit}.blocks.{number}", 768, "attn")
    yield "encoder.pos_embed_src", (1, 256, 768)
    for leaf in ("cls_pos_embed_trg", "src_segment_pos_embed", "trg_segment_pos_embed"):
        yield f"encoder.{leaf}", (1, 1, 768)
    for number in range(6):
        yield from block(f"encoder.blocks.{number}", 768, "attn")
        yield f"encoder.blocks.{number}.attn.relative_position_bias_table", (8, 3844)
    yield from norms("encoder", 768, "norm")
    for decoder, tables in ((1, {"": 257}), (2, {"": 257, "_up": 1025}), (3, {"_up": 1025})):
        name = f"decoder_s{decoder}.last_block.0"
        yield from block(name, 768, "sattn", "cattn")
        for suffix, length in tables.items():
            yield f"{name}.pos_embed_src{suffix}", (1, length, 768)
            yield f"{name}.pos_embed_trg{suffix}", (1, length, 768)
    for number in (1, 2):
        yield from swin(f"SRBranch_feat.refine_swin_decoder_1_{number}", 768, 4)
    for window in (16, 8, 4):
        yield from swin(f"SRBranches.refine_swin_decoder_{window}", 96, window)
    for number, shape in ((0, (32, 96, 3, 3)), (2, (2, 32, 3, 3))):
        yield from ((f"SRBranches.refine2.{number}.weight", shape), (f"SRBranches.refine2.{number}.bias", shape[:1]))
    yield from (("refine_proj_query_feat.0.weight", (88, 768, 1, 1)), ("refine_proj_query_feat.0.bias", (88,)))


@pytest.fixture(scope="module")
def model() -> LPMFlow:
    """A small network with random numbers in every parameter and running average."""
    torch.manual_seed(0)
    model = create_model("lpmflow-tiny", **SMALL).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor + 0.1 * torch.rand_like(tensor))
    return model


def fresh(**options) -> LPMFlow:
    """A network of the same shape without numbers: what is not loaded shows as an error."""
    with torch.device("meta"):
        return create_model("lpmflow-tiny", **{**SMALL, **options})


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


# Names and shapes


def test_every_name_and_shape_of_the_base_network():
    wanted = dict(documented())
    found = lpmflow.released_parameter_shapes()
    assert len(found) == len(wanted) == 383
    assert dict(found) == wanted == dict(found)  # more than once
    assert all(type(name) is str and type(shape) is tuple for name, shape in found)


def test_the_size_of_the_base_network():
    total = sum(torch.Size(shape).numel() for _, shape in lpmflow.released_parameter_shapes())
    assert total == 175_772_354


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("backbone.net.parametrizations.pos_embed.original", "feature_extraction.backbone.pos_embed"),
        ("backbone.net.blocks.3.attn.qkv.bias", "feature_extraction.backbone.blocks.3.attn.qkv.bias"),
        ("layout.position", "encoder.pos_embed_src"),
        ("layout.cls_position", "encoder.cls_pos_embed_trg"),
        ("layout.segment_source", "encoder.src_segment_pos_embed"),
        ("layout.segment_target", "encoder.trg_segment_pos_embed"),
        ("superres.match_coarse.self_attn.qkv.weight", "decoder_s1.last_block.0.sattn.qkv.weight"),
        ("superres.match_cross.cross_attn.proj.bias", "decoder_s2.last_block.0.cattn.proj.bias"),
        ("superres.match_cross.position_source", "decoder_s2.last_block.0.pos_embed_src"),
        ("superres.match_fine.position_target_fine", "decoder_s3.last_block.0.pos_embed_trg_up"),
        ("superres.upsample.gates.1.fc2.weight", "SRBranch_feat.refine_swin_decoder_1_2.1.fc.2.weight"),
        ("integration.stages.0.norm_out.bias", "SRBranches.refine_swin_decoder_16.0.transformer.norm.bias"),
        ("integration.gates.2.fc1.weight", "SRBranches.refine_swin_decoder_4.1.fc.0.weight"),
        ("integration.head_hidden.weight", "SRBranches.refine2.0.weight"),
        ("integration.head_out.bias", "SRBranches.refine2.2.bias"),
        ("integration.context.weight", "refine_proj_query_feat.0.weight"),
    ],
)
def test_which_of_ours_is_which_of_theirs(ours, theirs):
    assert released_name(ours) == theirs


def test_every_tensor_keeps_its_numbers(model):
    released = model.released_state_dict()
    assert len(released) == len(model.state_dict())
    for name, tensor in model.state_dict().items():
        stored = released[released_name(name)]
        assert torch.equal(stored.flatten(), tensor.flatten()), name
        assert stored.ndim == (4 if ".gates." in name else tensor.ndim), name


# There and back


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapped", [False, True])
def test_round_trip(model, prefix, wrapped):
    released = {prefix + name: tensor for name, tensor in to_released(model).items()}
    given = {"state_dict": released, "epoch": 3, "args": None} if wrapped else released
    assert is_released(given)
    same(from_released(given, fresh()), model.state_dict())


def test_a_model_loads_and_answers_the_same(model):
    other = create_model("lpmflow-tiny", **SMALL).eval()
    assert other.weights is None
    other.load_released_state_dict(model.released_state_dict())
    assert other.weights == "a released checkpoint"
    same(other.state_dict(), model.state_dict())
    source, target = torch.randn(2, 1, 3, 48, 80)
    with torch.inference_mode():
        assert torch.equal(other(source, target).flow, model(source, target).flow)


def test_what_inference_never_reads_is_accepted(model):
    released = {**to_released(model), **{name: torch.zeros(1) for name in UNUSED}}
    same(from_released(released, fresh()), model.state_dict())


# Files


def test_a_file_is_read_by_its_path(model, tmp_path):
    path = tmp_path / "released.pth"
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in to_released(model).items()}}, path)
    options = {name: value for name, value in model.config.to_dict().items() if name != "name"}
    for given in (path, str(path)):
        loaded = load_checkpoint(given, **options)
        assert loaded.weights == str(path) and not loaded.training
        assert loaded.config == model.config.replace(name="lpmflow-base")
        same(loaded.state_dict(), model.state_dict())


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "other.pth"
    for content in ({"conv.weight": torch.zeros(1)}, {}, {"state_dict": 3}, {"state_dict": {3: 4}}):
        torch.save(content, path)
        with pytest.raises(ValueError, match=r"other\.pth is no LPMFlow checkpoint: it has no parameter encoder\.norm"):
            load_checkpoint(path)


# Refusals


def test_missing_and_unexpected_parameters_are_listed(model):
    released = to_released(model)
    del released["encoder.norm.bias"], released["y_normal"]
    released["encoder.norm.scale"] = torch.zeros(1)
    with pytest.raises(ValueError) as caught:
        from_released(released, fresh())
    assert str(caught.value) == (
        "the released checkpoint does not fit the model: 2 missing (encoder.norm.bias, y_normal); "
        "1 unexpected (encoder.norm.scale)"
    ) or str(caught.value) == (
        "the released checkpoint does not fit the model: 2 missing (y_normal, encoder.norm.bias); "
        "1 unexpected (encoder.norm.scale)"
    )


def test_a_long_list_is_counted(model):
    released = {name: tensor for name, tensor in to_released(model).items() if not name.startswith("decoder_s2.")}
    lost = len(model.state_dict()) - len(released)
    with pytest.raises(ValueError, match=rf"{lost} missing \(decoder_s2\.(.+, ){{7}}.+ and {lost - 8} more\)$"):
        fresh().load_released_state_dict(released)


def test_a_failed_load_leaves_the_model_alone(model):
    other = create_model("lpmflow-tiny", **SMALL)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    released = to_released(model)
    released["refine_proj_query_feat.0.bias"] = torch.zeros(7)
    with pytest.raises(ValueError, match=r"integration\.context\.bias must have shape \(40,\), got \(7,\)"):
        other.load_released_state_dict(released)
    assert other.weights is None
    same(other.state_dict(), before)


@pytest.mark.parametrize(
    "options",
    [
        {"representation": "isolated"},
        {"representation": "bidirectional"},
        {"region_bias": False},
        {"cross_scale": False},
        {"windows": (4, 2)},
        {"fine_features": True},
        {"superres_depth": 1},
    ],
)
def test_a_variant_without_released_names_is_refused(options):
    variant = fresh(**options)
    for attempt in (variant.released_state_dict, lambda: variant.load_released_state_dict({})):
        with pytest.raises(ValueError, match="released checkpoints describe the joint, region-biased, cross-scale"):
            attempt()
