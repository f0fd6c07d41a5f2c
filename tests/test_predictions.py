"""Predictions that are kept: going on after a stop, scoring again for nothing, and files that must not be used."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up_pairs import PER_IMAGE, THREE, keypoints, picture

import lpmflow
from lpmflow.benchmark import Predictions, World, evaluate, predict
from lpmflow.benchmark.predictions import Key, _digest, askings, fingerprint, way
from lpmflow.data import KeypointPair, load_pairs
from lpmflow.evaluation import PROTOCOLS, protocol

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def shifted(make_fake_model: Any) -> lpmflow.Matcher:
    return lpmflow.Matcher(make_fake_model((3.0, -2.0)), "cpu")


class Stopped(lpmflow.Matcher):
    """Is interrupted when it is asked for its third pair."""

    def batch(self, pairs: Any, batch_size: int = 8) -> list[lpmflow.Match]:
        if len(self.model.calls) == 2:  # type: ignore[arg-type]
            raise KeyboardInterrupt
        return super().batch(pairs, batch_size)


def test_an_interrupted_run_goes_on(tmp_path: Path, make_fake_model: Any, shifted: lpmflow.Matcher) -> None:
    root, file = keypoints(tmp_path / "data", THREE), tmp_path / "kept"
    with pytest.raises(KeyboardInterrupt):
        evaluate("spair", root, Stopped(make_fake_model((3.0, -2.0)), "cpu"), batch_size=1, predictions=file)
    assert file.is_file() and [path.name for path in sorted(tmp_path.iterdir())] == ["data", "kept"]
    report = evaluate("spair", root, shifted, batch_size=1, predictions=file)
    assert len(shifted.model.calls) == 1  # type: ignore[arg-type]
    assert [row.per_image for row in report.select("spair")] == pytest.approx(PER_IMAGE)


def test_another_protocol_of_the_same_way_matches_nothing(tmp_path: Path, shifted: lpmflow.Matcher) -> None:
    root, file = keypoints(tmp_path / "data", THREE[:1]), tmp_path / "kept"
    calls: list[Any] = shifted.model.calls  # type: ignore[assignment]
    evaluate("spair", root, shifted, protocols=["spair"], predictions=file)
    for name in ("lpmflow", "dift", "pf-pascal", "pf-willow", "pf-willow-bbox"):
        evaluate("spair", root, shifted, protocols=[name], predictions=file)
    assert len(calls) == 1
    evaluate("spair", root, shifted, protocols=["cats", "geoaware", "spair"], predictions=file)
    assert len(calls) == 3  # the other direction, and padded photographs
    once = evaluate("spair", root, shifted, protocols=list(PROTOCOLS), predictions=file)
    assert len(calls) == 3
    assert once.rows == evaluate("spair", root, shifted, protocols=list(PROTOCOLS)).rows


def test_the_folder_may_move(tmp_path: Path, shifted: lpmflow.Matcher) -> None:
    root, file = keypoints(tmp_path / "data", THREE), tmp_path / "kept"
    evaluate("spair", root, shifted, predictions=file)
    evaluate("spair", root.rename(tmp_path / "moved"), shifted, predictions=file)
    assert len(shifted.model.calls) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("change", ["model", "dtype", "point", "photograph"])
def test_predictions_of_something_else_are_refused(
    tmp_path: Path, make_fake_model: Any, shifted: lpmflow.Matcher, change: str
) -> None:
    root, file = keypoints(tmp_path / "data", THREE), tmp_path / "kept"
    evaluate("spair", root, shifted, predictions=file)
    before = file.read_bytes()
    matcher, what = shifted, "other pairs or photographs (pairs "
    if change == "model":
        matcher, what = lpmflow.Matcher(make_fake_model((3.0, -2.5)), "cpu"), "another model or precision (model "
    elif change == "dtype":
        matcher, what = lpmflow.Matcher(shifted.model, "cpu", "bfloat16"), "another model or precision (model "
    elif change == "point":
        shutil.rmtree(root)
        keypoints(root, [*THREE[:2], ([(30, 30), (20, 20)], [(35.94, 31.92), (63, 19)])])
    else:
        picture(root / "JPEGImages" / "cup" / "a1.png", 97, 96)
    with pytest.raises(ValueError) as refused:
        evaluate("spair", root, matcher, predictions=file)
    assert str(refused.value).startswith(f"predictions {str(file)!r} were made with {what}")
    assert str(refused.value).endswith("; delete it or name another file") and "\n" not in str(refused.value)
    assert file.read_bytes() == before


@pytest.mark.parametrize("kind", ["half", "text", "empty", "folder"])
def test_a_file_that_is_damaged_or_something_else(tmp_path: Path, shifted: lpmflow.Matcher, kind: str) -> None:
    root, file = keypoints(tmp_path / "data", THREE), tmp_path / "kept"
    evaluate("spair", root, shifted, predictions=file)
    content = file.read_bytes()
    file.unlink()
    if kind == "folder":
        file.mkdir()
    else:
        file.write_bytes({"half": content[: len(content) // 2], "text": b"not this\n", "empty": b""}[kind])
    with pytest.raises(OSError) as refused:
        evaluate("spair", root, shifted, predictions=file)
    assert str(refused.value).startswith(f"predictions {str(file)!r} are damaged or no predictions: ")
    assert len(shifted.model.calls) == 1  # type: ignore[arg-type]


def test_a_file_of_another_format(tmp_path: Path, shifted: lpmflow.Matcher) -> None:
    from safetensors.numpy import save_file

    root, file = keypoints(tmp_path / "data", THREE), tmp_path / "kept"
    save_file({"weight": np.zeros(3)}, file)
    with pytest.raises(ValueError, match="must say format lpmflow-predictions-2, which they do not; delete it or name"):
        evaluate("spair", root, shifted, predictions=file)
    key = {"model": shifted.fingerprint(), "pairs": fingerprint(load_pairs("spair", root, "val"), root)}
    fewer = {"sizes": np.zeros((2, 4), np.int64)}
    save_file(fewer, file, {"format": "lpmflow-predictions-2", "digest": _digest(fewer), **key})
    with pytest.raises(
        ValueError, match=r"do not fit their pairs: sizes must have shape \(3, 4\), got \(2, 4\); delete"
    ):
        evaluate("spair", root, shifted, predictions=file)


def test_a_file_that_says_another_number(tmp_path: Path, shifted: lpmflow.Matcher) -> None:
    """One bit of one point: the file is as long as it was and says what it is."""
    root, file = keypoints(tmp_path / "data", THREE), tmp_path / "kept"
    evaluate("spair", root, shifted, predictions=file)
    content = bytearray(file.read_bytes())
    content[-1 - 3] ^= 1  # before the three of `done`, or whatever comes last
    file.write_bytes(content)
    with pytest.raises(OSError) as refused:
        evaluate("spair", root, shifted, predictions=file)
    wanted = "are damaged: they are not what their digest is of; delete it or name another file"
    assert str(refused.value) == f"predictions {str(file)!r} {wanted}" and file.read_bytes() == content


def test_a_file_that_holds_everything_is_not_written_again(tmp_path: Path, shifted: lpmflow.Matcher) -> None:
    root, file = keypoints(tmp_path / "data", THREE), tmp_path / "kept"
    evaluate("spair", root, shifted, predictions=file)
    before = file.stat()
    evaluate("spair", root, shifted, protocols=["lpmflow"], predictions=file)
    after = file.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


@pytest.mark.parametrize("there", [False, True])
def test_two_runs_may_share_a_file(tmp_path: Path, shifted: lpmflow.Matcher, there: bool) -> None:
    """While one matches forwards, another does it backwards and is done first; the file has both in the end."""
    root, file = keypoints(tmp_path / "data", THREE), tmp_path / "kept"
    if there:
        evaluate("spair", root, shifted, protocols=["geoaware"], predictions=file)

    def other_run(model: Any, args: Any) -> None:
        hook.remove()
        evaluate("spair", root, shifted, protocols=["cats"], predictions=file)

    hook = shifted.model.register_forward_pre_hook(other_run)
    evaluate("spair", root, shifted, protocols=["spair"], predictions=file)
    calls: list[Any] = shifted.model.calls  # type: ignore[assignment]
    before, names = len(calls), ["spair", "cats", *(["geoaware"] if there else [])]
    found = evaluate("spair", root, shifted, protocols=names, predictions=file)
    assert len(calls) == before
    assert found.rows == evaluate("spair", root, shifted, protocols=names).rows


def test_a_file_that_another_model_has_written_meanwhile_is_left_alone(
    tmp_path: Path, make_fake_model: Any, shifted: lpmflow.Matcher
) -> None:
    root, file = keypoints(tmp_path / "data", THREE), tmp_path / "kept"

    def other_run(model: Any, args: Any) -> None:
        evaluate("spair", root, lpmflow.Matcher(make_fake_model((1.0, 1.0)), "cpu"), predictions=file)

    shifted.model.register_forward_pre_hook(other_run)
    with pytest.raises(ValueError, match="were made with another model or precision"):
        evaluate("spair", root, shifted, predictions=file)
    evaluate("spair", root, lpmflow.Matcher(make_fake_model((1.0, 1.0)), "cpu"), predictions=file)


def test_every_protocol_finds_its_points() -> None:
    for rule in PROTOCOLS.values():
        assert any(other is rule or other.queries is not None for other in askings(way(rule)).values())
    assert set(askings("squash/forward")) == {"exact", "512"} and set(askings("squash/backward")) == {"256", "512"}


def pair(name: str, **fields: Any) -> KeypointPair:
    points = np.array([[1.0, 2.0]])
    return KeypointPair(name, "cup", *[Path(__file__)] * 2, points, points, **fields)


def test_what_is_put_in_comes_out(tmp_path: Path) -> None:
    pairs = [pair("a"), pair("b")]
    known = Predictions(pairs, Key("m", "p"))
    assert known.missing("squash/forward") == [0, 1]
    known.put("squash/forward", 1, ((4, 5), (6, 7)), {"exact": np.array([[8.0, 9.0]]), "512": np.array([[1.0, 0.0]])})
    assert known.missing("squash/forward") == [0] and known.missing("squash/backward") == [0, 1]
    known.save(tmp_path / "kept", {"benchmark": "mine"})
    again = Predictions(pairs, Key("m", "p"))
    again.load(tmp_path / "kept")
    assert again.missing("squash/forward") == [0] and again.size(1) == ((4, 5), (6, 7))
    again.put("squash/forward", 0, ((4, 5), (6, 7)), {"exact": np.zeros((1, 2)), "512": np.zeros((1, 2))})
    assert [points.tolist() for points in again.landed(protocol("spair"))] == [[[0, 0]], [[8, 9]]]
    assert [points.tolist() for points in again.landed(protocol("lpmflow"))] == [[[0, 0]], [[1, 0]]]


def test_the_fingerprint_of_pairs() -> None:
    ours = fingerprint([pair("a"), pair("b")])
    assert ours == fingerprint([pair("a"), pair("b")]) and len(ours) == 16
    others = [[pair("b"), pair("a")], [pair("a")], [pair("a"), pair("c")], [pair("a"), pair("b", flip=True)]]
    assert len({ours, *map(fingerprint, others)}) == 5
    box = np.array([0.0, 0, 1, 1])
    assert fingerprint([pair("a", target_box=box), pair("b")]) == ours  # boxes only matter for scoring


def test_the_fingerprint_of_a_matcher(make_fake_model: Any, shifted: lpmflow.Matcher) -> None:
    assert shifted.fingerprint() == lpmflow.Matcher(make_fake_model((3.0, -2.0)), "cpu").fingerprint()
    others = [make_fake_model((3.0, -2.1)), make_fake_model((3.0, -2.0), temperature=0.03)]
    found = {lpmflow.Matcher(one, "cpu").fingerprint() for one in others} | {shifted.fingerprint()}
    assert len(found) == 3 and all(len(one) == 16 for one in found)


def test_pairs_that_are_to_be_mirrored(tmp_path: Path, shifted: lpmflow.Matcher) -> None:
    """Both photographs are shown mirrored, so what moves 3 to the right there moves 3 to the left here."""
    picture(tmp_path / "a.png")
    points = np.array([[10.0, 20.0], [90.0, 5.0]])
    files = [tmp_path / "a.png"] * 2
    pairs = [KeypointPair("one", "cup", *files, points, points, flip=flip) for flip in (False, True)]
    known = predict(pairs, shifted, ["squash/forward"])
    straight, mirrored = known.landed(protocol("spair"))
    np.testing.assert_allclose(straight, points + (3, -2), atol=1e-4)
    np.testing.assert_allclose(mirrored, points + (-3, -2), atol=1e-4)


def test_a_process_that_fails_names_itself(tmp_path: Path, shifted: lpmflow.Matcher) -> None:
    """What the other process sees of it."""

    class Two(World):
        def gather(self, value: Any) -> list[Any]:
            return [OSError("no such photograph"), value] if not isinstance(value, dict) else [value, value]

    root = keypoints(tmp_path, THREE)
    with pytest.raises(RuntimeError, match="process 0 of 2 failed: no such photograph"):
        predict(load_pairs("spair", root, "val"), shifted, ["squash/forward"], world=Two(1, 2))
