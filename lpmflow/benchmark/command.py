"""What `lpmflow evaluate` does once its arguments are parsed."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from lpmflow.benchmark.dense import DENSE, evaluate_dense
from lpmflow.benchmark.evaluate import evaluate
from lpmflow.benchmark.predict import PairMatcher
from lpmflow.benchmark.report import Report, check_folder, check_writable, write
from lpmflow.benchmark.settings import options_of
from lpmflow.benchmark.world import World, local_device, world
from lpmflow.data.files import read_json
from lpmflow.flowfile import is_stream

_ONLY_PAIRS = ("split", "protocol", "alpha", "predictions", "groups", "worst", "workers", "pairs_csv")
_WRITTEN = ("json", "csv", "markdown", "pairs_csv")


def run(args: argparse.Namespace, options: dict[str, Any]) -> int:
    """Evaluate as `args` say, with a Matcher of `options`, print the report, and return the exit code.

    130 when the run was interrupted and 143 when it was terminated, with a line that says where the predictions are.
    Raises what `lpmflow.benchmark.evaluate` raises.
    """
    if args.batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {args.batch_size}")
    check_writable({_option(name): getattr(args, name) for name in ("predictions", *_WRITTEN)})
    if args.predictions is not None and is_stream(args.predictions):
        raise ValueError(f"--predictions must name a file that can be read again, got {args.predictions!r}")
    if args.benchmark in DENSE:
        for name in _ONLY_PAIRS:
            if getattr(args, name):
                raise ValueError(
                    f"{_option(name)} must not be given for {args.benchmark}, which has dense truth and no keypoints"
                )
        with world() as here:
            matcher = make_matcher(options)
            report = evaluate_dense(
                args.benchmark, args.root, matcher, batch_size=args.batch_size, limit=args.limit, world=here
            )
            _finish(report, args, here)
        return 0
    count, folder = (_count(args.worst[0]), args.worst[1]) if args.worst else (0, None)
    if folder is not None:
        check_folder("--worst", folder)
    groups = _groups(args.groups) if args.groups else None
    with world() as here:
        try:
            with _terminable():
                evaluate(
                    args.benchmark,
                    args.root,
                    make_matcher(options),
                    split=args.split,
                    protocols=args.protocol,
                    alphas=args.alpha,
                    batch_size=args.batch_size,
                    workers=args.workers,
                    predictions=args.predictions,
                    limit=args.limit,
                    groups=groups,
                    worst=count,
                    worst_folder=folder,
                    world=here,
                    ready=lambda report: _finish(report, args, here),
                )
        except KeyboardInterrupt as stop:
            return _stopped(stop, args.predictions, here)
    return 0


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _finish(report: Report, args: argparse.Namespace, here: World) -> None:
    if not here.first:
        return
    groups = {"groups": Path(args.groups).name} if args.groups else {}
    report = dataclasses.replace(report, settings={**report.settings, **groups, "options": options_of(args)})
    try:  # the tables first, flushed, since a file may be the same terminal or pipe; neither loses the other
        print("\n".join(report.lines()), flush=True)
    finally:
        write(report, **{name: getattr(args, name) for name in _WRITTEN})


def make_matcher(options: dict[str, Any]) -> PairMatcher:
    """The matcher of the given arguments of `lpmflow.Matcher`; "identity" is a model here, which takes no others."""
    if options.get("model") == "identity":
        for name in options:
            if name != "model":
                raise ValueError(f"{_option(name)} must not be given for --model identity, which has no network")
        from lpmflow.identity import IdentityMatcher

        return IdentityMatcher()
    from lpmflow.matcher import Matcher

    return Matcher(**{"device": local_device(), **options})


class _Terminated(KeyboardInterrupt):
    """SIGTERM, what schedulers and `kill` send: it unwinds as Ctrl-C does, so that predictions are kept."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM inside raises `_Terminated`, once: what is done about it is not to be terminated in turn."""

    def raise_it(number: int, frame: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():  # others cannot set handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, raise_it)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stopped(stop: KeyboardInterrupt, predictions: str | None, here: World) -> int:
    """One line, and the exit code."""
    terminated = isinstance(stop, _Terminated)
    if here.first:
        kept = "predictions so far are in {}" if predictions and Path(predictions).is_file() else "nothing was kept"
        advice = "the same command goes on" if predictions else "--predictions FILE keeps them"
        said = f"{'terminated' if terminated else 'interrupted'}; {kept.format(predictions)}, {advice}"
        print(f"lpmflow evaluate: {said}", file=sys.stderr)
    return 143 if terminated else 130


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
