"""Weight files: our own safetensors with the configuration inside, released `.pth` files, backbone checkpoints.

Nothing here unpickles code: `.pth` files are read with `weights_only=True`.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lpmflow.config import LPMFlowConfig
from lpmflow.model.backbone import ResizedPositions, ViTBackbone
from lpmflow.model.lpmflow import LPMFlow
from lpmflow.model.released import check_names, is_released
from lpmflow.model.resize import resize_tables

FORMAT = "lpmflow-1"
_WRAPPERS = ("teacher", "state_dict", "model")
_PREFIX = re.compile(r"^(module\.|backbone\.)+")
_HEADS = re.compile(r"(head|fc|projector|predictor|last_layer)\.|decoder_|mask_token|masked_embed")


def save_checkpoint(
    model: LPMFlow,
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    extra: dict[str, str] | None = None,
) -> None:
    """Write `model` to a .safetensors file with its configuration in the metadata, whole or not at all.

    `dtype` (such as torch.float16) converts the floating tensors; `extra` adds metadata, e.g. how it was trained.
    Raises ValueError for another suffix or when a value does not fit the dtype, OSError when it cannot be written,
    ValueError or TypeError for another argument that makes no sense.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    if not isinstance(model, LPMFlow):
        raise TypeError(f"model must be an LPMFlow, got {type(model).__name__}")
    if path.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {str(path)!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path must name a file in an existing folder, got {str(path)!r}")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point torch.dtype or None, got {dtype!r}")
    _check_extra(extra)
    tensors = {}
    for name, tensor in model.state_dict().items():
        stored = tensor.detach().cpu()
        if dtype is not None and stored.is_floating_point():
            stored = stored.to(dtype)
        if stored.is_floating_point() and not torch.isfinite(stored).all():
            raise ValueError(f"parameter {name} is not finite as {stored.dtype}")
        tensors[name] = stored.contiguous().clone()
    metadata = {**(extra or {}), "format": FORMAT, "config": json.dumps(model.config.to_dict())}
    temporary = path.parent / f".lpmflow-{secrets.token_hex(8)}.tmp"
    try:
        save_file(tensors, temporary, metadata=metadata)
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: str | os.PathLike[str], **overrides: Any) -> LPMFlow:
    """The network stored at `path`, in evaluation mode: our .safetensors, or a released LPMFlow .pth.

    `overrides` change fields of the stored configuration, such as `image_size`; tables are resized to the new grid.
    Raises OSError when the file is missing or corrupt, ValueError when it holds something else.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        stored, tensors = _read_safetensors(path)
        model = LPMFlow(stored.replace(**overrides))
        wanted = model.state_dict()
        check_names(
            f"checkpoint {path}",
            missing=[name for name in wanted if name not in tensors],
            unexpected=[name for name in tensors if name not in wanted],
        )
        if isinstance(model.backbone, ViTBackbone):
            positions = tensors.get("backbone.net.parametrizations.pos_embed.original")
            if (
                positions is not None
                and positions.shape != model.backbone.net.parametrizations.pos_embed.original.shape
            ):
                _adopt_positions(model.backbone, positions, path)
        model.load_state_dict(resize_tables(tensors, model))
    else:
        from lpmflow.model.factory import create_model

        state_dict = read_torch_file(path)
        if not is_released(state_dict):
            raise ValueError(f"{path} is no LPMFlow checkpoint: it has no parameter encoder.norm.weight")
        model = create_model("lpmflow-base", **overrides)
        model.load_released_state_dict(state_dict)
    model.weights = str(path)
    return model.eval()


def load_backbone(model: LPMFlow, path: str | os.PathLike[str]) -> None:
    """Load a backbone checkpoint (timm, DINO, iBOT, MAE; .pth or .safetensors) into `model`'s vision transformer.

    The state is looked for under `teacher`, `state_dict` and `model`; `module.` and `backbone.` prefixes and the
    pretraining heads are dropped. A position table of another size replaces the model's. Raises ValueError that lists
    what is missing or unexpected, OSError when the file cannot be read.
    """
    backbone = model.backbone
    if not isinstance(backbone, ViTBackbone):
        raise ValueError(f"backbone_weights are for timm backbones, not for {model.config.backbone}")
    path = Path(path)
    state_dict = _load_safetensors(path)[1] if path.suffix == ".safetensors" else read_torch_file(path)
    for wrapper in _WRAPPERS:
        if isinstance(state_dict.get(wrapper), dict):
            state_dict = state_dict[wrapper]  # type: ignore[assignment]
    given = {_PREFIX.sub("", name): tensor for name, tensor in state_dict.items()}
    given = {name: tensor for name, tensor in given.items() if not _HEADS.match(name)}
    names = {name: re.sub(r"^parametrizations\.(\w+)\.original$", r"\1", name) for name in backbone.net.state_dict()}
    check_names(
        f"backbone checkpoint {path}",
        missing=[name for name in names.values() if name not in given],
        unexpected=[name for name in given if name not in set(names.values())],
    )
    ours = {name: given[theirs] for name, theirs in names.items()}
    for name, tensor in backbone.net.state_dict().items():
        if name.startswith("parametrizations.pos_embed") and ours[name].shape != tensor.shape:
            _adopt_positions(backbone, ours[name], path)
        elif ours[name].shape != tensor.shape:
            raise ValueError(
                f"the backbone checkpoint {path} does not fit the model: {names[name]} must have shape "
                f"{tuple(tensor.shape)}, got {tuple(ours[name].shape)}"
            )
    backbone.net.load_state_dict(ours)


def read_torch_file(path: Path) -> dict[str, Any]:
    """The dict in a .pth file, read without unpickling code; OSError or ValueError in one sentence otherwise."""
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises a dozen types for a file that is not one of its own
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OSError(f"{path} cannot be read as a PyTorch checkpoint of plain tensors: {first_line}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a dict of tensors, got {type(content).__name__}")
    return content


def _load_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {}), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise OSError(f"{path} cannot be read as a safetensors file: {error}") from error


def _read_safetensors(path: Path) -> tuple[LPMFlowConfig, dict[str, Tensor]]:
    metadata, tensors = _load_safetensors(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is no LPMFlow checkpoint: its metadata must say format {FORMAT}")
    try:
        config = LPMFlowConfig.from_dict(json.loads(metadata.get("config", "")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} holds a configuration this version cannot read: {error}") from error
    return config, tensors


def _check_extra(extra: dict[str, str] | None) -> None:
    for key, value in (extra or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"extra must map str to str, got {key!r}: {type(value).__name__}")
        if key in ("format", "config"):
            raise ValueError(f"extra must not hold the key {key!r}, which save_checkpoint writes itself")


def _adopt_positions(backbone: ViTBackbone, table: Tensor, path: Path) -> None:
    """Let the position table of a checkpoint trained at another size take the place of the model's."""
    parametrization = backbone.net.parametrizations["pos_embed"]
    resize = parametrization[0]
    assert isinstance(resize, ResizedPositions)
    cells = table.shape[1] - resize.prefix
    side = math.isqrt(max(cells, 0))
    if table.ndim != 3 or side * side != cells or table.shape[2] != parametrization.original.shape[2]:
        raise ValueError(f"the backbone checkpoint {path} does not fit the model: pos_embed is {tuple(table.shape)}")
    resize.trained = (side, side)
    parametrization.original = torch.nn.Parameter(table.clone())
