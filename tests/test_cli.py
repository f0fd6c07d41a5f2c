"""The command line: what it parses, calls, prints and returns, with the matcher replaced by a recorder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

import lpmflow
from lpmflow import cli
from lpmflow.demo import photograph
from lpmflow.images import load_image

CAT, RACCOON = str(photograph("cat")), str(photograph("raccoon"))
SHAPES = tuple(tuple(load_image(path, path).shape) for path in (CAT, RACCOON))


class FakeMatch:
    """Moves every point by (10, 0.25) and writes its own name."""

    def transfer(self, points: Any) -> np.ndarray:
        return np.asarray(points, dtype=np.float64) + (10, 0.25)

    def save(self, path: Path, points: Any = None) -> None:
        Path(path).write_text(f"match {points}")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the command line asked of the matcher; the matcher answers with `FakeMatch`."""
    recorded: list[Any] = []

    class FakeMatcher:
        def __init__(self, **options: Any) -> None:
            recorded.append(options)

        def __call__(self, source: Tensor, target: Tensor) -> FakeMatch:
            recorded.append((tuple(source.shape), tuple(target.shape)))
            return FakeMatch()

    monkeypatch.setattr("lpmflow.matcher.Matcher", FakeMatcher)
    return recorded


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "import sys; from lpmflow.cli import main; sys.exit(main())", *argv]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_match_writes_and_prints(calls: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, flow = tmp_path / "match.png", tmp_path / "match.flo"
    code = cli.main(["match", CAT, RACCOON, "-o", str(out), "--points", "12,8.5", "0,0", "--save-flow", str(flow)])
    assert code == 0
    assert calls == [{}, SHAPES]
    assert capsys.readouterr() == ("12,8.5 -> 22.00,8.75\n0,0 -> 10.00,0.25\n", f"wrote {out}\nwrote {flow}\n")
    assert out.read_text() == flow.read_text() == "match [(12.0, 8.5), (0.0, 0.0)]"


def test_match_passes_the_choice_of_model_device_and_dtype(
    calls: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", "lpmflow-base", "--device", "cuda:1", "--dtype", "bfloat16"]
    assert cli.main(["match", CAT, RACCOON, "--points", "1,2", *options]) == 0
    assert calls[0] == {"model": "lpmflow-base", "device": "cuda:1", "dtype": "bfloat16"}
    assert capsys.readouterr().out == "1,2 -> 11.00,2.25\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["match", CAT], "the following arguments are required: B"),
        (["match", CAT, RACCOON], "nothing to do"),
        (["match", CAT, RACCOON, "-o", "x.bmp"], "must end in .png, .npz or .flo, got 'x.bmp'"),
        (["match", CAT, RACCOON, "--save-flow", "x.npz"], "must end in .flo, got 'x.npz'"),
        (["match", CAT, RACCOON, "--points", "1;2"], "must be X,Y in pixels such as 120,80.5, got '1;2'"),
        (["match", CAT, RACCOON, "--points", "1,2,3"], "got '1,2,3'"),
        (["match", CAT, RACCOON, "--points", "1,nan"], "got '1,nan'"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        ([], "COMMAND"),
    ],
)
def test_wrong_usage_exits_with_2(
    calls: list[Any], capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    command = "lpmflow match" if "match" in argv else "lpmflow"
    assert said.startswith(f"{command}: error: ") and said.endswith(f"; see {command} --help\n")
    assert calls == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["match", CAT, RACCOON, "-o", "absent/x.png"],
            "-o must name a file in an existing folder, got 'absent/x.png'",
        ),
        (["match", CAT, RACCOON, "--save-flow", "absent/x.flo"], "--save-flow must name a file in an existing folder"),
        (["match", CAT, "absent.jpg", "-o", "x.png"], "B must be the path of an image file, but there is no file "),
        (["match", ".", CAT, "-o", "x.png"], "A must be the path of an image file, but '.' is a folder"),
    ],
)
def test_refused_before_the_matcher_is_made(
    calls: list[Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    argv: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"lpmflow: error: {message}")
    assert calls == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [ValueError, TypeError, OSError, ImportError, RuntimeError])
def test_an_error_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: type[Exception]
) -> None:
    def fail(**options: Any) -> None:
        raise kind("model must be one\n  of these")

    monkeypatch.setattr("lpmflow.matcher.Matcher", fail)
    assert cli.main(["match", CAT, RACCOON, "--points", "1,1"]) == 1
    assert capsys.readouterr() == ("", "lpmflow: error: model must be one of these\n")


@pytest.mark.parametrize(
    ("options", "said", "wanted"),
    [
        (["--backbone", "x"], "backbone must be a name, got 'x'", "--backbone must be a name, got 'x'"),
        (["--backbone=x"], "backbone is for model='zero-shot' only", "--backbone is for --model zero-shot only"),
        ([], "backbone must be a name", "backbone must be a name"),
        (
            ["--model", "m"],
            "model 'm' has no weights; pass model='w.pth'",
            "--model 'm' has no weights; pass --model w.pth",
        ),
        (["--model", "m"], "model m of /a/image_size.b: image_size=9", "model m of /a/image_size.b: --image-size=9"),
        ([], "no weights; give a file as backbone_weights", "no weights; give a file as --backbone-weights"),
        (["--image-size", "9"], "image_size must be 16", "--image-size must be 16"),
    ],
)
def test_an_error_speaks_of_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], said: str, wanted: str
) -> None:
    def fail(**given: Any) -> None:
        raise ValueError(said)

    monkeypatch.setattr("lpmflow.matcher.Matcher", fail)
    assert cli.main(["match", CAT, RACCOON, "--points", "1,1", *options]) == 1
    assert capsys.readouterr().err == f"lpmflow: error: {wanted}\n"


def test_a_file_that_cannot_be_read_is_said_with_its_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "weights.pth"
    text.write_text("hello")
    assert cli.main(["match", CAT, RACCOON, "--points", "1,1", "--model", str(text)]) == 1
    wanted = f"--model {text} cannot be read as a PyTorch checkpoint of plain tensors: it is no file that torch.save "
    assert capsys.readouterr().err == f"lpmflow: error: {wanted}writes\n"


def test_a_mistake_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**options: Any) -> None:
        raise KeyError("ours")

    monkeypatch.setattr("lpmflow.matcher.Matcher", fail)
    with pytest.raises(KeyError):
        cli.main(["match", CAT, RACCOON, "--points", "1,1"])


def test_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(**options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lpmflow.matcher.Matcher", interrupted)
    assert cli.main(["match", CAT, RACCOON, "--points", "1,1"]) == 130


def test_demo_gets_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    folders: list[str] = []
    monkeypatch.setattr("lpmflow.demo.run", folders.append)
    assert cli.main(["demo"]) == cli.main(["demo", "-o", "there"]) == 0
    assert folders == ["lpmflow-demo", "there"]


def test_info_as_text_and_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("lpmflow.info.collect", lambda: {"versions": {"lpmflow": "7"}})
    monkeypatch.setattr("lpmflow.info.format_info", lambda found: f"text of {found['versions']['lpmflow']}")
    assert cli.main(["info"]) == 0
    assert capsys.readouterr().out == "text of 7\n"
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"versions": {"lpmflow": "7"}}


@pytest.mark.parametrize("command", ["match", "demo", "info"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    assert f"\n  lpmflow {command}" in capsys.readouterr().out


def test_version_and_help_of_a_process() -> None:
    version = run("--version")
    assert (version.returncode, version.stdout, version.stderr) == (0, f"lpmflow {lpmflow.__version__}\n", "")
    shown = run("--help")
    assert shown.returncode == 0
    assert all(word in shown.stdout for word in ("match", "demo", "info", "examples:"))


def test_an_error_of_a_process_has_no_traceback(tmp_path: Path) -> None:
    done = run("match", CAT, str(tmp_path / "absent.jpg"), "--points", "1,1")
    assert (done.returncode, done.stdout) == (1, "")
    file = str(tmp_path / "absent.jpg")
    assert done.stderr == f"lpmflow: error: B must be the path of an image file, but there is no file {file!r}\n"


def test_unknown_model_of_a_process_lists_the_models() -> None:
    done = run("match", CAT, RACCOON, "--points", "1,1", "--model", "lpmflow-huge")
    assert done.returncode == 1
    assert done.stderr.startswith("lpmflow: error: ") and done.stderr.count("\n") == 1
    assert "lpmflow-huge" in done.stderr and "lpmflow-tiny" in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
def test_a_reader_that_leaves_is_no_error() -> None:
    program = "import sys; sys.argv = ['lpmflow', 'info']; from lpmflow.cli import main; sys.exit(main())"
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as stdout:
        done = subprocess.run([sys.executable, "-c", program], stdout=stdout, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (141, b"")
