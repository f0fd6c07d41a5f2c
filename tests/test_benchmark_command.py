"""`lpmflow evaluate`, the command: what it prints and writes, what it refuses, and how it stops."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up_pairs import THREE, keypoints, outlines
from PIL import Image
from safetensors import safe_open

import lpmflow
from lpmflow import benchmark, cli
from lpmflow.benchmark import command, evaluate
from lpmflow.benchmark.by_pair import spread
from lpmflow.evaluation import PROTOCOLS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, shifted: lpmflow.Matcher) -> list[dict[str, Any]]:
    """What the command line asked `Matcher` for; it gets the fake."""
    recorded: list[dict[str, Any]] = []

    def make(**options: Any) -> lpmflow.Matcher:
        recorded.append(options)
        return shifted

    monkeypatch.setattr("lpmflow.matcher.Matcher", make)
    return recorded


def test_the_command_prints_and_writes_the_report(
    tmp_path: Path, asked: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    root = keypoints(tmp_path / "made-up", THREE)
    options = ["--model", "mine.safetensors", "--device", "cpu", "--dtype", "bfloat16", "--batch-size", "2"]
    files = {name: tmp_path / f"out.{name}" for name in ("json", "csv", "markdown")}
    for name, file in files.items():
        options += [f"--{name}", str(file)]
    options += ["--worst", "2", str(tmp_path / "worst"), "--predictions", str(tmp_path / "kept")]
    assert cli.main(["evaluate", "--benchmark", "spair", "--root", str(root), *options]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("spair val of made-up: 3 pairs, 7 points, 1 category\nmodel fake, ")
    assert "0.1                75.0" in said.out and "matched 3 of 3 pairs, squash/forward, in " in said.err
    assert asked == [{"model": "mine.safetensors", "device": "cpu", "dtype": "bfloat16"}]
    read = json.loads(files["json"].read_text())
    assert read["protocols"]["spair"]["name"] == "spair"
    options = {"batch_size": 2, "model": "mine.safetensors", "device": "cpu", "dtype": "bfloat16"}
    assert read["settings"] == {
        "weights": "made up", "image_size": [192, 192], "dtype": "float32", "device": "cpu", "batch_size": 2,
        "options": {"benchmark": "spair", "root": "made-up", **options},
    }  # fmt: skip
    assert len(files["csv"].read_text().splitlines()) == 1 + 4 * 3 and "## spair" in files["markdown"].read_text()
    drawn = [path.name for path in sorted((tmp_path / "worst").iterdir())]
    assert drawn == ["001-000002-a-b_cup.png", "002-000000-a-b_cup.png"]
    assert (tmp_path / "kept").is_file()


def test_tables_are_printed_before_files_are_written(
    tmp_path: Path, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder of the JSON file is gone when it is to be written."""
    root, folder = keypoints(tmp_path / "made-up", THREE), tmp_path / "out"
    folder.mkdir()
    check = command.check_writable
    monkeypatch.setattr(command, "check_writable", lambda paths: (check(paths), folder.rmdir()))
    argv = ["evaluate", "--benchmark", "spair", "--root", str(root), "--json", str(folder / "a")]
    assert cli.main([*argv, "--markdown", str(tmp_path / "b")]) == 1
    said = capsys.readouterr()
    assert "0.1                75.0" in said.out and "## spair" in (tmp_path / "b").read_text()
    assert said.err.splitlines()[-1].startswith(f"lpmflow: error: --json {folder / 'a'} could not be written: ")


def test_tables_that_cannot_be_printed_cost_no_file(
    tmp_path: Path, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, "print", full, raising=False)
    root, file = keypoints(tmp_path / "made-up", THREE), tmp_path / "out.json"
    assert cli.main(["evaluate", "--benchmark", "spair", "--root", str(root), "--json", str(file)]) == 1
    assert json.loads(file.read_text())["pairs"] == 3


def test_a_picture_that_fails_costs_no_figure(
    tmp_path: Path, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lpmflow.benchmark.pictures.prediction_figure", fail)
    root, file = keypoints(tmp_path / "made-up", THREE), tmp_path / "out.json"
    argv = ["evaluate", "--benchmark", "spair", "--root", str(root), "--json", str(file)]
    assert cli.main([*argv, "--worst", "1", str(tmp_path / "worst")]) == 1
    said = capsys.readouterr()
    assert "0.1                75.0" in said.out and file.is_file()
    assert said.err.splitlines()[-1] == "lpmflow: error: [Errno 28] No space left on device"


def test_predictions_that_cannot_be_written_cost_no_figure(
    tmp_path: Path, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every batch wants to save. The failure is said once while matching, and is the error at the end."""

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys.modules["lpmflow.benchmark.predict"], "SAVE_EVERY", -1.0)
    root, file = keypoints(tmp_path / "made-up", THREE), tmp_path / "kept"
    argv = ["evaluate", "--benchmark", "spair", "--root", str(root), "--predictions", str(file), "--batch-size", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert cli.main(argv) == 1
    said = capsys.readouterr()
    why = f"predictions {str(file)!r} could not be written: No space left on device"
    assert "0.1                75.0" in said.out and said.err.count("could not") == 2
    assert said.err.splitlines()[1] == f"{why}; matching goes on"
    assert said.err.splitlines()[-1] == f"lpmflow: error: --{why}"
    assert [path.name for path in tmp_path.iterdir()] == ["made-up"]
    assert cli.main(argv) == 0 and file.is_file()


def test_what_came_out_for_each_pair(
    tmp_path: Path, asked: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Misses of 0, 4.9, 9.9 and 16 pixels; 0; 4.9 and 40. R is 100 for spair and 50 for lpmflow."""
    root, file = keypoints(tmp_path / "made-up", THREE), tmp_path / "pairs.csv"
    argv = ["evaluate", "--benchmark", "spair", "--root", str(root), "--pairs-csv", str(file)]
    assert cli.main([*argv, "--protocol", "spair", "lpmflow", "--alpha", "0.05", "0.1"]) == 0
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert rows[1] == {
        "index": "1", "pair": "000001-a-b:cup", "source": "JPEGImages/cup/a1.png", "target": "JPEGImages/cup/b1.png",
        "category": "cup", "points": "1", "spair PCK@0.05": "100.0", "spair PCK@0.1": "100.0",
        "spair mean error": rows[1]["spair mean error"], "lpmflow PCK@0.05": "100.0", "lpmflow PCK@0.1": "100.0",
        "lpmflow mean error": rows[1]["lpmflow mean error"],
    }  # fmt: skip
    assert [float(row["spair PCK@0.05"]) for row in rows] == [50, 100, 50]
    assert [float(row["spair PCK@0.1"]) for row in rows] == [75, 100, 50]
    shown = capsys.readouterr().out.split("\nlpmflow: ")[1]
    assert f"\n0.1                {np.mean([float(row['lpmflow PCK@0.1']) for row in rows]):.1f}  " in shown
    means = [(4.9 + 9.9 + 16) / 400, 0, (4.9 + 40) / 200]
    assert [float(row["spair mean error"]) for row in rows] == pytest.approx(means, abs=1e-4)


def test_each_pair_of_outlines(tmp_path: Path, shifted: lpmflow.Matcher) -> None:
    report = evaluate("caltech-101", outlines(tmp_path), shifted)
    assert [row["IoU"] for row in report.by_pair] == pytest.approx([100, 100 / 3])
    line = report.pairs_to_csv().splitlines()[1].split(",")
    assert line[3:6] == ["101_ObjectCategories/cup/b.jpg", "cup", ""] and "by_pair" not in report.as_dict()


def test_two_models_are_compared_as_the_documentation_does(
    tmp_path: Path, make_fake_model: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first is right about the pairs' shares 3/4, 1, 1/2, the second, 200 pixels off, about none."""
    monkeypatch.chdir(tmp_path)
    root = keypoints(tmp_path / "data", THREE)
    for name, shift in (("first", 3.0), ("second", 200.0)):
        report = evaluate("spair", root, lpmflow.Matcher(make_fake_model((shift, -2.0)), "cpu"))
        benchmark.write(report, pairs_csv=f"{name}.csv")
    text = (Path(__file__).resolve().parent.parent / "lpmflow" / "evaluation" / "README.md").read_text(encoding="utf-8")
    exec(text.split("```python\n")[1].split("```")[0], {})
    assert capsys.readouterr().out.splitlines()[-1] == "first - second: +75.0, 95 % interval +50.0 to +100.0"


def test_a_limit_is_said_and_predictions_go_on(
    tmp_path: Path, shifted: lpmflow.Matcher, asked: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of three pairs the first two: 0 and 1 of 3 * index // 2. Then all three, of which only the last is matched."""
    root, kept = keypoints(tmp_path / "made-up", THREE), tmp_path / "kept"
    files = {name: tmp_path / f"out.{name}" for name in ("json", "csv", "markdown", "pairs-csv")}
    argv = ["evaluate", "--benchmark", "spair", "--root", str(root), "--predictions", str(kept)]
    written = [part for name, file in files.items() for part in (f"--{name}", str(file))]
    assert cli.main([*argv, *written, "--limit", "2"]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    loud = "ONLY 2 OF 3 PAIRS (limit): for a first look, not a result to quote."
    assert lines[0].startswith("spair val of made-up: 2 of 3 pairs, 5 points, ")
    assert lines[1] == lines[-1] == loud and "matched 2 of 2 pairs" in said.err
    read = json.loads(files["json"].read_text())
    assert (read["pairs"], read["of_pairs"], read["settings"]["options"]["limit"]) == (2, 3, 2)
    row = next(csv.DictReader(files["csv"].read_text().splitlines()))
    assert (row["pairs"], row["of_pairs"]) == ("2", "3")
    text = files["markdown"].read_text()
    assert text.startswith(f"# spair val: fake, 2 of 3 pairs\n\n**{loud}**\n\n- data: made-up, 2 of 3 pairs, ")
    assert [row["index"] for row in csv.DictReader(files["pairs-csv"].read_text().splitlines())] == ["0", "1"]
    rows = [row for row in read["rows"] if row["group"] == "all" and row["measure"] == "PCK"]
    assert [row["per_image"] for row in rows] == pytest.approx([125 / 2, 150 / 2, 175 / 2, 175 / 2])
    assert cli.main(argv) == 0
    said = capsys.readouterr()
    assert "matched 1 of 3 pairs" in said.err and "ONLY" not in said.out and "0.1                75.0" in said.out
    whole = evaluate("spair", root, shifted, predictions=kept, limit=3)
    assert whole.of_pairs is None and whole.dataset_hash == read["dataset_hash"]


def test_a_limit_and_symmetric_groups(tmp_path: Path, shifted: lpmflow.Matcher) -> None:
    """All pairs have points 4 and 9 together, which of the first two pairs hold two points: misses of 0 and 9.9."""
    four = THREE[0]
    root = keypoints(tmp_path, [four, four, four], kps_ids=["4", "7", "9", "2"])
    aware = evaluate("spair", root, shifted, alphas=[0.05], groups={"cup": [[4, 9]]}, limit=2).select(
        "spair", group="geometry-aware"
    )[0]
    assert (aware.pairs, aware.points, aware.per_point) == (2, 4, 50)


def test_pairs_are_spread() -> None:
    assert [spread(9, limit) for limit in (1, 3, 4, 9, 10, None)] == [
        [0], [0, 3, 6], [0, 2, 4, 6], [*range(9)], [*range(9)], [*range(9)],
    ]  # fmt: skip
    assert set(spread(12_234, 50)) < set(spread(12_234, 100)) and len(set(spread(12_234, 12_233))) == 12_233


@pytest.mark.skipif(os.name != "posix", reason="devices of POSIX")
def test_predictions_must_be_a_file(
    tmp_path: Path, asked: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["evaluate", "--benchmark", "spair", "--root", str(tmp_path), "--predictions", "/dev/null"]
    assert cli.main(argv) == 1 and asked == []
    assert "--predictions must name a file that can be read again, got '/dev/null'" in capsys.readouterr().err


def test_the_command_reads_symmetric_groups(
    tmp_path: Path, asked: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    root = keypoints(tmp_path / "made-up", THREE[:1], kps_ids=["4", "7", "9", "2"])
    groups = tmp_path / "groups.json"
    argv = ["evaluate", "--benchmark", "spair", "--root", str(root), "--groups", str(groups)]
    assert cli.main(argv) == 1 and "--groups must be a JSON file, but there is no file" in capsys.readouterr().err
    groups.write_text('{"cup": 3}')
    assert cli.main(argv) == 1 and "must hold lists of groups by category" in capsys.readouterr().err
    documented = Path(__file__).resolve().parent.parent / "lpmflow" / "evaluation" / "README.md"
    groups.write_text(documented.read_text(encoding="utf-8").split("```json\n")[1].split("```")[0])
    assert cli.main(argv) == 1 and capsys.readouterr().err.endswith(
        "groups must name a category of these pairs, cup, got cat\n"
    )
    groups.write_text('{"cup": [[4, 9]]}')
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert "geometry-aware, per image" in out and "batches of 8, groups groups.json\n" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--benchmark", "spair", "--root", "absent"], "--root must be a folder, but there is no 'absent'"),
        (["--benchmark", "hpatches", "--root", "absent"], "--root must be a folder, but there is no 'absent'"),
        (["--benchmark", "hpatches", "--root", "."], "--root must hold files H_1_2"),
        (["--benchmark", "dense", "--root", "."], "--root must hold flow.npz or flow.flo or flow.png beside"),
        (["--benchmark", "dense", "--root", ".", "--predictions", "x"], "--predictions must not be given for dense"),
        (["--benchmark", "dense", "--root", ".", "--pairs-csv", "x"], "--pairs-csv must not be given for dense"),
        (["--benchmark", "dense", "--root", ".", "--limit", "0"], "--limit must be at least 1, got 0"),
        (
            ["--benchmark", "spair", "--root", ".", "--model", "zero-shot"],
            "--model zero-shot needs --backbone NAME, the",
        ),
        (["--benchmark", "spair", "--root", ".", "--alpha", "-1"], "--alpha must be a number above 0, got -1"),
        (["--benchmark", "dense", "--root", ".", "--workers", "1"], "--workers must not be given for dense"),
        (["--benchmark", "spair", "--root", ".", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--benchmark", "hpatches", "--root", ".", "--batch-size", "-3"], "--batch-size must be at least 1, got -3"),
        (["--benchmark", "hpatches", "--root", ".", "--alpha", "0.1"], "--alpha must not be given for hpatches"),
        (["--benchmark", "spair", "--root", ".", "--worst", "x", "w"], "--worst must begin with a number of pairs"),
        (
            ["--benchmark", "spair", "--root", ".", "--json", "no/x.json"],
            "--json must name a file in an existing folder",
        ),
        (["--benchmark", "spair", "--root", ".", "--csv", "."], "--csv must name a file, got the folder '.'"),
        (
            ["--benchmark", "spair", "--root", ".", "--predictions", "."],
            "--predictions must name a file, got the folder",
        ),
        (
            ["--benchmark", "spair", "--root", ".", "--worst", "3", "file"],
            "--worst must be a folder, or a place for one",
        ),
        (["--benchmark", "spair", "--root", ".", "--groups", "file"], "--groups file must be JSON"),
    ],
)
def test_an_error_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no JSON")
    assert cli.main(["evaluate", *argv]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith(f"lpmflow: error: {message}") and said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: --benchmark, --root"),
        (["--benchmark", "spair", "--root", ".", "--batch-size", "many"], "invalid int value: 'many'"),
        (["--benchmark", "spair", "--root", ".", "--protocol", "mine"], "invalid choice: 'mine'"),
        (["--benchmark", "spair", "--root", ".", "--alpha", "x"], "invalid float value: 'x'"),
    ],
)
def test_wrong_usage_exits_with_2(
    asked: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["evaluate", *argv])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and asked == [] and message in said
    assert said.startswith("lpmflow evaluate: error: ") and said.endswith("; see lpmflow evaluate --help\n")
    assert said.count("\n") == 1


@pytest.mark.parametrize(("option", "value"), [("--image-size", "256"), ("--device", "cpu"), ("--dtype", "float16")])
def test_identity_takes_no_options_of_a_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    argv = ["evaluate", "--benchmark", "spair", "--root", str(tmp_path), "--model", "identity", option, value]
    assert cli.main(argv) == 1
    wanted = f"lpmflow: error: {option} must not be given for --model identity, which has no network\n"
    assert capsys.readouterr().err == wanted


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
@pytest.mark.parametrize("keep", [True, False])
def test_a_run_that_is_stopped_keeps_its_predictions(
    tmp_path: Path,
    shifted: lpmflow.Matcher,
    asked: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    number: int,
    code: int,
    word: str,
    keep: bool,
) -> None:
    """Stopped in its second batch; the second signal, while it saves, changes nothing. The same command goes on."""
    root, kept = keypoints(tmp_path / "made-up", THREE), tmp_path / "kept"
    argv = ["evaluate", "--benchmark", "spair", "--root", str(root), "--batch-size", "1"]
    argv += ["--predictions", str(kept)] if keep else []
    before = signal.getsignal(signal.SIGTERM)

    def stop(model: Any, args: Any) -> None:
        if len(model.calls) == 1:
            try:
                signal.raise_signal(number)
            finally:
                if number == signal.SIGTERM:
                    signal.raise_signal(number)

    hook = shifted.model.register_forward_pre_hook(stop)
    assert cli.main(argv) == code
    said = capsys.readouterr()
    where = f"predictions so far are in {kept}, the same command goes on" if keep else "nothing was kept, --predictions"
    first, last = said.err.splitlines()
    assert said.out == "" and first == "matching 3 pairs, squash/forward"
    assert last.startswith(f"lpmflow evaluate: {word}; {where}")
    assert signal.getsignal(signal.SIGTERM) is before
    hook.remove()
    assert cli.main(argv) == 0
    assert ("matched 2 of 3 pairs" if keep else "matched 3 of 3 pairs") in capsys.readouterr().err


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_photograph_that_cannot_be_decoded_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: str
) -> None:
    """Half of a JPEG file, whose header says nothing of that; what was matched before is kept."""
    root, kept = keypoints(tmp_path / "made-up", THREE), tmp_path / "kept"
    whole, file = io.BytesIO(), root / "JPEGImages" / "cup" / "b1.png"
    Image.effect_noise((96, 96), 50).save(whole, "JPEG")
    file.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    argv = ["evaluate", "--benchmark", "spair", "--root", str(root), "--model", "identity", "--batch-size", "1"]
    assert cli.main([*argv, "--workers", workers, "--predictions", str(kept)]) == 1
    first, said = capsys.readouterr().err.split("\n", 1)
    assert first == "matching 3 pairs, squash/forward"
    where = f"000001-a-b:cup: target must be a readable image, but the file {str(file)!r} cannot be decoded: "
    assert said.startswith(f"lpmflow: error: {where}") and said.count("\n") == 1 and len(said) < len(where) + 120
    with safe_open(kept, framework="np") as kept_file:
        assert kept_file.get_tensor("squash/forward/done").tolist() == [1, 0, 0]


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("workers", "kill"),
    [
        ("0", "kill(os.getpid())"),
        ("2", "kill(-os.getpgid(0))"),
        ("2", "kill(*(one.pid for one in multiprocessing.active_children())); time.sleep(1); kill(os.getpid())"),
    ],
    ids=["alone", "its group", "its workers first"],
)
def test_a_process_that_is_terminated(tmp_path: Path, workers: str, kill: str) -> None:
    """As schedulers do it: the process is killed while it matches, with those it started, and says one line."""
    root, kept = keypoints(tmp_path / "made-up", THREE * 40), tmp_path / "kept"
    program = (
        "import multiprocessing, os, subprocess, sys, time\n"
        "from lpmflow import identity, cli\n"
        "def kill(*ids): subprocess.call(['kill', '-TERM', '--', *map(str, ids)], start_new_session=True)\n"
        "batch, done = identity.IdentityMatcher.batch, []\n"
        "def slow(self, pairs, batch_size=8):\n"
        "    done.append(1)\n"
        f"    if len(done) == 3: {kill}\n"
        "    return batch(self, pairs, batch_size)\n"
        "identity.IdentityMatcher.batch = slow\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    argv = ["evaluate", "--benchmark", "spair", "--root", str(root), "--model", "identity", "--predictions", str(kept)]
    start = [sys.executable, "-c", program, *argv, "--workers", workers]
    done = subprocess.run(start, capture_output=True, text=True, check=False, start_new_session=True)
    wanted = "matching 120 pairs, squash/forward\n"
    wanted += f"lpmflow evaluate: terminated; predictions so far are in {kept}, the same command goes on\n"
    assert (done.returncode, done.stdout, done.stderr) == (143, "", wanted)
    with safe_open(kept, framework="np") as file:
        assert int(file.get_tensor("squash/forward/done").sum()) == 16


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["evaluate", "--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0 and "\n  lpmflow evaluate --benchmark spair --root " in shown
    assert all(name in shown for name in benchmark.BENCHMARKS)


def test_the_command_line_knows_every_data_set_and_protocol() -> None:
    assert benchmark.BENCHMARKS == cli.BENCHMARKS and tuple(PROTOCOLS) == cli.PROTOCOLS
