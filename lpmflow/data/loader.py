"""Pairs with their photographs, decoded, for a `torch.utils.data.DataLoader`.

    pairs = PairDataset(load_pairs("spair", root, "trn"), size=(256, 256))
    batches = DataLoader(pairs, 8, shuffle=True, num_workers=2, persistent_workers=True, collate_fn=collate)
    for batch in batches:
        network(normalize(batch.source / 255), normalize(batch.target / 255))

Data sets show a photograph in many pairs (SPair-71k has 1,800 in 70,958), so decoded photographs are kept, as uint8 and
at the size asked for, while memory allows. Each worker process keeps its own, hence `persistent_workers`: without it
they are gone after every epoch.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from lpmflow.data.pairs import KeypointPair, require_inside
from lpmflow.geometry import Size, pixels_to_cells
from lpmflow.images import image_size, load_pixels
from lpmflow.memory import free_memory


class PairSample(NamedTuple):
    """A pair as tensors."""

    number: int
    """Where the pair is in the data set: `dataset.pairs[number]`."""
    source: Tensor
    """(3, H, W) uint8."""
    target: Tensor
    source_points: Tensor
    """(N, 2) float32, (x, y) in pixels of `source`."""
    target_points: Tensor


class PairBatch(NamedTuple):
    """Samples of one size together."""

    number: Tensor
    """(B,) int64."""
    source: Tensor
    """(B, 3, H, W) uint8: a quarter of what float32 would take on its way from a worker, or to a GPU."""
    target: Tensor
    source_points: list[Tensor]
    """B tensors (N, 2), N that of the pair."""
    target_points: list[Tensor]


class PairDataset(Dataset[PairSample]):
    """The photographs and points of `pairs`, as stored or squashed to `size`, mirrored where `KeypointPair.flip`.

    Photographs are squashed as `lpmflow.images.preprocess` does it, and rounded to 8 bits; points follow. Decoded
    photographs are kept up to `cache_bytes` in each process (0 keeps none), but at most a quarter of the memory that is
    free when the first is read, shared among the workers and the processes that `torchrun` started on this machine; the
    ones not used for longest go first.
    """

    def __init__(
        self, pairs: Sequence[KeypointPair], size: Size | int | None = None, *, cache_bytes: int = 1 << 30
    ) -> None:
        """`size` is (height, width), one number for a square, or None. Raises ValueError when it is none of these or a
        side is below 1, or when `cache_bytes` is below 0."""
        if cache_bytes < 0:
            raise ValueError(f"cache_bytes must be at least 0, got {cache_bytes}")
        self.pairs = list(pairs)
        self.size = None if size is None else _sides(size)
        self.cache_bytes = cache_bytes
        self._cache: _Cache | None = None

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> PairSample:
        """Raises OSError naming the pair for a photograph that is missing or cannot be decoded; ValueError for one that
        is not of the size the pair says, and for points too far outside it (`require_inside`)."""
        pair = self.pairs[index]
        source, source_points = self._side(pair, "source")
        target, target_points = self._side(pair, "target")
        return PairSample(range(len(self))[index], source, target, source_points, target_points)

    def _side(self, pair: KeypointPair, side: str) -> tuple[Tensor, Tensor]:
        path: Path = getattr(pair, side)
        image, original = self._photograph(path, f"{pair.name}: {side}")
        _require_fitting(pair, side, original)
        points = torch.from_numpy(getattr(pair, f"{side}_points"))
        if pair.flip:
            image = image.flip(2)
            points = points * points.new_tensor([-1, 1]) + points.new_tensor([original[1] - 1, 0])
        else:
            image = image.clone()  # what is kept must not change with what is given away
        shown = (image.shape[1], image.shape[2])
        return image, pixels_to_cells(points, original, shown).float()

    def _photograph(self, path: Path, name: str) -> tuple[Tensor, Size]:
        """(3, H, W) uint8 at the size asked for, and the size of the file's; `name` is the photograph's, for errors."""
        if self._cache is None:
            self._cache = _Cache(min(self.cache_bytes, _share_of_free_memory()))
        found = self._cache.get(path)
        if found is None:
            image = load_pixels(path, name)
            original = (image.shape[1], image.shape[2])
            if self.size is not None and self.size != original:
                levels = image.to(torch.float32) * (1 if image.dtype == torch.uint8 else 255)
                image = F.interpolate(levels[None], self.size, mode="bilinear", align_corners=False, antialias=True)[0]
                image = image.round_().to(torch.uint8)
            elif image.dtype != torch.uint8:
                image = (image * 255).round_().to(torch.uint8)
            found = (image.contiguous(), original)
            self._cache.put(path, found)
        return found

    def __getstate__(self) -> dict[str, object]:
        """Without the photographs: a worker that is spawned reads its own."""
        return {**self.__dict__, "_cache": None}


def require_photographs(pairs: Sequence[KeypointPair]) -> None:
    """Refuse what `PairDataset` would, so far as headers of photographs tell; a PNG is decoded for its orientation.

    Raises OSError for a file that is missing or no image, ValueError for one of another size than the pair says, and
    for points too far outside it; both name the photograph and the pair.
    """
    sizes: dict[Path, Size] = {}
    for pair in pairs:
        for side in ("source", "target"):
            path: Path = getattr(pair, side)
            if path not in sizes:
                sizes[path] = image_size(path, f"{pair.name}: {side}")
            _require_fitting(pair, side, sizes[path])


def _require_fitting(pair: KeypointPair, side: str, size: Size) -> None:
    said: Size | None = getattr(pair, f"{side}_size")
    where = f"{getattr(pair, side)}, {pair.name}"
    if said is None:
        require_inside(f"{where}: {side}_points", getattr(pair, f"{side}_points"), size)
    elif said != size:
        raise ValueError(
            f"{where}: must be {said[1]} x {said[0]}, the size it was marked at, got {size[1]} x {size[0]}"
        )


def collate(samples: Sequence[PairSample]) -> PairBatch:
    """Samples of one size as a batch; ValueError when their sizes differ, or there is none."""
    if not samples:
        raise ValueError("samples must be at least one")
    for name in ("source", "target"):
        sizes = {tuple(getattr(sample, name).shape[1:]) for sample in samples}
        if len(sizes) > 1:
            raise ValueError(
                f"samples must have one size to be a batch, got {name} images of {', '.join(map(str, sorted(sizes)))}: "
                f"give PairDataset a size, or take one pair at a time"
            )
    return PairBatch(
        torch.tensor([sample.number for sample in samples]),
        torch.stack([sample.source for sample in samples]),
        torch.stack([sample.target for sample in samples]),
        [sample.source_points for sample in samples],
        [sample.target_points for sample in samples],
    )


def _sides(size: Any) -> Size:
    sides = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(sides) != 2 or not all(isinstance(side, int) and side >= 1 for side in sides):
        raise ValueError(f"size must be (height, width) or one number, whole ones of at least 1, got {size!r}")
    return sides


class _Cache:
    """Photographs by path, up to a number of bytes; the ones not used for longest go first."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self._kept: OrderedDict[Path, tuple[Tensor, Size]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, path: Path) -> tuple[Tensor, Size] | None:
        if path not in self._kept:
            return None
        self._kept.move_to_end(path)
        return self._kept[path]

    def put(self, path: Path, photograph: tuple[Tensor, Size]) -> None:
        new = photograph[0].nbytes
        if new > self.limit:
            return
        while self.bytes + new > self.limit:
            _, (oldest, _) = self._kept.popitem(last=False)
            self.bytes -= oldest.nbytes
        self._kept[path] = photograph
        self.bytes += new


def _share_of_free_memory() -> int:
    """A quarter of the memory that is free, divided by the number of workers and of `torchrun`'s processes here."""
    worker = get_worker_info()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return free_memory() // 4 // processes // (worker.num_workers if worker is not None else 1)
