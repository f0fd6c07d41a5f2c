"""`python -m lpmflow.training --photos FOLDER --out FOLDER`: train a network on warp pairs of photographs."""

from __future__ import annotations

import argparse
import os
import sys

# glibc gives large buffers back to the system at every step and asks for them again; keeping them made a step on the
# CPU a quarter faster. It reads these when a process starts, hence the restart.
_KEEP_BUFFERS = {
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "268435456",
}


def main() -> int:
    """Parse the arguments, read the photographs, train."""
    parser = argparse.ArgumentParser(
        prog="python -m lpmflow.training", description="Train a network from scratch on warp pairs of photographs."
    )
    parser.add_argument("--photos", required=True, metavar="FOLDER", help="photographs, in any folders below this one")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where to write; a run there is gone on with")
    parser.add_argument("--model", default="lpmflow-tiny", help="preset to train (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=60.0, help="length of the run (default: %(default)g)")
    parser.add_argument("--batch-size", type=int, default=8, help="pairs a step (default: %(default)d)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="where to train (default: %(default)s)")
    arguments = parser.parse_args()
    glibc = sys.platform == "linux"
    if glibc and arguments.device == "cpu" and not any(name in os.environ for name in _KEEP_BUFFERS):
        environment = {**os.environ, **_KEEP_BUFFERS}
        os.execve(sys.executable, [sys.executable, "-m", "lpmflow.training", *sys.argv[1:]], environment)

    import torch
    from tqdm import tqdm

    from lpmflow.config import preset
    from lpmflow.data.photos import load_photos
    from lpmflow.training.loop import TrainOptions, train

    try:
        options = TrainOptions(minutes=arguments.minutes, batch_size=arguments.batch_size, seed=arguments.seed)
        config = preset(arguments.model)
        try:
            torch.empty(0, device=arguments.device)
        except (RuntimeError, AssertionError) as error:  # AssertionError: a PyTorch without CUDA
            raise ValueError(f"device must be one that can be used here, got {arguments.device!r}: {error}") from error
        photos = load_photos(
            arguments.photos,
            # disable=None: no bar in a log
            progress=lambda files: tqdm(files, "reading photographs", leave=False, disable=None),
        )
        train(config, photos.to(arguments.device), arguments.out, options, say=lambda line: print(line, flush=True))
    except (OSError, ValueError, TypeError, FloatingPointError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
