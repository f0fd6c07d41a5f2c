"""The training loop on a very small network and a made-up clock: its steps, what it writes, how it goes on."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

import lpmflow
from lpmflow.config import lpmflow_tiny
from lpmflow.data import WarpBatch, WarpPairs, WarpRange
from lpmflow.data.warps import HARD, MILD
from lpmflow.images import normalize
from lpmflow.model import FlowOutput, load_checkpoint
from lpmflow.training import TrainOptions, loop, train
from lpmflow.training.loop import Training

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = lpmflow_tiny().replace(
    name="small", image_size=64, input_size=64, layout_depth=1, windows=(8, 4), rptc_top_k=8, superres_window=2
)


def options(steps: float, **changed: Any) -> TrainOptions:
    """With a clock that goes on by a second a step, a run of so many steps."""
    return TrainOptions(**{"minutes": steps / 60, "batch_size": 2, "warmup_steps": 2, "refine_after": 0.0, **changed})


@pytest.fixture(scope="module")
def photos() -> Tensor:
    noise = torch.rand(5, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return (255 * F.interpolate(noise, (64, 64), mode="bicubic").clamp(0, 1)).to(torch.uint8)


@pytest.fixture(scope="module", autouse=True)
def clock() -> Iterator[None]:
    """A clock that goes on by a second whenever it is read, which the loop does once at the start and once a step."""
    ticks = iter(range(10**6))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
        yield


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """A folder that does not outlive the test: a state takes 60 MB."""
    yield tmp_path / "run"
    shutil.rmtree(tmp_path / "run", ignore_errors=True)


@dataclass
class Finished:
    """A run of four steps, and what it said and computed on the way."""

    out: Path
    network: lpmflow.LPMFlow | None = None
    said: list[str] = field(default_factory=list)
    states: list[dict[str, Tensor]] = field(default_factory=list)
    """The network's own parameters, at the start and after each step."""


@pytest.fixture(scope="module")
def finished(one_thread: None, photos: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    run = Finished(tmp_path_factory.mktemp("finished") / "new" / "folder")
    step = Training.step

    def record(training: Training) -> dict[str, float]:
        if not run.states:
            run.states.append({name: value.clone() for name, value in training.model.state_dict().items()})
        losses = step(training)
        run.states.append({name: value.clone() for name, value in training.model.state_dict().items()})
        return losses

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "step", record)
        run.network = train(SMALL, photos, run.out, options(4), say=run.said.append)
    yield run
    shutil.rmtree(run.out)


# What a step does


def test_the_loss_falls_on_pairs_seen_again_and_again(photos: Tensor, out: Path) -> None:
    run = Training(SMALL, photos, out, options(1000, batch_size=3, warmup_steps=5))
    batch = WarpPairs(photos, (64, 64), seed=9).sample(3, MILD)
    run.pairs.sample = lambda count, limits: batch  # type: ignore[method-assign]

    def losses() -> dict[str, float]:
        network = run.model.eval()
        with torch.no_grad():
            found = network(normalize(batch.source), normalize(batch.target), return_correlations=True)
        network.train()
        return {name: loss.item() for name, loss in loop.warp_losses(found, batch, SMALL).items()}

    before = losses()
    for _ in range(12):
        run.step()
    after = losses()
    assert {name: after[name] / before[name] < 0.9 for name in before} == dict.fromkeys(before, True)
    assert after["corr_fine"] < 0.7 * before["corr_fine"]


@pytest.mark.parametrize(
    ("progress", "steps", "share"),
    [
        (0, 0, 0.01),
        (0, 49, 0.5),
        (0.1, 99, 1),
        (0.5, 5000, 1),
        (0.625, 5000, 0.02 + 0.98 * (1 + math.sqrt(0.5)) / 2),
        (0.75, 5000, 0.51),
        (1, 9000, 0.02),
        (1.3, 9000, 0.02),
        (0.75, 9, 0.051),
    ],
)
def test_the_learning_rate_rises_stays_and_falls(progress: float, steps: int, share: float) -> None:
    assert loop._rate(progress, steps, TrainOptions()) == pytest.approx(share)


def test_a_step_follows_the_schedules(photos: Tensor, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Training(SMALL, photos, out, options(100, refine_after=0.6, learning_rate=1e-3, hard_after=0.5))
    limits: list[WarpRange] = []
    sample = run.pairs.sample
    monkeypatch.setattr(run.pairs, "sample", lambda count, limit: limits.append(limit) or sample(count, limit))
    head = run.model.integration.head_out

    def rates() -> list[float]:
        return [group["lr"] for group in run.optimizer.param_groups]

    run.step()
    assert rates() == pytest.approx([0.5e-3, 0.5e-3]) and limits[-1] == MILD
    run.elapsed = 25.0
    run.step()
    assert rates() == pytest.approx([1e-3, 1e-3]) and limits[-1] == MILD.towards(HARD, 0.5)
    assert limits[-1].rotation == 20
    run.elapsed = 58.5
    run.step()
    assert all(parameter.grad is None for parameter in head.parameters())  # the refinement is left out
    run.elapsed = 75.0
    run.step()
    assert rates() == pytest.approx([0.51e-3, 0.51e-3]) and limits[-1].rotation == 25
    assert all(parameter.grad is not None for parameter in head.parameters())


def test_only_matrices_and_kernels_decay(photos: Tensor, out: Path) -> None:
    run = Training(SMALL, photos, out, options(1, weight_decay=0.07))
    decayed, plain = run.optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.07, 0)
    layers = [module for module in run.model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    assert {id(layer.weight) for layer in layers} == {id(parameter) for parameter in decayed["params"]}
    assert len(decayed["params"]) + len(plain["params"]) == len(list(run.model.parameters()))


def test_a_loss_that_is_no_number_stops_the_run(photos: Tensor, out: Path) -> None:
    run = Training(SMALL, photos, out, options(5))
    with torch.no_grad():
        run.model.layout.get_parameter(next(iter(dict(run.model.layout.named_parameters())))).fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 0; lower the learning_rate"):
        run.step()
    assert run.steps == 0 and list(out.iterdir()) == []


def still(dx: float = 0.0, dy: float = 0.0) -> WarpBatch:
    """A pair of which every pixel lies (dx, dy) further in the target."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    image = torch.zeros(1, 3, 64, 64)
    return WarpBatch(image, image, torch.stack((x + dx, y + dy), dim=-1)[None], torch.ones(1, 64, 64, dtype=torch.bool))


def test_the_label_is_in_cells_of_the_flow_grid() -> None:
    label, known = loop.flow_label(still(8, -3), SMALL)  # 32 cells of 2 pixels
    assert label.shape == (1, 2, 32, 32) and known.all()
    torch.testing.assert_close(label, torch.tensor([4.0, -1.5])[None, :, None, None].expand(1, 2, 32, 32))


def test_the_losses_of_a_perfect_answer_and_of_one_that_is_off() -> None:
    coarse, fine = (SMALL.heads * torch.eye(cells)[None] for cells in (16, 64))
    line = torch.linspace(-1, 1, 8)
    own = torch.stack((line.expand(8, 8), line[:, None].expand(8, 8)))
    unused = torch.zeros(1, 8, 8)

    def losses(flow: float, mapping: float) -> dict[str, float]:
        moved = torch.tensor([flow, 0.0])[None, :, None, None].expand(1, 2, 32, 32)
        mappings = torch.stack((torch.full_like(own, 7.0), own + torch.tensor([0.0, mapping])[:, None, None]))[None]
        found = FlowOutput(moved, mappings, unused, unused, (coarse, fine), None)
        return {name: loss.item() for name, loss in loop.warp_losses(found, still(), SMALL).items()}

    none = math.sqrt(0.101)
    wanted = {"corr_coarse": 0, "corr_fine": 0, "mapping": none, "flow": none}
    assert losses(0, 0) == pytest.approx(wanted, abs=1e-4)
    # 8 flow cells are 2 fine cells; 2 / 7 of the range [-1, 1] are one fine cell
    assert losses(8, 2 / 7) == pytest.approx(wanted | {"mapping": math.sqrt(1.1), "flow": math.sqrt(2.1)}, abs=1e-4)


# What a run writes


def test_a_run_ends_with_its_time(finished: Finished) -> None:
    state = torch.load(finished.out / "state.pth", weights_only=True)
    assert (state["steps"], state["elapsed"]) == (4, 4)
    assert len(finished.states) == 5


def test_it_says_where_the_weights_are(finished: Finished) -> None:
    assert finished.said == [f"wrote {finished.out / 'model.safetensors'} after 4 steps, 8 pairs"]


def test_nothing_else_is_left_in_the_folder(finished: Finished) -> None:
    assert sorted(file.name for file in finished.out.iterdir()) == ["model.safetensors", "state.pth"]


def test_the_averaged_weights_are_saved(finished: Finished) -> None:
    """average <- d average + (1 - d) network, d = n / (10 + n) in step n; counts are the network's."""
    loaded = load_checkpoint(finished.out / "model.safetensors")
    assert loaded.config == SMALL
    assert finished.network is not None and not finished.network.training
    for name, value in loaded.state_dict().items():
        mean = finished.states[0][name].double()
        for n, state in enumerate(finished.states[1:], start=1):
            decay = n / (10 + n)
            mean = decay * mean + (1 - decay) * state[name].double()
        if not value.is_floating_point():
            mean = finished.states[-1][name]
        torch.testing.assert_close(value.double(), mean.double(), rtol=1e-5, atol=1e-6)
        assert torch.equal(value, finished.network.state_dict()[name])
    moved = [name for name, value in finished.states[-1].items() if not torch.equal(value, finished.states[0][name])]
    assert len(moved) > 0.9 * len(finished.states[0])


def test_a_matcher_reads_the_weights(finished: Finished, photo: np.ndarray, other_photo: np.ndarray) -> None:
    match = lpmflow.Matcher(finished.out / "model.safetensors", "cpu")(photo, other_photo)
    assert match.flow.shape == (40, 60, 2) and np.isfinite(match.flow).all()
    trained = lpmflow.Matcher(finished.network, "cpu")(photo, other_photo)
    np.testing.assert_array_equal(match.flow, trained.flow)


def test_the_file_says_how_it_was_trained(finished: Finished) -> None:
    with safe_open(finished.out / "model.safetensors", framework="pt") as file:
        note = json.loads(file.metadata()["training"])
    assert (note["steps"], note["pairs"], note["minutes"]) == (4, 8, pytest.approx(4 / 60))
    assert (note["batch_size"], note["seed"], note["learning_rate"]) == (2, 0, 1.5e-3)


def test_it_saves_every_so_often(photos: Tensor, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    monkeypatch.setattr(Training, "save", lambda run: saved.append(run.steps))
    monkeypatch.setattr(loop, "warp_losses", lambda *_: dict.fromkeys(("corr_coarse", "corr_fine", "mapping"), ZERO))
    train(SMALL, photos, out, options(9, save_every=2.5, refine_after=1.0), say=str)
    assert saved == [3, 6, 9, 9]


ZERO = torch.zeros((), requires_grad=True)


def test_a_save_that_fails_leaves_the_old_state(photos: Tensor, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Training(SMALL, photos, out, options(5))
    run.save()
    before = (out / "state.pth").read_bytes()

    def full(state: Any, file: Path) -> None:
        file.write_bytes(b"half of it")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space left"):
        run.save()
    assert (out / "state.pth").read_bytes() == before
    assert sorted(file.name for file in out.iterdir()) == ["model.safetensors", "state.pth"]


# Going on


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(photos: Tensor, finished: Finished, out: Path) -> None:
    run = Training(SMALL, photos, out, options(4))
    run.step()
    run.step()
    run.save()
    torch.rand(7)  # another process has other random numbers
    said: list[str] = []
    network = train(SMALL, photos, out, options(4), say=said.append)
    assert said[0] == f"goes on from {out / 'state.pth'} after 0.0 minutes"
    one, other = (torch.load(folder / "state.pth", weights_only=True) for folder in (out, finished.out))
    assert one.keys() == other.keys()
    assert [name for name in one if not same(one[name], other[name])] == []
    assert finished.network is not None and network.weights == finished.network.weights == "training"
    assert same(load_checkpoint(out / "model.safetensors").state_dict(), finished.network.state_dict())


def test_a_finished_run_is_not_trained_further(photos: Tensor, finished: Finished) -> None:
    said: list[str] = []
    network = train(SMALL, photos, finished.out, options(4), say=said.append)
    assert said[1] == f"the run in {finished.out} is finished; choose another folder for a new one"
    assert said[2:] == finished.said
    assert finished.network is not None and same(network.state_dict(), finished.network.state_dict())


def test_a_run_on_other_photographs_is_refused(photos: Tensor, finished: Finished) -> None:
    for other in (photos[:4], photos.flip(0), photos.flip(3)):
        with pytest.raises(ValueError) as refused:
            train(SMALL, other, finished.out, options(4))
        assert str(refused.value) == f"out holds a run on other photographs; choose another folder than {finished.out}"


def test_pixels_must_divide_into_the_cells_of_the_flow(photos: Tensor, out: Path) -> None:
    with pytest.raises(ValueError, match=r"image_size must be a multiple of the flow grid \(128, 128\)"):
        train(SMALL.replace(patch_size=4), photos, out, options(4))
    assert not out.exists()


@pytest.mark.parametrize(
    ("config", "changed", "named"),
    [
        ({}, {"seed": 1}, "seed"),
        ({}, {"steps": 8, "clip_norm": 2}, "minutes, clip_norm"),
        ({"dropout": 0.5}, {}, "dropout"),
    ],
)
def test_a_run_with_other_options_is_refused(
    photos: Tensor, finished: Finished, config: dict[str, Any], changed: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError) as refused:
        train(SMALL.replace(**config), photos, finished.out, options(**{"steps": 4, **changed}))
    wanted = f"out holds a run with other {named}; choose another folder than {finished.out}"
    assert str(refused.value) == wanted


def test_a_state_of_another_kind_is_refused(photos: Tensor, out: Path) -> None:
    out.mkdir()
    torch.save({"weight": torch.zeros(1)}, out / "state.pth")
    with pytest.raises(ValueError, match=r"state\.pth is no state of a training run"):
        train(SMALL, photos, out, options(4))
    (out / "state.pth").write_bytes(b"junk")
    with pytest.raises(OSError, match=r"state\.pth cannot be read"):
        train(SMALL, photos, out, options(4))


@pytest.mark.parametrize(
    ("name", "value"),
    [("minutes", 0), ("minutes", math.nan), ("learning_rate", -1), ("save_every", 0), ("average", 1.1)]
    + [("constant_share", -0.1), ("refine_after", 2), ("batch_size", 0), ("hard_after", 0), ("clip_norm", 0)],
)
def test_options_that_make_no_sense(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be .*, got {value}$"):
        TrainOptions(**{name: value})  # type: ignore[arg-type]
