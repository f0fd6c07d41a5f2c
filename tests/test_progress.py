"""What is said while pairs are matched: the clock is made up, so every line is known."""

from __future__ import annotations

import io
import sys

import pytest

from lpmflow.benchmark import progress
from lpmflow.benchmark.progress import Progress, duration


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


def test_a_log_gets_a_line_a_minute_at_most(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """Two pairs every four seconds: 0.5 a second."""
    shown = Progress("squash/forward", 90, 100, True)
    for _ in range(45):
        clock.now += 4
        shown.add(2)
    shown.close()
    assert capsys.readouterr().err.splitlines() == [
        "matching 90 of 100 pairs, squash/forward",
        "matched 30 of 90 pairs, 0.5 a second, 2 min left",
        "matched 60 of 90 pairs, 0.5 a second, 60 s left",
        "matched 90 of 100 pairs, squash/forward, in 3 min (0.5 a second)",
    ]


def test_a_slow_model(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    shown = Progress("dense", 41, 41, True)
    clock.now += 300
    shown.add(1)
    assert capsys.readouterr().err.splitlines() == [
        "matching 41 pairs, dense",
        "matched 1 of 41 pairs, 0.2 a minute, 3 h 20 min left",
    ]


@pytest.mark.parametrize(("missing", "shown"), [(0, True), (3, False)])
def test_nothing_is_said_where_there_is_nothing_to_do_or_another_process_speaks(
    capsys: pytest.CaptureFixture[str], missing: int, shown: bool
) -> None:
    one = Progress("dense", missing, 3, shown)
    one.add(missing)
    one.close()
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    shown = Progress("dense", 2, 4, True)
    shown.bar.mininterval = shown.bar.miniters = 0
    shown.add(1)
    shown.close()
    text = terminal.getvalue()
    assert "matching dense:  75%|" in text and "| 3/4 pairs, " in text and " left" in text and "matched" not in text


def test_durations() -> None:
    assert [duration(one) for one in (0.4, 89, 90, 21 * 60, 99 * 60, 100 * 60, 3600 * 25)] == [
        "0 s", "89 s", "2 min", "21 min", "99 min", "1 h 40 min", "25 h 0 min",
    ]  # fmt: skip
