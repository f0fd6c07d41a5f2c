"""A report as text: tables for a screen, and Markdown."""

from __future__ import annotations

import textwrap

from lpmflow.benchmark.dense import DENSE, MEASURES
from lpmflow.benchmark.report import Report
from lpmflow.benchmark.settings import command, sentence
from lpmflow.evaluation.published import ALPHA, PAPER_PROTOCOLS, SPAIR_CATEGORIES, SPAIR_TABLE

_OFFICIAL = "the official test split, by names and counts of its pairs"
_UNITS = (("point", "category"), ("pixel", "folder"))
_WIDE = 20
"""Categories that still stand side by side."""


def screen(report: Report) -> list[str]:
    """Lines of text, at most some 130 columns wide where categories are those of SPair-71k."""
    known, kinds = _UNITS[report.benchmark in DENSE]
    said = [
        f"{report.benchmark} {report.split} of {report.root}: {_pairs(report)}, {_counted(report.points, known)}, "
        f"{_counted(report.categories, kinds)}" + (f"; {_OFFICIAL}" if report.official else ""),
        *_partial(report),
        _model(report),
    ]
    for name, fields in report.protocols.items():
        said.append("")
        rule = f"{name}: {fields['rule']}{_same(report, name)}"
        said += textwrap.wrap(rule, 118, subsequent_indent="  ", break_on_hyphens=False)
        said += _keypoints(report, name) if name in report.alphas else _others(report, name)
    return said + _papers(report) + (["", *_partial(report)] if _partial(report) else [])


def markdown(report: Report) -> str:
    """A section for each protocol, with the same tables."""
    said = [f"# {report.benchmark} {report.split}: {report.model}" + (f", {_pairs(report)}" if report.of_pairs else "")]
    said += [part for line in _partial(report) for part in ("", f"**{line}**")]
    said += [
        "",
        f"- data: {report.root}, {_pairs(report)}, {_counted(report.points, _UNITS[report.benchmark in DENSE][0])}, "
        f"hash `{report.dataset_hash}`",
        f"- model: {report.model}" + ("" if report.model == report.model_hash else f", hash `{report.model_hash}`"),
        *([f"- run: {sentence(report.settings)}"] if sentence(report.settings) else []),
        *([f"- command: `{command(report.settings['options'])}`"] if "options" in report.settings else []),
        f"- measured {report.date} with " + ", ".join(f"{name} {one}" for name, one in report.versions.items()),
    ]
    for name, fields in report.protocols.items():
        said += ["", f"## {name}", "", f"{fields['rule'][0].upper()}{fields['rule'][1:]}{_same(report, name)}."]
        for header, rows in _tables(report, name):
            said += _piped(header, rows)
        if _beside_papers(report, name):
            header = [f"PCK@{ALPHA:g}, per image", *SPAIR_CATEGORIES.values(), "all"]
            said += [*_piped(header, _paper_rows(list(SPAIR_CATEGORIES))), "", _paper_note(name)]
    if report.official:
        said += ["", f"{_OFFICIAL[0].upper()}{_OFFICIAL[1:]}."]
    if report.benchmark == "spair" and not report.official:
        said += ["", "Not the official test split of SPair-71k, so nothing here compares with papers on it."]
    return "\n".join(said) + "\n"


def _pairs(report: Report) -> str:
    return f"{report.pairs:,} of {report.of_pairs:,} pairs" if report.of_pairs else _counted(report.pairs, "pair")


def _counted(number: int, word: str) -> str:
    """ "1 category", "2 categories"."""
    many = f"{word[:-1]}ies" if word.endswith("y") else f"{word}s"
    return f"{number:,} {word if number == 1 else many}"


def _same(report: Report, protocol: str) -> str:
    """Names the protocol above whose rule is this one's, letter by letter, such as `spair` above `dift`."""
    rules = {name: fields["rule"] for name, fields in report.protocols.items()}
    above = next(name for name, rule in rules.items() if rule == rules[protocol])
    return "" if above == protocol else f" (the same rule as {above}, so the same figures)"


def _partial(report: Report) -> list[str]:
    """A line where only some pairs were evaluated, that nobody quotes a figure of them as one of the data set."""
    if not report.of_pairs:
        return []
    return [f"ONLY {report.pairs:,} OF {report.of_pairs:,} PAIRS (limit): for a first look, not a result to quote."]


def _model(report: Report) -> str:
    """The model's name, its hash where that says more, and how it was run."""
    known = [report.model] if report.model == report.model_hash else [report.model, report.model_hash]
    known += [sentence(report.settings)] if report.settings else []
    return f"model {', '.join(known)}"


def _piped(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = (header, ["---"] * len(header), *rows)
    return ["", *("| " + " | ".join(line) + " |" for line in lines)]


def _keypoints(report: Report, protocol: str) -> list[str]:
    said: list[str] = []
    for number, (header, rows) in enumerate(_tables(report, protocol)):
        if number == 1 and _are_spair(report, protocol):
            said += ["", *_spair(report, protocol)]
        else:
            said += ["", *_aligned(header, rows)]
    return said


def _others(report: Report, protocol: str) -> list[str]:
    return [line for header, rows in _tables(report, protocol) for line in ("", *_aligned(header, rows))]


def _tables(report: Report, protocol: str) -> list[tuple[list[str], list[list[str]]]]:
    """The summary, the categories, the difficulties: (header, rows) each."""
    if protocol in DENSE:
        return [_dense(report, protocol)]
    if protocol == "masks":
        both = {measure: report.select("masks", measure) for measure in ("LT-ACC", "IoU")}
        summary = [[measure, _percent(row.per_image)] for measure, rows in both.items() for row in rows]
        ours = [report.select("masks", measure, "category") for measure in both]
        by_category = [
            [one.name, f"{one.pairs:,}", _percent(one.per_image), _percent(other.per_image)]
            for one, other in zip(*ours, strict=True)
        ]
        return [(["measure", "mean over pairs"], summary), (["category", "pairs", *both], by_category)]
    tables = [_summary(report, protocol)]
    alpha = report.table_alpha(protocol)
    by_category = [
        [row.name, f"{row.pairs:,}", _percent(row.per_image), _percent(row.per_point)]
        for row in report.select(protocol, group="category", alpha=alpha)
    ]
    tables.append(([f"category, PCK@{alpha:g}", "pairs", "per image", "per point"], by_category))
    levels = [
        row for kind in ("viewpoint", "scale", "truncation", "occlusion") for row in report.select(protocol, group=kind)
    ]
    if levels:
        rows = [
            [f"{row.group} {row.name}", f"{row.pairs:,}", _percent(row.per_image), _percent(row.per_point)]
            for row in levels
            if row.alpha == alpha
        ]
        tables.append(([f"difficulty, PCK@{alpha:g}", "pairs", "per image", "per point"], rows))
    return tables


def _dense(report: Report, protocol: str) -> tuple[list[str], list[list[str]]]:
    """A line for each pair, then their mean and that over all pixels."""
    units = {"EPE": "EPE, px", "median": "median, px", "Fl": "Fl, %"}
    totals = [report.select(protocol, measure)[0] for measure in MEASURES]
    by_pair = [report.select(protocol, measure, "pair") for measure in MEASURES]
    rows = [[row[0].name, *(_percent(one.per_image) for one in row)] for row in zip(*by_pair, strict=True)]
    if len(rows) > 1:
        rows.append(["mean over pairs", *(_percent(row.per_image) for row in totals)])
        rows.append(["all pixels", *(_percent(row.per_point) for row in totals)])
    return ["pair", *(units.get(measure, measure) for measure in MEASURES)], rows


def _summary(report: Report, protocol: str) -> tuple[list[str], list[list[str]]]:
    header = ["PCK at alpha", "per image", "95 % interval", "per point", "95 % interval"]
    header += ["dagger, per image", "per point"]
    aware = {row.alpha: row for row in report.select(protocol, group="geometry-aware")}
    dagger = {row.alpha: row for row in report.select(protocol, "PCK-dagger")}
    if aware:
        header += ["geometry-aware, per image", "per point"]
    rows = []
    for row in report.select(protocol):
        cells = [f"{row.alpha:g}", _percent(row.per_image), _between(row.per_image_low, row.per_image_high)]
        cells += [_percent(row.per_point), _between(row.per_point_low, row.per_point_high)]
        cells += [_percent(dagger[row.alpha].per_image), _percent(dagger[row.alpha].per_point)]
        if aware:
            cells += [_percent(aware[row.alpha].per_image), _percent(aware[row.alpha].per_point)]
        rows.append(cells)
    return header, rows


def _are_spair(report: Report, protocol: str) -> bool:
    names = {row.name for row in report.select(protocol, group="category")}
    return report.benchmark == "spair" and names <= set(SPAIR_CATEGORIES) and len(names) <= _WIDE


def _spair(report: Report, protocol: str) -> list[str]:
    """Categories side by side in the papers' order, and the papers' rows below: as a table only where they compare."""
    alpha = report.table_alpha(protocol)
    found = {row.name: row for row in report.select(protocol, group="category", alpha=alpha)}
    names = [name for name in SPAIR_CATEGORIES if name in found]
    (everything,) = report.select(protocol, alpha=alpha)
    rows = [(f"PCK@{alpha:g}", [*(SPAIR_CATEGORIES[name] for name in names), "all"])]
    for average, label in (("per_image", "per image"), ("per_point", "per point")):
        figures = [getattr(row, average) for row in (*(found[name] for name in names), everything)]
        rows.append((f"{report.model}, {label}", [_percent(figure) for figure in figures]))
    beside = _beside_papers(report, protocol)
    if beside:
        rows += [(label, cells) for label, *cells in _paper_rows(names)]
    wide = max(len(label) for label, _ in rows)
    cell = 1 + max(len(text) for _, cells in rows for text in cells)
    return [
        f"{label:<{wide}}" + "".join(f"{text:>{cell}}" for text in cells[:-1]) + f" |{cells[-1]:>{cell}}"
        for label, cells in rows
    ] + ([_paper_note(protocol)] if beside else [])


def _beside_papers(report: Report, protocol: str) -> bool:
    """Whether the papers' rows stand below these: on their pairs, at their alpha."""
    return report.official and ALPHA in report.alphas.get(protocol, ())


def _paper_rows(names: list[str]) -> list[list[str]]:
    """Of each paper its label, its figures of the categories `names`, and that of all pairs."""
    return [
        [f"{row.method} (paper)", *(_percent(row.by_category.get(name)) for name in names), _percent(row.all)]
        for row in SPAIR_TABLE
    ]


def _paper_note(protocol: str) -> str:
    """By which protocol the papers' rows are, that nobody takes them for this one's."""
    other = "" if protocol in PAPER_PROTOCOLS else f", not by {protocol}"
    return f"(paper): PCK@{ALPHA:g} per image as published, by {' or '.join(PAPER_PROTOCOLS)}{other}."


def _papers(report: Report) -> list[str]:
    """What papers give for the official split, said where the pairs are others, so that nobody takes one for it."""
    compared = any(ALPHA in report.alphas.get(name, ()) for name in PAPER_PROTOCOLS)
    if report.benchmark != "spair" or report.official or report.model == "identity" or not compared:
        return []
    rows = ", ".join(f"{row.method} {row.all:.1f}" for row in SPAIR_TABLE)
    note = (
        f"Papers, for the official test split of 12,234 pairs, which this is not, PCK@{ALPHA:g} per image by their "
        f"own protocols ({' or '.join(PAPER_PROTOCOLS)}): {rows}."
    )
    return ["", *textwrap.wrap(note, 118, break_on_hyphens=False)]


def _aligned(header: list[str], rows: list[list[str]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    return [
        f"{row[0]:<{widths[0]}}"
        + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in (header, *rows)
    ]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _between(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"{low:.1f} to {high:.1f}"
