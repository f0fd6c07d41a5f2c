"""`LPMFlowConfig`: the presets' numbers, the sizes that follow from them, storage, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from lpmflow.config import PRESETS, LPMFlowConfig, lpmflow_base, lpmflow_small, lpmflow_tiny, preset

# The numbers


def test_the_base_network_is_the_papers():
    assert lpmflow_base().to_dict() == {
        "name": "lpmflow-base",
        "backbone": "vit_base_patch16_224.dino",
        "patch_size": 16,
        "image_size": (256, 256),
        "input_size": (512, 512),
        "heads": 8,
        "mlp_ratio": 4.0,
        "dropout": 0.1,
        "layout_depth": 6,
        "representation": "joint",
        "region_bias": True,
        "rptc_top_k": 64,
        "rptc_ratio": 0.25,
        "rptc_temperature": 0.1,
        "rptc_weight": 0.2,
        "rptc_decline": 0.1,
        "superres_depth": 2,
        "superres_window": 4,
        "fine_features": False,
        "cross_scale": True,
        "temperature": 0.02,
        "windows": (16, 8, 4),
        "refine_width": 96,
        "refine_heads": 8,
        "refine_dropout": 0.5,
    }


def test_the_small_network_differs_in_its_backbone_only():
    small = lpmflow_small().replace(name="lpmflow-base", backbone="vit_base_patch16_224.dino")
    assert lpmflow_small().backbone == "vit_small_patch16_224.dino" and small == lpmflow_base()


def test_a_preset_is_found_by_its_own_name():
    assert list(PRESETS) == ["lpmflow-base", "lpmflow-small", "lpmflow-tiny"]
    assert all(preset(name).name == name for name in PRESETS)


@pytest.mark.parametrize(
    ("config", "coarse", "fine", "flow"),
    [
        (lpmflow_base(), (16, 16), (32, 32), (128, 128)),
        (lpmflow_base().replace(image_size=(96, 160)), (6, 10), (12, 20), (48, 80)),
        (lpmflow_base().replace(image_size=(112, 70), patch_size=14), (8, 5), (16, 10), (64, 40)),
        (lpmflow_tiny(), (12, 12), (24, 24), (96, 96)),
    ],
)
def test_grids(config, coarse, fine, flow):
    assert (config.coarse_grid, config.fine_grid, config.flow_grid) == (coarse, fine, flow)


@pytest.mark.parametrize(("cross_scale", "scales", "context"), [(True, 4, 88), (False, 2, 92)])
def test_flows_and_context_fill_the_refinement_width(cross_scale, scales, context):
    config = lpmflow_base().replace(cross_scale=cross_scale)
    assert config.scales == (("11", "12", "21", "22") if cross_scale else ("11", "22"))
    assert len(config.scales) == scales and config.context_width == context


def test_one_number_is_a_square_and_a_list_a_tuple():
    config = lpmflow_base().replace(image_size=128, input_size=[320, 240], windows=[8, 4])
    assert (config.image_size, config.input_size, config.windows) == ((128, 128), (320, 240), (8, 4))
    assert hash(config) == hash(dataclasses.replace(config))


# Copies and storage


@pytest.mark.parametrize("name", PRESETS)
def test_a_trip_through_json(name):
    config = preset(name).replace(image_size=(64, 96), temperature=0.05)
    assert LPMFlowConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_copy_changes_what_is_named_only():
    config = lpmflow_base().replace(heads=4, representation="isolated")
    changed = {field for field, value in config.to_dict().items() if value != lpmflow_base().to_dict()[field]}
    assert changed == {"heads", "representation"}


def test_the_input_size_follows_the_image_size():
    base = preset("lpmflow-base")
    assert base.replace(image_size=512).input_size == (1024, 1024)
    assert base.replace(image_size=(128, 384)).input_size == (256, 768)
    assert base.replace(image_size=512, input_size=512).input_size == (512, 512)
    assert preset("lpmflow-tiny").replace(image_size=(384, 192)).input_size == (384, 192)


def test_nothing_is_assigned_afterwards():
    with pytest.raises(dataclasses.FrozenInstanceError):
        lpmflow_base().heads = 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dropout", 0),
        ("dropout", 1),
        ("refine_dropout", 1.0),
        ("rptc_top_k", 0),
        ("rptc_weight", 0.0),
        ("rptc_decline", 0.0),
        ("layout_depth", 1),
        ("windows", (8, 8, 8)),
        ("refine_width", 16),
        ("input_size", (1, 7)),
    ],
)
def test_extremes_that_make_sense(field, value):
    assert getattr(lpmflow_base().replace(**{field: value}), field) == value


# Refusals


def test_unknown_names_are_listed():
    with pytest.raises(ValueError, match="unknown model 'lpm'; the models are lpmflow-base, lpmflow-small, lpmflow-t"):
        preset("lpm")
    with pytest.raises(TypeError, match="unknown model option 'window'; the options are name, backbone, patch_size, "):
        lpmflow_base().replace(window=8)
    with pytest.raises(TypeError, match="unknown fields in the stored configuration: colour, window"):
        LPMFlowConfig.from_dict({**lpmflow_base().to_dict(), "window": 8, "colour": 1})


SIZE = "must be a positive integer or (height, width), got"
WINDOWS = "windows must be a sequence of positive integers such as (16, 8, 4), got"


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("image_size", 0, f"image_size {SIZE} 0"),
        ("image_size", (256,), f"image_size {SIZE} (256,)"),
        ("image_size", (256, 256.0), f"image_size {SIZE} (256, 256.0)"),
        ("image_size", "256", f"image_size {SIZE} '256'"),
        ("image_size", (-16, 16), f"image_size {SIZE} (-16, 16)"),
        ("image_size", (256, 250), "image_size must be a multiple of patch_size 16, got (256, 250)"),
        ("input_size", True, f"input_size {SIZE} True"),
        ("input_size", None, f"input_size {SIZE} None"),
        ("patch_size", 0, "patch_size must be an integer of at least 1, got 0"),
        ("patch_size", 14, "image_size must be a multiple of patch_size 14, got (256, 256)"),
        ("name", "", "name must be a non-empty str, got ''"),
        ("backbone", 3, "backbone must be a non-empty str, got 3"),
        ("heads", 0, "heads must be an integer of at least 1, got 0"),
        ("heads", 8.0, "heads must be an integer of at least 1, got 8.0"),
        ("layout_depth", 0, "layout_depth must be an integer of at least 1, got 0"),
        ("superres_depth", True, "superres_depth must be an integer of at least 1, got True"),
        ("superres_window", -1, "superres_window must be an integer of at least 1, got -1"),
        ("representation", "both", "representation must be one of joint, isolated, bidirectional, got 'both'"),
        ("region_bias", "no", "region_bias must be True or False, got 'no'"),
        ("cross_scale", 1, "cross_scale must be True or False, got 1"),
        ("fine_features", None, "fine_features must be True or False, got None"),
        ("rptc_top_k", -1, "rptc_top_k must be an integer of at least 0, got -1"),
        ("rptc_ratio", 1.5, "rptc_ratio must be a finite number from 0 to 1, got 1.5"),
        ("dropout", -0.1, "dropout must be a finite number from 0 to 1, got -0.1"),
        ("dropout", math.nan, "dropout must be a finite number from 0 to 1, got nan"),
        ("refine_dropout", True, "refine_dropout must be a finite number from 0 to 1, got True"),
        ("mlp_ratio", 0, "mlp_ratio must be a finite number above 0, got 0"),
        ("mlp_ratio", math.inf, "mlp_ratio must be a finite number above 0, got inf"),
        ("temperature", "0.02", "temperature must be a finite number above 0, got '0.02'"),
        ("rptc_temperature", 0.0, "rptc_temperature must be a finite number above 0, got 0.0"),
        ("rptc_weight", -1, "rptc_weight must be a finite number of at least 0, got -1"),
        ("windows", (), f"{WINDOWS} ()"),
        ("windows", 8, f"{WINDOWS} 8"),
        ("windows", (8, 0), f"{WINDOWS} (8, 0)"),
        ("windows", (True,), f"{WINDOWS} (True,)"),
        ("refine_heads", 5, "refine_width must be a multiple of refine_heads (5) and more than the 8 flow channels, "),
        ("refine_width", 8, "refine_width must be a multiple of refine_heads (8) and more than the 8 flow channels, "),
    ],
)
def test_a_field_that_makes_no_sense_is_named(field, value, wanted):
    with pytest.raises(ValueError) as caught:
        lpmflow_base().replace(**{field: value})
    assert str(caught.value).startswith(wanted)
