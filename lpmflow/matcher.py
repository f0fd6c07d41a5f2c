"""The user's door: images in, `Match` out.

`Matcher` loads a model once and is then called; `match` is the one-line form, which keeps the last few models loaded.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import threading
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lpmflow.images import ImageLike, load_pixels, preprocess, to_uint8
from lpmflow.memory import explained, require_room
from lpmflow.result import Match

if TYPE_CHECKING:
    from lpmflow.model import LPMFlow

DEFAULT_MODEL = "lpmflow-tiny"
ZERO_SHOT = "zero-shot"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

ModelLike = Union[str, "os.PathLike[str]", "LPMFlow", None]
DeviceLike = str | torch.device | None
DTypeLike = str | torch.dtype | None
_Read = tuple[Tensor, NDArray[np.uint8]]


class Matcher:
    """A loaded model that matches pairs of images.

    Args:
        model: a preset's name with weights in the package (None: "lpmflow-tiny"); the path of a checkpoint
            (.safetensors, or a released .pth); or an `LPMFlow` with trained weights, which is used as it is: moved to
            the device and set to evaluation mode, both for good.
        device: "cpu", "cuda", "cuda:1", "mps" or a torch.device. None: the GPU when CUDA has one, else the CPU.
        dtype: "float32" (None), "bfloat16" or "float16", or the torch dtype: what the network computes in, by
            autocast. Results stay float32. A network loaded here also holds the weights of its layers in it; one that
            is passed keeps its own, which are cast at every call.
        backbone, backbone_weights, readout: for model="zero-shot" only, which matches the features of a timm backbone
            with no training of its own: a timm name such as "vit_base_patch14_reg4_dinov2.lvd142m", a file of its
            parameters (None: timm downloads them), "window" (None) or "nearest"; see `lpmflow.model.zero_shot`.
        image_size: what the network sees of a photograph, one number or (height, width), a multiple of its patch size
            (16): 512, 768, 1024. Tables of positions are resized to it, so it works best near the size the weights
            were trained at (None). A finer flow for more time and memory; the memory grows with the number of pixels.
        compile: True has `torch.compile` build the network into one program for each batch size it meets, at the first
            call with it (about a minute on a CPU, which needs a C++ compiler); on a GPU as CUDA graphs, and then from
            one thread only. `batch` fills a short batch up instead of having another program made; PyTorch makes
            eight in a process unless `torch._dynamo.config.recompile_limit` says more, and raises at the ninth.

    Images are read and resized on the CPU. A Matcher changes nothing when it is called, so threads may share one.
    Raises ValueError for an unknown model, device or dtype, and for a model without trained weights, which would
    answer nonsense; OSError for a checkpoint that cannot be read; TypeError for an argument of another type.
    """

    def __init__(
        self,
        model: ModelLike = None,
        device: DeviceLike = None,
        dtype: DTypeLike = None,
        *,
        image_size: int | tuple[int, int] | None = None,
        compile: bool = False,
        backbone: str | None = None,
        backbone_weights: str | os.PathLike[str] | None = None,
        readout: str | None = None,
    ) -> None:
        self.device = as_device(device)
        self.dtype = as_dtype(dtype)
        if not isinstance(compile, bool):
            raise TypeError(f"compile must be True or False, got {_kind(compile)}")
        options: dict[str, Any] = {"backbone": backbone, "backbone_weights": backbone_weights, "readout": readout}
        given = {name: value for name, value in options.items() if value is not None}
        found = _zero_shot(image_size, **given) if model == ZERO_SHOT else _model(model, image_size, given)
        if image_size is not None and model != ZERO_SHOT:
            require_room(found.config, self.device)
        if found is not model and self.dtype != torch.float32:
            from lpmflow.model.inference import keep_weights_in

            keep_weights_in(found, self.dtype)
        self.model: LPMFlow = found.to(self.device).eval()
        self._run: Any = self.model
        self._turn: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if compile:
            mode = "reduce-overhead" if self.device.type == "cuda" else None
            self._run = torch.compile(self.model, fullgraph=True, dynamic=False, mode=mode)
            self._turn = threading.Lock()  # the compiler and its CUDA graphs are not for several threads at once
        self.compile = compile

    def __call__(self, src: ImageLike, tgt: ImageLike) -> Match:
        """Where each pixel of `src` lies in `tgt`.

        Images are anything `lpmflow.images.load_image` reads: a path, a PIL image, a numpy array (H, W, 3), a torch
        tensor (3, H, W); any size. Raises ValueError, TypeError or OSError naming `src` or `tgt` when one cannot be
        used, RuntimeError when the network's answer is not finite or someone put it back into training mode.
        """
        return self._match([(self._read(src, "src"), self._read(tgt, "tgt"))], ["src and tgt"])[0]

    def batch(self, pairs: Iterable[tuple[ImageLike, ImageLike]], batch_size: int = 8) -> list[Match]:
        """One `Match` for each (source, target) in `pairs`, in order; the network gets `batch_size` pairs at once.

        Each is what calling the matcher on that pair gives, up to rounding; images may have different sizes. `pairs`
        may be a generator and is read as needed. Raises what calling raises, naming the image, such as "pairs[3][1]";
        ValueError or TypeError for a `batch_size` or a pair that is none.
        """
        if not isinstance(batch_size, int) or isinstance(batch_size, bool):
            raise TypeError(f"batch_size must be an integer, got {type(batch_size).__name__}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if isinstance(pairs, (str, bytes)) or not isinstance(pairs, Iterable):
            raise TypeError(f"pairs must be an iterable of (source, target), got {type(pairs).__name__}")
        numbered = enumerate(pairs)
        matches: list[Match] = []
        while chunk := list(islice(numbered, batch_size)):
            names = [f"pairs[{index}]" for index, _ in chunk]
            read = []
            for name, (_, pair) in zip(names, chunk, strict=True):
                source, target = _pair(pair, name)
                read.append((self._read(source, f"{name}[0]"), self._read(target, f"{name}[1]")))
            matches += self._match(read, names, batch_size)
        return matches

    @property
    def name(self) -> str:
        """What the model is called in its configuration."""
        return self.model.config.name

    def settings(self) -> dict[str, Any]:
        """How it computes, as plain values for a report.

        "weights" (a file's name without its folder, or what `LPMFlow.weights` says), "image_size" (height, width) of
        what the network sees, "dtype", "device" by its type; "backbone" and "readout" of a zero-shot model.
        """
        config, weights = self.model.config, str(self.model.weights)
        zero_shot = {name: getattr(config, name) for name in ("backbone", "readout") if hasattr(config, "readout")}
        return {
            "weights": weights if weights.startswith("timm's ") else Path(weights).name,
            **zero_shot,
            "image_size": list(getattr(config, "image_size", config.input_size)),
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
        }

    def fingerprint(self) -> str:
        """16 hexadecimal digits of the weights, the configuration and the precision: two matchers that share them
        answer alike, up to rounding that differs from machine to machine."""
        digest = hashlib.sha256(json.dumps([self.model.config.to_dict(), str(self.dtype)], sort_keys=True).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"Matcher(model={self.model.config.name!r}, device={str(self.device)!r}, dtype={dtype!r})"

    def _read(self, image: ImageLike, name: str) -> _Read:
        """What the network sees of an image, and the image itself."""
        pixels = load_pixels(image, name)
        return preprocess(pixels, self.model.config.input_size), to_uint8(pixels)

    def _match(self, pairs: list[tuple[_Read, _Read]], names: list[str], batch_size: int = 1) -> list[Match]:
        if self.model.training:
            raise RuntimeError("the matcher's model was put back into training mode; call its eval() before matching")
        spare = [pairs[-1]] * (batch_size - len(pairs)) if self.compile else []
        sources, targets = (torch.stack([pair[side][0] for pair in pairs + spare]).to(self.device) for side in (0, 1))
        half = self.dtype != torch.float32
        mixed = torch.autocast(self.device.type, self.dtype) if half else contextlib.nullcontext()
        config = self.model.config
        seen = getattr(config, "image_size", config.input_size)  # a zero-shot model sees all that it is given
        room = explained(len(pairs + spare), seen, self.device)
        with self._turn, room, torch.inference_mode(), mixed:
            output = self._run(sources, targets)
            grids = [grid.float().cpu().numpy() for grid in (output.flow, output.confidence, output.foreground)]
        matches = []
        for index, ((_, source), (_, target)) in enumerate(pairs):
            flow, confidence, foreground = (grid[index].copy() for grid in grids)
            if not all(np.isfinite(grid).all() for grid in (flow, confidence, foreground)):
                raise RuntimeError(
                    f"the network's answer for {names[index]} is not finite; its weights are broken, or {self.dtype} "
                    f"has too small a range for them"
                )
            matches.append(Match(source, target, flow, confidence, foreground))
        return matches


def match(
    src: ImageLike,
    tgt: ImageLike,
    *,
    model: ModelLike = None,
    device: DeviceLike = None,
    dtype: DTypeLike = None,
    image_size: int | tuple[int, int] | None = None,
) -> Match:
    """Where each pixel of the image `src` lies in the image `tgt`, as a `Match`.

    The arguments are those of `Matcher` and of calling it, and so are the errors. A preset's weights are loaded at the
    first call and kept for the next (the last four combinations of preset, device, dtype and size; safe to call from
    several threads); a checkpoint's path is read at every call, so keep a `Matcher` for that.
    """
    if model is None or (isinstance(model, str) and model in _presets()):
        size = tuple(image_size) if isinstance(image_size, list) else image_size
        matcher = _kept(model or DEFAULT_MODEL, as_device(device), as_dtype(dtype), size)
    else:
        matcher = Matcher(model, device, dtype, image_size=image_size)
    return matcher(src, tgt)


_LOADING = threading.Lock()


def _kept(name: str, device: torch.device, dtype: torch.dtype, size: Any) -> Matcher:
    with _LOADING:
        return _cached(name, device, dtype, size)


@functools.lru_cache(maxsize=4)
def _cached(name: str, device: torch.device, dtype: torch.dtype, size: Any) -> Matcher:
    return Matcher(name, device, dtype, image_size=size)


def _pair(pair: Any, name: str) -> tuple[ImageLike, ImageLike]:
    if not isinstance(pair, (tuple, list)):
        raise TypeError(f"{name} must be a pair (source, target), got {type(pair).__name__}")
    if len(pair) != 2:
        raise ValueError(f"{name} must be a pair (source, target), got {len(pair)} elements")
    return pair[0], pair[1]


def _presets() -> list[str]:
    from lpmflow.model import list_models

    return list_models()


def _zero_shot(
    image_size: Any,
    backbone: str | None = None,
    backbone_weights: str | os.PathLike[str] | None = None,
    readout: str = "window",
) -> Any:
    """The network of `model="zero-shot"`."""
    if backbone is None:
        raise ValueError(f"backbone must be the name of a timm model for model={ZERO_SHOT!r}, got None")
    from lpmflow.model.zero_shot import ZeroShot

    return ZeroShot(backbone, weights=backbone_weights, image_size=image_size, readout=readout)


def _model(model: ModelLike, image_size: Any, zero_shot: dict[str, Any]) -> LPMFlow:
    """The trained network `model` stands for, at another size where one is given."""
    if zero_shot:
        name, value = next(iter(zero_shot.items()))
        raise ValueError(f"{name} is for model={ZERO_SHOT!r} only, got {value!r}")
    if isinstance(model, nn.Module):
        if image_size is not None:
            raise ValueError(
                "image_size must be None for a model that is loaded already; load_checkpoint and create_model take one"
            )
        return _checked(model)
    size = {} if image_size is None else {"image_size": image_size}
    if model is None:
        model = DEFAULT_MODEL
    if not isinstance(model, (str, os.PathLike)):
        raise TypeError(f"model must be a preset's name, the path of a checkpoint, or an LPMFlow, got {_kind(model)}")
    from lpmflow.model import embedded_weights, load_checkpoint

    presets = _presets()
    if model in presets:
        path = embedded_weights(str(model))
        if path is None:
            shipped = [name for name in presets if embedded_weights(name)]
            raise ValueError(
                f"model {model!r} has no trained weights in this package (those that have: "
                f"{', '.join(shipped) or 'none'}); pass the path of a checkpoint instead, model='weights.safetensors' "
                f"or a released 'weights.pth'"
            )
        return _checked(load_checkpoint(path, **size))
    path = Path(model)
    if path.is_dir():
        raise IsADirectoryError(f"model must be the path of a checkpoint file, but {str(model)!r} is a folder")
    if path.exists():
        return _checked(load_checkpoint(path, **size))
    wanted = f"model must be one of {', '.join(presets)}, the path of a checkpoint, {ZERO_SHOT}, or an LPMFlow"
    if path.suffix or path.name != str(model):
        raise FileNotFoundError(f"{wanted}; there is no file {str(model)!r}")
    raise ValueError(f"{wanted}, got {model!r}")


def _checked(model: Any) -> LPMFlow:
    """A module that can be used: an LPMFlow (or one that has its interface) with trained float32 parameters."""
    if not hasattr(model, "weights") or not hasattr(model, "config"):
        raise TypeError(f"model must be an LPMFlow when it is a module, got {_kind(model)}")
    if model.weights is None:
        raise ValueError(
            "model must have trained weights, but those of this one are random and would answer nonsense: load a "
            "checkpoint with lpmflow.load_checkpoint, or, once you have trained it, say so in its attribute `weights`"
        )
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise ValueError(
                f"model must have float32 parameters, but {name} is {parameter.dtype}; the argument dtype chooses what "
                f"it computes in"
            )
    return model


def as_device(device: DeviceLike) -> torch.device:
    """The device meant, None the best one here; TypeError or ValueError where there is no such."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"device must be a str or a torch.device, got {_kind(device)}")
    known = _devices()
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is not None and found.type == "cuda" and found.index is None and "cuda" in known:
        # which one "cuda" is differs from thread to thread, so it is settled here
        return torch.device("cuda", torch.cuda.current_device())
    if found is not None and found.type in ("cpu", "mps") and found.index == 0:
        found = torch.device(found.type)  # there is one of these
    if found is None or str(found) not in known:
        if len(known) == 1:
            raise ValueError(f"device must be {known[0]}, the only one PyTorch finds here, got {str(device)!r}")
        raise ValueError(f"device must be one that PyTorch finds here, {', '.join(known)}, got {str(device)!r}")
    return found


def _devices() -> list[str]:
    """Names of the devices a model can be put on."""
    cuda = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return ["cpu", *(["cuda"] if cuda else []), *cuda, *(["mps"] if torch.backends.mps.is_available() else [])]


def as_dtype(dtype: DTypeLike) -> torch.dtype:
    """The type meant, None float32; TypeError or ValueError where it is none a network computes in."""
    if dtype is None:
        return torch.float32
    if not isinstance(dtype, (str, torch.dtype)):
        raise TypeError(f"dtype must be a str or a torch.dtype, got {_kind(dtype)}")
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {str(dtype).removeprefix('torch.')!r}")
    return found


def _kind(value: object) -> str:
    return type(value).__name__
