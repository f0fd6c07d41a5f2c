"""Bars of the whole network's speed, from the JSON of a benchmark run.

pytest benchmarks/bench_model.py --json run.json && python benchmarks/plot.py run.json speed.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

from lpmflow.flowfile import replacing

COLOURS = ("#b9bfc9", "#2f6db3", "#d9dde3", "#7fb0de")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", help="what pytest benchmarks/ --json wrote")
    parser.add_argument("picture", help="the .png to write")
    args = parser.parse_args()
    run = json.loads(Path(args.json).read_text(encoding="utf-8"))
    rows = [row for row in run["tables"]["whole network"] if row["pairs"] == 1]
    models = list(dict.fromkeys(row["model"] for row in rows))
    ways = list(dict.fromkeys(row["way"] for row in rows))
    figure = Figure(figsize=(4.2 * len(models), 3.2), layout="constrained")
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        dtypes = list(dict.fromkeys(row["dtype"] for row in rows if row["model"] == model))
        for index, way in enumerate(ways):
            found = [row for row in rows if row["model"] == model and row["way"] == way]
            places = [dtypes.index(row["dtype"]) + (index - (len(ways) - 1) / 2) * 0.8 / len(ways) for row in found]
            bars = axes.bar(places, [row["ms"] for row in found], 0.76 / len(ways), label=way, color=COLOURS[index])
            axes.bar_label(bars, [f"{row['ms']:.0f}" for row in found], padding=2, fontsize=8)
        axes.set_xticks(range(len(dtypes)), dtypes)
        axes.set_title(model)
        axes.set_ylabel("ms a pair")
        axes.margins(y=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8)
    about = run["machine"]
    place = f"{about['device']} ({about['cpu']}), {about['threads']} threads"
    figure.suptitle(f"One pair, {place}, torch {about['torch']}, {about['date']}", fontsize=9)
    with replacing(args.picture) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


if __name__ == "__main__":
    main()
