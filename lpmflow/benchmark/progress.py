"""How far matching has come: a bar on a terminal, and in a log a plain line now and then, which shows that it lives."""

from __future__ import annotations

import sys
import time

SAY_EVERY = 60.0
"""Seconds between two lines in a log."""
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} pairs, {rate_fmt}, {remaining} left"


class Progress:
    """Of `total` pairs `missing` are to be matched, the others are known; `shown`: False says nothing.

    On a terminal a bar. Else, on stderr, a line at the start, one a minute at most, and one when it is done. Nothing
    when there is nothing to do.
    """

    def __init__(self, name: str, missing: int, total: int, shown: bool) -> None:
        from tqdm import tqdm

        self.name, self.total, self.missing, self.done = name, total, missing, 0
        shown = shown and missing > 0
        bar = shown and sys.stderr.isatty()
        self.plain = shown and not bar
        self.bar = tqdm(
            total=total,
            initial=total - missing,
            desc=f"matching {name}",
            unit=" pair",
            bar_format=_BAR,
            disable=not bar,
        )
        self.start = self.said = time.monotonic()
        known = f" of {total}" if missing < total else ""
        self._say(f"matching {missing}{known} {'pair' if total == 1 else 'pairs'}, {name}")

    def add(self, pairs: int) -> None:
        """So many more are matched."""
        self.bar.update(pairs)
        self.done += pairs
        now = time.monotonic()
        if now - self.said >= SAY_EVERY and 0 < self.done < self.missing:
            self.said, rate = now, self.done / (now - self.start)
            left = duration((self.missing - self.done) / rate)
            self._say(f"matched {self.done} of {self.missing} pairs, {_rate(rate)}, {left} left")

    def close(self) -> None:
        """All are matched."""
        self.bar.close()
        seconds = time.monotonic() - self.start
        rate = _rate(self.missing / max(seconds, 1e-3))
        pairs = "pair" if self.total == 1 else "pairs"
        self._say(f"matched {self.missing} of {self.total} {pairs}, {self.name}, in {duration(seconds)} ({rate})")

    def _say(self, line: str) -> None:
        if self.plain:
            print(line, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """ "40 s", "21 min" from a minute and a half, "3 h 20 min" from a hundred minutes."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _rate(pairs: float) -> str:
    return f"{pairs:.1f} a second" if pairs >= 0.1 else f"{60 * pairs:.1f} a minute"
