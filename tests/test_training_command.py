"""`python -m lpmflow.training`: what it parses, passes on, prints and returns, with the training itself replaced."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lpmflow.config import lpmflow_small, lpmflow_tiny
from lpmflow.training import TrainOptions
from lpmflow.training.__main__ import main

Command = Callable[..., int]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `train` was asked for; it says one line."""
    recorded: list[Any] = []

    def train(*arguments: Any, say: Callable[[str], None]) -> None:
        recorded.extend(arguments)
        say("wrote the weights")

    monkeypatch.setattr("lpmflow.training.loop.train", train)
    return recorded


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, photo: np.ndarray) -> Command:
    """`command(...)`: main() in this process, on a folder with two photographs, with these arguments more."""
    monkeypatch.setenv("MALLOC_TOP_PAD_", "268435456")  # set: no restart
    for name in ("a.png", "b.png"):
        Image.fromarray(photo).save(tmp_path / name)

    def call(*argv: str) -> int:
        monkeypatch.setattr(sys, "argv", ["x", "--photos", str(tmp_path), "--out", str(tmp_path / "out"), *argv])
        return main()

    return call


def test_help(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command("--help")
    shown = capsys.readouterr()
    assert (stopped.value.code, shown.err) == (0, "") and shown.out.startswith("usage: python -m lpmflow.training ")
    assert all(word in shown.out for word in ("--photos FOLDER", "--out FOLDER", "--model", "--minutes"))


def test_it_trains_on_the_photographs(
    command: Command, trained: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command() == 0
    assert capsys.readouterr() == ("wrote the weights\n", "")  # and no bar, where stderr is no terminal
    config, photos, out, options = trained
    assert (config, out, options) == (lpmflow_tiny(), str(tmp_path / "out"), TrainOptions())
    assert photos.shape == (2, 3, 256, 256) and photos.dtype == torch.uint8


def test_it_passes_the_choices_on(command: Command, trained: list[Any]) -> None:
    assert command("--model", "lpmflow-small", "--minutes", "2.5", "--batch-size", "3", "--seed", "4") == 0
    assert trained[0] == lpmflow_small()
    assert trained[3] == TrainOptions(minutes=2.5, batch_size=3, seed=4)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--minutes", "0"], "minutes must be above 0, got 0.0"),
        (["--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["--model", "huge"], "unknown model 'huge'; the models are lpmflow-base, "),
        (["--device", "nonsense"], "device must be one that can be used here, got 'nonsense': "),
        (["--device", "cuda:99"], "device must be one that can be used here, got 'cuda:99': "),
        (["--photos", "absent"], "photos must be a folder of image files, got 'absent'"),
    ],
)
def test_an_error_is_one_line(
    command: Command, trained: list[Any], capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert command(*argv) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith(f"error: {message}") and said.err.count("\n") == 1
    assert trained == []


@pytest.mark.parametrize("kind", [ValueError, OSError, TypeError, FloatingPointError])
def test_an_error_of_the_training_is_one_line(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: type[Exception]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise kind("the loss is\n  nan")

    monkeypatch.setattr("lpmflow.training.loop.train", fail)
    assert command() == 1
    assert capsys.readouterr() == ("", "error: the loss is nan\n")


def test_wrong_usage_exits_with_2(command: Command, trained: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command("--minutes", "long")
    assert stopped.value.code == 2 and "invalid float value: 'long'" in capsys.readouterr().err
    assert trained == []


def test_it_starts_again_to_keep_buffers(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    class Restarted(BaseException):
        pass

    def restart(program: str, argv: list[str], environment: dict[str, str]) -> None:
        assert program == sys.executable and argv == [sys.executable, "-m", "lpmflow.training", *sys.argv[1:]]
        assert environment["MALLOC_TRIM_THRESHOLD_"] == "4294967296" and "PATH" in environment
        raise Restarted

    monkeypatch.delenv("MALLOC_TOP_PAD_")
    monkeypatch.setattr("os.execve", restart)
    with pytest.raises(Restarted):
        command()


def test_an_error_of_a_process_is_one_line(tmp_path: Path) -> None:
    """Through the restart."""
    absent = str(tmp_path / "absent")
    argv = [sys.executable, "-m", "lpmflow.training", "--photos", absent, "--out", str(tmp_path / "out")]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: photos must be a folder of image files, got {absent!r}\n"
