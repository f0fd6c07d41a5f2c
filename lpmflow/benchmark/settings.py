"""How a model was run, for reports: what decides a figure beside the data and the protocol.

Files are named without their folders: whole paths say more about a machine than about a figure.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FIELDS = ("weights", "backbone", "readout", "image_size", "dtype", "device", "batch_size", "groups")
"""The columns of a CSV, empty where they do not apply; a report's `settings` may hold "options" besides."""

_SAID = {
    "weights": "weights {}",
    "backbone": "backbone {}",
    "readout": "readout {}",
    "image_size": "{} pixels",
    "dtype": "{}",
    "batch_size": "batches of {}",
    "groups": "groups {}",
}

_PATHS = ("root", "model", "backbone_weights", "groups")
_WITHOUT = ("benchmark", "run", "json", "csv", "markdown", "pairs_csv", "predictions", "worst", "workers")
"""What changes no figure, and what is said first."""


def settings_of(matcher: Any, batch_size: int) -> dict[str, Any]:
    """`lpmflow.Matcher.settings` of a matcher that has it, and the size of batches."""
    own = getattr(matcher, "settings", None)
    return {**(own() if own is not None else {}), "batch_size": batch_size}


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `lpmflow evaluate` that were given and may change a figure, by name."""
    found = {"benchmark": args.benchmark}
    for name, value in vars(args).items():
        if name not in _WITHOUT and value not in (None, []):
            found[name] = Path(value).resolve().name if name in _PATHS else value
    return found


def command(options: Mapping[str, Any]) -> str:
    """The options as they are written on a command line."""
    words = ["lpmflow", "evaluate"]
    for name, value in options.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        words += [f"--{name.replace('_', '-')}", *(str(one) for one in values)]
    return shlex.join(words)


def cells(settings: Mapping[str, Any]) -> dict[str, str]:
    """Each of `FIELDS` as text, empty where it is not known or does not apply."""
    found = {name: settings.get(name) for name in FIELDS}
    if found["image_size"] is not None:
        found["image_size"] = "x".join(str(side) for side in found["image_size"])
    return {name: "" if value is None else str(value) for name, value in found.items()}


def sentence(settings: Mapping[str, Any]) -> str:
    """The settings that are known, in one line: "lpmflow-tiny.safetensors, 192 x 192 pixels, float32 on cpu, ..."."""
    known = {name: text for name, text in cells(settings).items() if text}
    if "image_size" in known:
        known["image_size"] = known["image_size"].replace("x", " x ")
    if "dtype" in known:
        known["dtype"] += f" on {known.get('device', 'an unknown device')}"
    return ", ".join(said.format(known[name]) for name, said in _SAID.items() if name in known)
