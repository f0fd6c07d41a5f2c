"""The parameter names of a released LPMFlow checkpoint, and the way there and back.

A table of rewrites turns one of our names into the released one; everything else (shapes, both directions) follows
from it. Released files also hold parameters that inference never reads; those are known by name and left out. Two of
them look used and are not: the released encoder adds `pos_embed_src` to the patches and `cls_pos_embed_trg` to the cls
tokens of both images (the parity figures show it), so `encoder.pos_embed_trg` and `encoder.cls_pos_embed_src` are idle.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from lpmflow.model.lpmflow import LPMFlow
from lpmflow.model.resize import resize_tables

_SWIN = "transformer.layers.0.blocks.0"
_SIDES = {"source": "src", "target": "trg"}
_DECODERS = {"coarse": "1", "cross": "2", "fine": "3"}
_STAGES = ("16", "8", "4")

_REWRITES: list[tuple[str, str]] = [
    (r"^backbone\.net\.parametrizations\.(\w+)\.original$", r"feature_extraction.backbone.\1"),
    (r"^backbone\.net\.", "feature_extraction.backbone."),
    (r"^integration\.(x_normal|y_normal)$", r"\1"),
    (r"^layout\.position$", "encoder.pos_embed_src"),
    (r"^layout\.cls_position$", "encoder.cls_pos_embed_trg"),
    (r"^layout\.segment_(src|trg)$", r"encoder.\1_segment_pos_embed"),
    (r"^layout\.", "encoder."),
    (r"^(decoder_s\d)\.position_(src|trg)$", r"\1.last_block.0.pos_embed_\2"),
    (r"^(decoder_s\d)\.position_(src|trg)_fine$", r"\1.last_block.0.pos_embed_\2_up"),
    (r"^(decoder_s\d)\.self_attn\.", r"\1.last_block.0.sattn."),
    (r"^(decoder_s\d)\.cross_attn\.", r"\1.last_block.0.cattn."),
    (r"^(decoder_s\d)\.(norm\d|mlp)\.", r"\1.last_block.0.\2."),
    (r"^(SR\w+\.\w+)\.stage\.norm_out\.", r"\1.0.transformer.norm."),
    (r"^(SR\w+\.\w+)\.stage\.bias_table$", rf"\1.0.{_SWIN}.attn.relative_position_bias_table"),
    (r"^(SR\w+\.\w+)\.stage\.", rf"\1.0.{_SWIN}."),
    (r"^(SR\w+\.\w+)\.gate\.fc1\.", r"\1.1.fc.0."),
    (r"^(SR\w+\.\w+)\.gate\.fc2\.", r"\1.1.fc.2."),
    (r"^integration\.head_hidden\.", "SRBranches.refine2.0."),
    (r"^integration\.head_out\.", "SRBranches.refine2.2."),
    (r"^integration\.context\.", "refine_proj_query_feat.0."),
    (r"(encoder\.blocks\.\d+\.attn)\.bias_table$", r"\1.relative_position_bias_table"),
]

_UNUSED = re.compile(
    r"masked_tokens|pos_embed_src|encoder\.(pos_embed_trg|cls_pos_embed_src|cls_token|pos_embed|patch_embed\..*)"
    r"|encoder\.blocks\.\d+\.spatial_attention\.weight"
    r"|decoder_s\d\..*norm[34]\.(weight|bias)|.*relative_position_index|feature_extraction\.backbone\.head\..*"
    r"|decoder_s1\.last_block\.0\.pos_embed_(src|trg)_up|decoder_s3\.last_block\.0\.pos_embed_(src|trg)"
)


def released_name(name: str) -> str:
    """The released name of our parameter `name`."""
    for side, short in _SIDES.items():
        name = re.sub(rf"(position|segment)_{side}", rf"\1_{short}", name)
    name = re.sub(r"^superres\.match_(\w+)\.", lambda m: f"decoder_s{_DECODERS[m[1]]}.", name)
    name = re.sub(
        r"^superres\.upsample\.(stage|gate)s\.(\d+)\.",
        lambda m: f"SRBranch_feat.refine_swin_decoder_1_{int(m[2]) + 1}.{m[1]}.",
        name,
    )
    name = re.sub(
        r"^integration\.(stage|gate)s\.(\d+)\.",
        lambda m: f"SRBranches.refine_swin_decoder_{_STAGES[int(m[2])]}.{m[1]}.",
        name,
    )
    for pattern, replacement in _REWRITES:
        name = re.sub(pattern, replacement, name)
    return name


def released_parameter_shapes() -> list[tuple[str, tuple[int, ...]]]:
    """(released name, shape) of every parameter of a released checkpoint that the network uses; `dict` takes it.

    The network is built without memory for its weights. Raises ImportError when timm cannot be imported.
    """
    from lpmflow.model.factory import create_model

    with torch.device("meta"):
        model = create_model("lpmflow-base")
    return [(name, tuple(tensor.shape)) for name, tensor in to_released(model).items()]


def to_released(model: LPMFlow) -> dict[str, Tensor]:
    """`model`'s parameters under their released names and shapes.

    Holds what inference uses, so the released code loads it with `strict=False`. Raises ValueError for a variant the
    release has no names for.
    """
    _check_released_variant(model)
    return {
        released_name(name): tensor[:, :, None, None] if _is_gate(name) else tensor
        for name, tensor in model.state_dict().items()
    }


def from_released(state_dict: dict[str, Any], model: LPMFlow) -> dict[str, Tensor]:
    """A released state dict under our names, for `model.load_state_dict`.

    Accepts the `module.` prefix and a dict that holds the state under `state_dict`. Raises ValueError that lists what
    is missing or unexpected, or names what has another shape. Tables of another grid are resized to the model's.
    """
    _check_released_variant(model)
    given = _parameters(state_dict)
    names = {name: released_name(name) for name in model.state_dict()}
    check_names(
        "released checkpoint",
        missing=[released for released in names.values() if released not in given],
        unexpected=[name for name in given if name not in set(names.values()) and not _UNUSED.fullmatch(name)],
    )
    ours = {name: given[released].flatten(1) if _is_gate(name) else given[released] for name, released in names.items()}
    return resize_tables(ours, model)


def is_released(state_dict: dict[str, Any]) -> bool:
    """Whether the names look like a released checkpoint's."""
    return "encoder.norm.weight" in _parameters(state_dict)


def check_names(what: str, missing: list[str], unexpected: list[str]) -> None:
    """ValueError that lists the parameters a file lacks and those nobody knows."""
    problems = []
    for label, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            problems.append(f"{len(names)} {label} ({shown})")
    if problems:
        raise ValueError(f"the {what} does not fit the model: {'; '.join(problems)}")


def _parameters(state_dict: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors by name, out of the wrapping and the prefixes a training script may have added."""
    inner = state_dict.get("state_dict")
    given = inner if isinstance(inner, dict) else state_dict
    return {str(name).removeprefix("module."): tensor for name, tensor in given.items()}


def _is_gate(name: str) -> bool:
    return ".gates." in name  # the release stores these matrices as 1x1 convolutions


def _check_released_variant(model: LPMFlow) -> None:
    config = model.config
    fits = config.representation == "joint" and config.region_bias and config.cross_scale and len(config.windows) == 3
    if not fits or config.fine_features or config.superres_depth != 2:
        raise ValueError(
            "released checkpoints describe the joint, region-biased, cross-scale network with three refinement stages; "
            f"{config.name} here is another variant"
        )
