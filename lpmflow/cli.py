"""The command line: parse, call, report. What it does is done by the modules it calls.

Exit codes: 0 done, 1 an error (one line on stderr), 2 wrong usage (one line too), 130 interrupted, 141 the reader of
our output left, 143 `evaluate` was terminated (it keeps its predictions first).
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import lpmflow

if TYPE_CHECKING:
    from lpmflow.result import Match

OUTPUTS = (".png", ".npz", ".flo")
BENCHMARKS = ("spair", "pf-pascal", "pf-willow", "caltech-101", "ap-10k", "hpatches", "dense")
PROTOCOLS = ("spair", "lpmflow", "cats", "cats-512", "dift", "geoaware", "pf-pascal", "pf-willow", "pf-willow-bbox")

EXAMPLES = {
    "main": """\
examples:
  lpmflow demo                                       match the bundled photographs
  lpmflow match cat.jpg dog.jpg -o match.png         match two of your own, draw the result
  lpmflow evaluate --benchmark spair --root DIR      score a model on pairs whose truth is known
  lpmflow data check DIR                             what a data set holds, and what is wrong with it
  lpmflow profile                                    where the time of a match goes
  lpmflow info                                       versions, devices, backends
""",
    "match": """\
examples:
  lpmflow match cat.jpg dog.jpg -o match.png
  lpmflow match cat.jpg dog.jpg --points 120,80 201.5,96 -o points.png
  lpmflow match cat.jpg dog.jpg -o match.npz --save-flow match.flo --device cuda --dtype bfloat16
  lpmflow match cat.jpg dog.jpg -o match.png --model trained.safetensors

Points are x,y in pixels of A, x to the right and y down, the centre of the top left pixel at 0,0. Each comes out on a
line of its own, as "x,y -> x,y", the second in pixels of B; a picture shows them by number. Write --points=-0.3,5 when
the first is negative.
""",
    "evaluate": """\
examples:
  lpmflow evaluate --benchmark spair --root SPair-71k --split val
  lpmflow evaluate --benchmark spair --root SPair-71k --split test --protocol spair lpmflow --predictions kept.file
  lpmflow evaluate --benchmark pf-willow --root PF-WILLOW --model trained.safetensors --json out.json --worst 9 worst
  lpmflow evaluate --benchmark pf-willow --root PF-WILLOW --model identity
  lpmflow evaluate --benchmark hpatches --root hpatches-sequences-release
  lpmflow evaluate --benchmark dense --root FOLDER   1.png, 2.png and flow.npz, .flo or .png, or folders of these

A figure means nothing without its protocol, which says what is measured against what; lpmflow/evaluation/README.md
describes each. --model identity matches nothing: what the data set gives away for nothing.
""",
    "check": """\
examples:
  lpmflow data check SPair-71k
  lpmflow data check PF-PASCAL --benchmark pf-pascal

Every list, annotation and photograph is read. The exit code is 1 when something is wrong.
""",
    "demo": """\
example:
  lpmflow demo -o /tmp/lpmflow-demo
""",
    "profile": """\
examples:
  lpmflow profile
  lpmflow profile --model lpmflow-base --dtype bfloat16 --batch-size 4 --json profile.json

The images are noise, and a preset that ships without weights gets random ones: neither changes how long it takes.
""",
    "info": """\
example:
  lpmflow info --json | python -m json.tool
""",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return its exit code; usage errors exit with 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(words)
    try:
        code: int = args.run(args) or 0
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes stdout once more at exit, and must find somewhere to write.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        print(f"lpmflow: error: {_told(args, words, error)}", file=sys.stderr)
        return 1
    return code


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and where the usage stands, instead of all of it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def _told(args: argparse.Namespace, words: Sequence[str], error: Exception) -> str:
    """An error as one line, in the words of the command line: `--image-size` and not `image_size`.

    A name that is a word, such as model, is one of an option at the beginning only, where that option was given. An
    error that begins with a file begins with the option that names the file.
    """
    said = re.sub(r"\bmodel='([^']*)'", r"--model \1", " ".join(str(error).split()))
    for name, value in vars(args).items():
        option = f"--{name.replace('_', '-')}"
        given = any(word == option or word.startswith(f"{option}=") for word in words)
        if "_" in name:
            said = re.sub(rf"(?<![\w/.'-]){name}(?![\w/.'-])", option, said)
        elif given and re.match(rf"{name} ('[^']*' )?(must|could|is|are|was|were|has|needs)\b", said):
            said = f"--{said}"
        if isinstance(value, (str, Path)) and str(value) and said.startswith((f"{value} ", f"{value}:")):
            return f"{option} {said}"
    return said


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = _Parser(
        prog="lpmflow",
        description="Dense semantic correspondence: where each pixel of one photograph lies in another.",
        epilog=EXAMPLES["main"],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"lpmflow {lpmflow.__version__}")
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    match = _command(commands, "match", "match two photographs", run_match)
    match.add_argument("source", metavar="A", help="photograph to match from")
    match.add_argument("target", metavar="B", help="photograph to match to")
    match.add_argument(
        "-o", "--output", metavar="FILE", type=_output(OUTPUTS), help=f"write the match, by extension: {_or(OUTPUTS)}"
    )
    points = "transfer these points, and draw these in a picture"
    match.add_argument("--points", metavar="X,Y", type=_point, nargs="+", default=[], help=points)
    match.add_argument("--save-flow", metavar="FILE.flo", type=_output((".flo",)), help="write the flow (.flo) as well")
    _matcher_options(match)
    match.set_defaults(command=match)

    _evaluate_options(_command(commands, "evaluate", "score a model on image pairs whose truth is known", run_evaluate))

    data = commands.add_parser("data", help="look at data sets", description="Look at data sets.")
    check = _command(
        data.add_subparsers(metavar="COMMAND", required=True),
        "check",
        "say what a folder of image pairs holds, and all that is wrong with it",
        run_data_check,
    )
    check.add_argument("root", metavar="ROOT", help="the folder")
    check.add_argument("--benchmark", metavar="NAME", help="the data set (default: recognised by what is there)")

    demo = _command(commands, "demo", "match the bundled photographs on the CPU and write pictures", run_demo)
    demo.add_argument("-o", "--output", metavar="DIR", default="lpmflow-demo", help="folder (default: ./%(default)s)")

    profile = _command(commands, "profile", "say where the time of a match goes, stage by stage", run_profile)
    profile.add_argument("--batch-size", metavar="N", type=int, default=1, help="pairs at once (default: 1)")
    profile.add_argument("--seconds", metavar="S", type=float, default=3.0, help="measure for so long (default: 3)")
    profile.add_argument("--json", metavar="FILE", help="write every figure as JSON")
    profile.add_argument("--model", metavar="NAME|FILE", help="preset or weight file (default: lpmflow-tiny)")
    _precision_options(profile)

    info = _command(commands, "info", "print versions, devices and which backends can run", run_info)
    info.add_argument("--json", action="store_true", help="print JSON")
    return top


def run_match(args: argparse.Namespace) -> None:
    """`lpmflow match`: everything that can be refused is refused before a model is loaded."""
    if not (args.output or args.save_flow or args.points):
        args.command.error("nothing to do: give -o FILE, --save-flow FILE.flo or --points X,Y ...")
    for option, path in (("-o", args.output), ("--save-flow", args.save_flow)):
        if path is not None and not path.parent.is_dir():
            raise OSError(f"{option} must name a file in an existing folder, got {str(path)!r}")

    from lpmflow.images import load_pixels
    from lpmflow.matcher import Matcher

    source, target = (load_pixels(path, name) for name, path in (("A", args.source), ("B", args.target)))
    match = Matcher(**_matcher_arguments(args))(source, target)
    _print_points(match, args.points)
    for path in (args.output, args.save_flow):
        if path is not None:
            match.save(path, args.points or None)
            print(f"wrote {path}", file=sys.stderr)


def run_evaluate(args: argparse.Namespace) -> int:
    """`lpmflow evaluate`."""
    from lpmflow.benchmark import command

    return command.run(args, _matcher_arguments(args))


def run_data_check(args: argparse.Namespace) -> int:
    """`lpmflow data check`; 1 when something is wrong."""
    from tqdm import tqdm

    from lpmflow.data.check import check_pairs

    report = check_pairs(
        args.root,
        args.benchmark,
        # disable=None: no bar in a log
        progress=lambda files: tqdm(files, "reading photographs", leave=False, disable=None),
    )
    print("\n".join(report.lines()))
    return 1 if report.wrong else 0


def run_demo(args: argparse.Namespace) -> None:
    """`lpmflow demo`."""
    from lpmflow import demo

    demo.run(args.output)


def run_profile(args: argparse.Namespace) -> None:
    """`lpmflow profile`."""
    import json

    from lpmflow import profile
    from lpmflow.benchmark import check_writable
    from lpmflow.flowfile import replacing

    check_writable({"--json": args.json})
    model, dtype = profile.network(args.model, args.device, args.dtype, args.image_size)
    found = profile.profile(model, batch_size=args.batch_size, dtype=dtype, seconds=args.seconds)
    print("\n".join(found.lines()))
    if args.json is not None:
        with replacing(args.json) as temporary:
            temporary.write_text(json.dumps(found.to_dict(), indent=1) + "\n", encoding="utf-8")


def run_info(args: argparse.Namespace) -> None:
    """`lpmflow info`."""
    from lpmflow import info

    found = info.collect()
    if args.json:
        import json

        print(json.dumps(found, indent=2))
    else:
        print(info.format_info(found))


def _evaluate_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--benchmark", required=True, choices=BENCHMARKS, help="the data set")
    add("--root", required=True, metavar="DIR", help="its folder")
    add("--split", metavar="NAME", help="which pairs (default: val where the data set has one, else its only one)")
    add(
        "--protocol",
        metavar="NAME",
        nargs="+",
        default=[],
        choices=PROTOCOLS,
        help=f"how to count, one or more of {', '.join(PROTOCOLS)} (default: the one most papers use on the data set)",
    )
    add("--alpha", metavar="A", nargs="+", type=float, default=[], help="thresholds (default: those of the protocol)")
    add("--groups", metavar="FILE", help="JSON, category -> symmetric groups of points, for the geometry-aware subset")
    add("--batch-size", metavar="N", type=int, default=8, help="pairs the model gets at once (default: %(default)s)")
    add("--workers", metavar="N", type=int, default=0, help="processes that read photographs (default: %(default)s)")
    add("--predictions", metavar="FILE", help="keep where points went, to go on after a stop and to score again")
    add("--json", metavar="FILE", help="write every figure as JSON")
    add("--csv", metavar="FILE", help="write every figure as CSV")
    add("--markdown", metavar="FILE", help="write the tables as Markdown")
    add("--pairs-csv", metavar="FILE", help="write what came out for each pair as CSV, to compare models pair by pair")
    add("--limit", metavar="N", type=int, help="a first look: only N pairs, evenly spread over the list")
    add("--worst", nargs=2, metavar=("N", "DIR"), help="draw the N worst pairs as pictures in DIR")
    _matcher_options(command)


def _matcher_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `lpmflow.Matcher`, those given; ValueError for --model zero-shot without its --backbone."""
    if args.model == "zero-shot" and args.backbone is None:
        raise ValueError("--model zero-shot needs --backbone NAME, the name of a timm model")
    names = ("model", "device", "dtype", "image_size", "backbone", "backbone_weights", "readout")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _matcher_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--model", metavar="NAME|FILE", help="name, weight file, or zero-shot (default: the embedded weights)"
    )
    command.add_argument("--backbone", metavar="NAME", help="the timm backbone of --model zero-shot")
    command.add_argument("--backbone-weights", metavar="FILE", help="its parameters (default: timm downloads them)")
    command.add_argument("--readout", choices=("window", "nearest"), help="of --model zero-shot (default: window)")
    _precision_options(command)


def _precision_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", help="cpu, cuda, cuda:1 or mps (default: cuda where there is one, else cpu)")
    command.add_argument("--dtype", help="float32, bfloat16 or float16 (default: float32)")
    command.add_argument(
        "--image-size", type=int, metavar="PIXELS", help="what the network sees of a photograph, such as 512"
    )


def _print_points(match: Match, points: list[tuple[float, float]]) -> None:
    if not points:
        return
    for (x, y), (u, v) in zip(points, match.transfer(points), strict=True):
        print(f"{x:g},{y:g} -> {u:.2f},{v:.2f}")


def _command(
    commands: argparse._SubParsersAction[_Parser],
    name: str,
    summary: str,
    run: Callable[[argparse.Namespace], int | None],
) -> argparse.ArgumentParser:
    added = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=EXAMPLES[name],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    added.set_defaults(run=run)
    return added


def _point(text: str) -> tuple[float, float]:
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError:
        x = y = math.nan
    if not (math.isfinite(x) and math.isfinite(y)):
        raise argparse.ArgumentTypeError(f"a point must be X,Y in pixels such as 120,80.5, got {text!r}")
    return x, y


def _output(extensions: tuple[str, ...]) -> Callable[[str], Path]:
    def path(text: str) -> Path:
        if Path(text).suffix.lower() not in extensions:
            raise argparse.ArgumentTypeError(f"the file name must end in {_or(extensions)}, got {text!r}")
        return Path(text)

    return path


def _or(words: tuple[str, ...]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
