"""What `lpmflow evaluate` does once its arguments are parsed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lpmflow.benchmark.evaluate import evaluate
from lpmflow.benchmark.homographies import report_homographies
from lpmflow.benchmark.predict import PairMatcher
from lpmflow.benchmark.report import check_writable, write
from lpmflow.benchmark.world import local_device, world
from lpmflow.data.files import read_json
from lpmflow.data.homographies import load_homographies

_ONLY_PAIRS = ("split", "protocol", "alpha", "predictions", "json", "csv", "markdown", "groups", "worst")


def run(args: argparse.Namespace, options: dict[str, Any]) -> None:
    """Evaluate as `args` say, with a Matcher of `options`, and print the report.

    Raises what `lpmflow.benchmark.evaluate` raises.
    """
    if args.batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {args.batch_size}")
    check_writable(args.json, args.csv, args.markdown, args.predictions)
    if args.benchmark == "hpatches":
        for name in _ONLY_PAIRS:
            if getattr(args, name):
                raise ValueError(f"--{name} must not be given for hpatches, which has dense truth and no keypoints")
        pairs = load_homographies(Path(args.root))
        report_homographies(pairs, make_matcher(options), batch_size=args.batch_size, say=print)
        return
    count, folder = (_count(args.worst[0]), args.worst[1]) if args.worst else (0, None)
    groups = _groups(args.groups) if args.groups else None
    with world() as here:
        report = evaluate(
            args.benchmark,
            args.root,
            make_matcher(options),
            split=args.split,
            protocols=args.protocol,
            alphas=args.alpha,
            batch_size=args.batch_size,
            workers=args.workers,
            predictions=args.predictions,
            groups=groups,
            worst=count,
            worst_folder=folder,
            world=here,
        )
        if here.first:
            write(report, args.json, args.csv, args.markdown)
            print("\n".join(report.lines()))


def make_matcher(options: dict[str, Any]) -> PairMatcher:
    """The matcher of the given arguments of `lpmflow.Matcher`; "identity" is a model here."""
    if options.get("model") == "identity":
        from lpmflow.identity import IdentityMatcher

        return IdentityMatcher()
    from lpmflow.matcher import Matcher

    return Matcher(**{"device": local_device(), **options})


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--worst must begin with a number of pairs from 1, got {text!r}")
    return int(text)


def _groups(file: str) -> dict[str, list[list[Any]]]:
    """Category -> symmetric groups of points, from a JSON file."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"--groups must be a JSON file, but there is no file {file!r}")
    found = read_json(Path(file))
    if not isinstance(found, dict) or not all(
        isinstance(groups, list) and all(isinstance(group, list) for group in groups) for groups in found.values()
    ):
        raise ValueError(f'{file} must hold lists of groups by category, such as {{"cat": [[2, 3], [9, 10, 11, 12]]}}')
    return found
