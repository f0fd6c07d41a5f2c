"""Weight files: our own safetensors with the configuration inside, released `.pth` files, backbone checkpoints.

Nothing here unpickles code: `.pth` files are read with `weights_only=True`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import secrets
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lpmflow.config import LPMFlowConfig
from lpmflow.memory import require_room
from lpmflow.model.backbone import ResizedPositions, ViTBackbone
from lpmflow.model.lpmflow import LPMFlow
from lpmflow.model.released import check_names, is_released
from lpmflow.model.resize import resize_tables

FORMAT = "lpmflow-1"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WRAPPERS = ("teacher", "state_dict", "model")
_PREFIX = re.compile(r"^(module\.|backbone\.)+")
# Options that may differ from those the weights were trained with: the others change what the weights mean.
_FREE = {"image_size", "input_size", "dropout", "refine_dropout", "windows", "temperature"}
_FREE |= {"rptc_top_k", "rptc_ratio", "rptc_temperature", "rptc_weight", "rptc_decline"}
_READING = threading.Lock()
_HEADS = re.compile(r"(head|head_dist|fc|projector|predictor|last_layer)\.|decoder_|mask_token|masked_embed")


def save_checkpoint(
    model: LPMFlow,
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    extra: dict[str, str] | None = None,
) -> None:
    """Write `model` to a .safetensors file with its configuration in the metadata, whole or not at all.

    A model whose `weights` is None is marked as random in the file, and so it is again when loaded. `dtype` (such as
    torch.float16) converts the floating tensors; `extra` adds metadata, e.g. how it was trained.
    Raises ValueError for another suffix or when a value does not fit the dtype, OSError when it cannot be written,
    ValueError or TypeError for another argument that makes no sense.
    """
    from safetensors.torch import save

    path = Path(path)
    if not isinstance(model, LPMFlow):
        raise TypeError(f"model must be an LPMFlow, got {type(model).__name__}")
    if path.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {str(path)!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path must name a file in an existing folder, got {str(path)!r}")
    if dtype is not None and dtype not in _DTYPES:
        raise TypeError(f"dtype must be {', '.join(map(str, _DTYPES))} or None, got {dtype!r}")
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
    metadata["weights"] = "random" if model.weights is None else "trained"
    temporary = path.parent / f".lpmflow-{secrets.token_hex(8)}.tmp"
    try:
        temporary.write_bytes(save(tensors, metadata))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: str | os.PathLike[str], **overrides: Any) -> LPMFlow:
    """The network stored at `path`, in evaluation mode: our .safetensors, or a released LPMFlow .pth.

    `overrides` change fields of the configuration: for our files `image_size` (tables are resized to the new grid),
    `input_size`, `windows`, `temperature`, the dropouts and RPTC's, which the weights do not depend on; for a
    released file, which stores no configuration, any field. Raises OSError when the file is missing or corrupt,
    ValueError when it holds something else, when another field is overridden, or when a pair of that `image_size` takes
    more memory than there is.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        stored, tensors, trained = _read_safetensors(path)
        config = stored.replace(**overrides)
        if config.image_size != stored.image_size:
            require_room(config)
        changed = [name for name, value in stored.to_dict().items() if config.to_dict()[name] != value]
        if fixed := [name for name in changed if name not in _FREE]:
            raise ValueError(
                f"{fixed[0]} must be {getattr(stored, fixed[0])!r}, with which {path} was trained; what may change is "
                f"{', '.join(sorted(_FREE))}"
            )
        model = LPMFlow(config)
        relative = [name for name in tensors if name.startswith("backbone.") and "relative_position" in name]
        if relative and config.coarse_grid != stored.coarse_grid:
            raise ValueError(
                f"image_size must be {stored.image_size} for {path}: tables of relative positions in its backbone "
                f"({relative[0]}) cannot be resized"
            )
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
        trained = True
    model.weights = str(path) if trained else None
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
    given = {name: tensor for name, tensor in read_backbone(path).items() if not _HEADS.match(name)}
    names = {name: re.sub(r"^parametrizations\.(\w+)\.original$", r"\1", name) for name in backbone.net.state_dict()}
    check_names(
        f"backbone checkpoint {path}",
        missing=[name for name in names.values() if name not in given],
        unexpected=[name for name in given if name not in set(names.values())],
    )
    ours = {name: given[theirs] for name, theirs in names.items()}
    for name, value in ours.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{path} must hold tensors, but {names[name]} is {type(value).__name__}")
    for name, tensor in backbone.net.state_dict().items():
        if name.startswith("parametrizations.pos_embed") and ours[name].shape != tensor.shape:
            _adopt_positions(backbone, ours[name], path)
        elif ours[name].shape != tensor.shape:
            raise ValueError(
                f"the backbone checkpoint {path} does not fit the model: {names[name]} must have shape "
                f"{tuple(tensor.shape)}, got {tuple(ours[name].shape)}"
            )
    backbone.net.load_state_dict(ours)


def read_backbone(path: Path) -> dict[str, Any]:
    """The parameters in a file of a backbone (.pth or .safetensors), out of what wraps them; OSError or ValueError."""
    state_dict: dict[str, Any] = _load_safetensors(path)[1] if path.suffix == ".safetensors" else read_torch_file(path)
    for wrapper in _WRAPPERS:
        if isinstance(state_dict.get(wrapper), dict):
            state_dict = state_dict[wrapper]
    return {_PREFIX.sub("", str(name)): tensor for name, tensor in state_dict.items()}


def read_torch_file(path: Path) -> dict[str, Any]:
    """The dict in a .pth file, read without unpickling code; OSError or ValueError in one sentence otherwise."""
    _require_file(path)
    # A Namespace is plain data: DINO and iBOT keep their options in one. What is safe is said to the whole process,
    # hence the lock.
    allowing = getattr(torch.serialization, "safe_globals", None)
    with _READING, allowing([argparse.Namespace]) if allowing else contextlib.nullcontext():
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises a dozen types for a file that is not one of its own
            if isinstance(error, OSError) and error.filename is not None:
                raise
            foreign = re.search(r"GLOBAL (\S+)", str(error))
            reason = f"it holds {foreign[1]}" if foreign else f"{type(error).__name__} {error}".strip().split(". ")[0]
            if not is_torch_file(path):
                reason = "it is no file that torch.save writes"
            raise OSError(f"{path} cannot be read as a PyTorch checkpoint of plain tensors: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a dict of tensors, got {type(content).__name__}")
    return content


def _require_file(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"{path} must be a checkpoint file, and is a folder")
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")


def is_torch_file(path: Path) -> bool:
    """Whether a file begins as a zip archive or a pickle does, which `torch.save` writes."""
    with path.open("rb") as file:
        return file.read(4).startswith((b"PK\x03\x04", b"\x80"))


def _load_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    _require_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {}), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise OSError(f"{path} cannot be read as a safetensors file: {error}") from error


def _read_safetensors(path: Path) -> tuple[LPMFlowConfig, dict[str, Tensor], bool]:
    """Configuration, tensors, and whether the weights are trained ones."""
    metadata, tensors = _load_safetensors(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is no LPMFlow checkpoint: its metadata must say format {FORMAT}")
    try:
        config = LPMFlowConfig.from_dict(json.loads(metadata.get("config", "")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} holds a configuration this version cannot read: {error}") from error
    return config, tensors, metadata.get("weights") == "trained"


def _check_extra(extra: dict[str, str] | None) -> None:
    for key, value in (extra or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"extra must map str to str, got {key!r}: {type(value).__name__}")
        if key in ("format", "config", "weights"):
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
    parametrization.original = torch.nn.Parameter(table.to(parametrization.original, copy=True))
