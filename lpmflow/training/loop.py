"""The training loop for warp pairs: a fixed time, checkpoints that a stopped run goes on from, averaged weights."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lpmflow.config import LPMFlowConfig
from lpmflow.data.warps import HARD, MILD, WarpBatch, WarpPairs
from lpmflow.flowfile import replacing
from lpmflow.images import normalize
from lpmflow.model.checkpoint import read_torch_file, save_checkpoint
from lpmflow.model.lpmflow import FlowOutput, LPMFlow
from lpmflow.training.losses import cell_places, correlation_nll, end_point_error, rptc_weight

_EPOCHS = 10  # of the paper's training; a run's time stands for them in the decline of the RPTC loss


@dataclass(frozen=True)
class TrainOptions:
    """How to train. A run is as long as `minutes` says, whatever the machine: the schedules follow the time used."""

    minutes: float = 60.0
    batch_size: int = 8
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    warmup_steps: int = 100
    constant_share: float = 0.5
    """Share of the time before the learning rate falls, by a cosine, to a fiftieth."""
    clip_norm: float = 1.0
    average: float = 0.998
    """Decay of the averaged weights, which are what is saved."""
    flow_weight: float = 0.5
    refine_after: float = 0.6
    """Share of the time after which the refinement is trained too: before, it would only slow the features down."""
    hard_after: float = 0.67
    """Share of the time over which the warps grow from `MILD` to `HARD`."""
    save_every: float = 180.0
    """Seconds between checkpoints."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("minutes", "learning_rate", "clip_norm", "save_every", "hard_after"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)!r}")
        for name in ("constant_share", "refine_after", "average"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)!r}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size!r}")


def train(
    config: LPMFlowConfig,
    photos: Tensor,
    out: str | os.PathLike[str],
    options: TrainOptions | None = None,
    *,
    say: Callable[[str], object] = print,
) -> LPMFlow:
    """Train a new network on warp pairs of `photos` (N, 3, S, S) uint8, on their device; the averaged network.

    The folder `out` gets `model.safetensors`, for `lpmflow.Matcher`, and `state.pth`, from which a call with the same
    folder, configuration and options goes on as if it had not stopped. Raises ValueError when what is there was made
    with others, FloatingPointError when the loss is no number any more.
    """
    run = Training(config, photos, out, options or TrainOptions(), say)
    if run.progress >= 1:
        run.say(f"the run in {run.out} is finished; choose another folder for a new one")
    while run.progress < 1:
        run.step()
    run.save()
    pairs = run.steps * run.options.batch_size
    run.say(f"wrote {run.out / 'model.safetensors'} after {run.steps} steps, {pairs} pairs")
    return run.average.eval()


class Training:
    """One run: the network, its average, the optimiser and the clock."""

    def __init__(
        self,
        config: LPMFlowConfig,
        photos: Tensor,
        out: str | os.PathLike[str],
        options: TrainOptions,
        say: Callable[[str], object] = print,
    ) -> None:
        self.config, self.options, self.say = config, options, say
        for side, cells in zip(config.image_size, config.flow_grid, strict=True):
            if side % cells:
                raise ValueError(
                    f"image_size must be a multiple of the flow grid {config.flow_grid} (8 cells a patch) for training "
                    f"on warp pairs, got {config.image_size}"
                )
        self.out = Path(out)
        self.out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(options.seed)
        self.pairs = WarpPairs(photos, config.image_size, options.seed)
        self.device = photos.device
        self.model = LPMFlow(config).to(self.device).train()
        self.average = LPMFlow(config).to(self.device)
        self.average.load_state_dict(self.model.state_dict())
        self.optimizer = torch.optim.AdamW(_groups(self.model, options.weight_decay), betas=(0.9, 0.98))
        self.steps, self.elapsed = 0, 0.0
        self._losses: dict[str, float] = {}
        if (self.out / "state.pth").exists():
            self._resume()
        self.average.weights = "training"
        self._last_step = time.monotonic()
        self._last_save = self.elapsed

    @property
    def progress(self) -> float:
        """Share of the time that is used, from 0."""
        return self.elapsed / (60 * self.options.minutes)

    def step(self) -> dict[str, float]:
        """One batch; the losses by name."""
        options, progress = self.options, self.progress
        for group in self.optimizer.param_groups:
            group["lr"] = options.learning_rate * _rate(progress, self.steps, options)
        batch = self.pairs.sample(options.batch_size, MILD.towards(HARD, progress / options.hard_after))
        self.model.skip_refinement = progress < options.refine_after
        with torch.autocast(self.device.type, torch.bfloat16):
            output = self.model(normalize(batch.source), normalize(batch.target), return_correlations=True)
        losses = warp_losses(output, batch, self.config)
        total = losses["corr_coarse"] + losses["corr_fine"] + options.flow_weight * losses["mapping"]
        if not self.model.skip_refinement:
            total = total + options.flow_weight * losses["flow"]
        if output.rptc_loss is not None:
            epoch = _EPOCHS * min(progress, 1.0)
            weight = rptc_weight(epoch, self.config.rptc_weight, self.config.rptc_decline)
            total = total + weight * output.rptc_loss
        if not torch.isfinite(total):
            raise FloatingPointError(f"the loss is {total.item()} at step {self.steps}; lower the learning_rate")
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), options.clip_norm)
        self.optimizer.step()
        self.steps += 1
        _average(self.average, self.model, min(options.average, self.steps / (10 + self.steps)))
        self._tick({name: loss.item() for name, loss in losses.items()})
        return self._losses

    def save(self) -> None:
        """Write the averaged network and the state of the run, each whole or not at all."""
        trained = {"steps": self.steps, "pairs": self.steps * self.options.batch_size, "minutes": self.elapsed / 60}
        note = json.dumps({**dataclasses.asdict(self.options), **trained})
        save_checkpoint(self.average, self.out / "model.safetensors", extra={"training": note})
        state = {
            "config": self.config.to_dict(),
            "options": dataclasses.asdict(self.options),
            "photos": _fingerprint(self.pairs.photos),
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "pairs": self.pairs.state(),
            "random": _random_state(self.device),
            "steps": self.steps,
            "elapsed": self.elapsed,
        }
        with replacing(self.out / "state.pth") as temporary:
            torch.save(state, temporary)

    def _tick(self, losses: dict[str, float]) -> None:
        now = time.monotonic()
        self.elapsed += now - self._last_step
        self._last_step = now
        for name, loss in losses.items():
            self._losses[name] = loss if self.steps == 1 else 0.98 * self._losses.get(name, loss) + 0.02 * loss
        if self.steps % 50 == 0:
            parts = ", ".join(f"{name} {loss:.3f}" for name, loss in self._losses.items())
            pairs = self.steps * self.options.batch_size
            self.say(f"{self.elapsed / 60:.1f} min, {pairs} pairs, {pairs / self.elapsed:.1f} a second: {parts}")
        if self.elapsed - self._last_save > self.options.save_every:
            self._last_save = self.elapsed
            self.save()

    def _resume(self) -> None:
        path = self.out / "state.pth"
        state: dict[str, Any] = read_torch_file(path)
        wanted = {"config", "options", "photos", "model", "average", "optimizer", "pairs", "random", "steps", "elapsed"}
        if not wanted <= state.keys():
            raise ValueError(f"{path} is no state of a training run; choose another folder than {self.out}")
        if state["photos"] != _fingerprint(self.pairs.photos):
            raise ValueError(f"out holds a run on other photographs; choose another folder than {self.out}")
        for name, ours in (("config", self.config.to_dict()), ("options", dataclasses.asdict(self.options))):
            changed = [key for key, value in ours.items() if state[name].get(key, None) != value]
            if changed:
                raise ValueError(
                    f"out holds a run with other {', '.join(changed)}; choose another folder than {self.out}"
                )
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.pairs.set_state(state["pairs"])
        _set_random_state(self.device, state["random"])
        self.steps, self.elapsed = state["steps"], state["elapsed"]
        self.say(f"goes on from {path} after {self.elapsed / 60:.1f} minutes")


def warp_losses(output: FlowOutput, batch: WarpBatch, config: LPMFlowConfig) -> dict[str, Tensor]:
    """The parts of the loss: correlation at both scales, the finest mapping in fine cells, the flow in fine cells."""
    assert output.correlations is not None
    losses = {}
    coarse = [config.scales.index(scale) for scale in ("11", "22")]
    for name, index, grid in zip(
        ("corr_coarse", "corr_fine"), coarse, (config.coarse_grid, config.fine_grid), strict=True
    ):
        places, valid = cell_places(batch.mapping, batch.valid, grid)
        corr = output.correlations[index].float()
        losses[name] = correlation_nll(corr, places.flatten(1, 2), valid.flatten(1), grid, config.heads)
    height, width = config.fine_grid
    half = places.new_tensor([(width - 1) / 2, (height - 1) / 2])[:, None, None]
    mapped = (output.mappings[:, -1].float() + 1) * half
    losses["mapping"] = end_point_error(mapped, places.permute(0, 3, 1, 2), valid, power=0.5)
    label, labelled = flow_label(batch, config)
    losses["flow"] = end_point_error(output.flow.float() / 4, label / 4, labelled, power=0.5)
    return losses


def flow_label(batch: WarpBatch, config: LPMFlowConfig) -> tuple[Tensor, Tensor]:
    """The true flow (B, 2, 4h, 4w) in cells of the flow grid, and where it is known (B, 4h, 4w)."""
    places, valid = cell_places(batch.mapping, batch.valid, config.flow_grid)
    height, width = config.flow_grid
    y, x = torch.meshgrid(
        torch.arange(height, device=places.device), torch.arange(width, device=places.device), indexing="ij"
    )
    return (places - torch.stack((x, y), dim=-1)).permute(0, 3, 1, 2), valid


def _fingerprint(photos: Tensor) -> list[int]:
    """How many photographs, and a checksum of every 61st pixel of theirs."""
    return [len(photos), zlib.crc32(photos.flatten()[::61].cpu().numpy().tobytes())]


def _random_state(device: torch.device) -> Tensor:
    """The state of the random numbers that dropout and RPTC draw from."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay for matrices and kernels; none for norms, biases and tables."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        matrix = name.endswith("weight") and parameter.ndim >= 2
        (decayed if matrix else plain).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def _rate(progress: float, steps: int, options: TrainOptions) -> float:
    warmup = min((steps + 1) / max(options.warmup_steps, 1), 1.0)
    falling = (progress - options.constant_share) / max(1 - options.constant_share, 1e-6)
    cosine = (1 + math.cos(math.pi * min(max(falling, 0.0), 1.0))) / 2
    return warmup * (0.02 + 0.98 * cosine)


@torch.no_grad()
def _average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average <- decay x average + (1 - decay) x model; counts and the like are copied."""
    for mean, value in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if mean.is_floating_point():
            mean.lerp_(value, 1 - decay)
        else:
            mean.copy_(value)
