"""What a precision or the compiler changes about the answers, on real pairs with marked points.

    python benchmarks/accuracy.py --root PF-WILLOW --benchmark pf-willow --pairs 100

One line a mode: how far its flow is from that of float32, in pixels of the source squashed to the size the network
sees, and the PCK of both at 0.1 of the target box's longer side, or, where pairs have no box, of the marked points',
in pixels of the photographs.
"""

from __future__ import annotations

import argparse

import numpy as np

import lpmflow
from lpmflow.data import KeypointPair, load_pairs
from lpmflow.evaluation.pck import pck, relative_errors

MODES = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "float32, compiled": {"compile": True},
}


def extent(pair: KeypointPair) -> float:
    """The longer side of the target's box, or of the box around its points."""
    if pair.target_box is not None:
        x1, y1, x2, y2 = pair.target_box
        return float(max(x2 - x1, y2 - y1))
    return float(np.ptp(pair.target_points, axis=0).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True)
    parser.add_argument("--benchmark", default="pf-willow")
    parser.add_argument("--split", default="test")
    parser.add_argument("--pairs", type=int, default=100, help="so many of them, always the same draw")
    parser.add_argument("--model", help="name or weight file (default: the embedded weights)")
    parser.add_argument("--device")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    args = parser.parse_args()
    pairs = load_pairs(args.benchmark, args.root, args.split)
    chosen = np.random.default_rng(0).permutation(len(pairs))[: args.pairs]
    pairs = [pairs[index] for index in chosen]
    plain: list[np.ndarray] = []
    print(f"{len(pairs)} pairs; flow against float32 in pixels: mean, 99th percentile, largest; PCK@0.1 per image")
    for mode in ("float32", *(mode for mode in args.modes if mode != "float32")):
        matcher = lpmflow.Matcher(args.model, args.device, **MODES[mode])
        height, width = matcher.model.config.image_size
        flows, errors = [], []
        for pair in pairs:
            match = matcher(pair.source, pair.target)
            errors.append(relative_errors(match.transfer(pair.source_points), pair.target_points, extent(pair)))
            rows, columns = match.grid_flow.shape[-2:]
            flows.append(match.grid_flow * np.array([width / columns, height / rows])[:, None, None])
        plain = plain or flows
        distance = np.concatenate(
            [np.linalg.norm(ours - theirs, axis=0).ravel() for ours, theirs in zip(flows, plain, strict=True)]
        )
        spread = f"{distance.mean():8.4f} {np.percentile(distance, 99):8.4f} {distance.max():8.3f}"
        print(f"{mode:20} {spread}   {pck(errors, 0.1).per_image:6.2f}")


if __name__ == "__main__":
    main()
