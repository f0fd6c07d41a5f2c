"""The user's door, through a fake network with known answers and, at the end, through the real one."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lpmflow
from lpmflow import matcher as door
from lpmflow.matcher import Matcher

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def forget_loaded_models():
    door._cached.cache_clear()
    yield
    door._cached.cache_clear()


@pytest.fixture
def embedded_fake(monkeypatch, make_fake_model):
    """Every preset's weights are there, and loading them is counted and gives a fake."""
    loaded = []

    def load(path, **overrides):
        loaded.append(Path(path).name)
        return make_fake_model()

    monkeypatch.setattr("lpmflow.model.embedded_weights", lambda name: Path(f"{name}.safetensors"))
    monkeypatch.setattr("lpmflow.model.load_checkpoint", load)
    return loaded


# What comes out


def test_identical_images_have_no_flow(fake_model, photo):
    match = Matcher(fake_model, "cpu")(photo, photo)
    assert not match.flow.any()
    np.testing.assert_array_equal(match.warp(), photo)


def test_a_known_shift_and_scale_come_out_in_original_pixels(make_fake_model):
    """3 cells right and 2 up of 96, between images of one colour, 40 x 60 and 80 x 240."""
    match = Matcher(make_fake_model((3.0, -2.0)), "cpu")(np.zeros((40, 60), np.uint8), np.zeros((80, 240), np.uint8))
    x, y = np.meshgrid(np.arange(60), np.arange(40))
    target = np.stack(((x + 0.5) * 4 - 0.5 + 3 * 240 / 96, (y + 0.5) * 2 - 0.5 - 2 * 80 / 96), axis=-1)
    np.testing.assert_allclose(np.stack((x, y), axis=-1) + match.flow, target, atol=1e-4)
    np.testing.assert_allclose(match.transfer([(10.25, 3.5)]), [(43 - 0.5 + 7.5, 8 - 0.5 - 2 * 80 / 96)], atol=1e-5)


def test_a_flip_of_coordinates_comes_out_as_a_mirror(make_fake_model, photo):
    u = torch.arange(96.0)
    flow = torch.stack(((95 - 2 * u).expand(96, 96), torch.zeros(96, 96)))
    match = Matcher(make_fake_model(grid_flow=flow), "cpu")(photo, photo)
    np.testing.assert_array_equal(match.warp(), photo[:, ::-1])
    np.testing.assert_allclose(match.transfer([(10.25, 7)]), [(48.75, 7)], atol=1e-4)


def test_the_sizes_the_images_and_the_maps(fake_model, photo, other_photo):
    match = Matcher(fake_model, "cpu")(photo, other_photo)
    assert (match.src_size, match.tgt_size) == ((40, 60), (33, 25))
    np.testing.assert_array_equal(match.source, photo)
    np.testing.assert_array_equal(match.target, other_photo)
    assert match.confidence.shape == (40, 60) and match.foreground.shape == (40, 60)
    bright = match.foreground.ravel() - match.foreground.mean()
    gray = photo.mean(axis=2).ravel() - photo.mean()
    assert (bright * gray).mean() / (bright.std() * gray.std()) > 0.9


def test_how_the_network_is_called(fake_model, photo):
    fake_model.train()
    matcher = Matcher(fake_model, "cpu")
    assert matcher.model is fake_model and not fake_model.training
    matcher(photo, photo)
    assert fake_model.calls == [
        {
            "shape": (1, 3, 192, 192),
            "training": False,
            "inference": True,
            "autocast": None,
            "computed_in": torch.float32,
        }
    ]


def test_a_model_put_back_into_training_mode_does_not_answer(fake_model, photo):
    matcher = Matcher(fake_model, "cpu")
    fake_model.train()
    with pytest.raises(RuntimeError, match="was put back into training mode"):
        matcher(photo, photo)


def test_images_are_squashed_to_the_input_size(make_fake_model, photo):
    model = make_fake_model(input_size=(64, 96))
    Matcher(model, "cpu")(photo, photo)
    assert model.calls[0]["shape"] == (1, 3, 64, 96)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", torch.bfloat16, torch.float16])
def test_half_precision(fake_model, photo, other_photo, dtype):
    match = Matcher(fake_model, "cpu", dtype)(photo, other_photo)
    assert str(fake_model.calls[0]["computed_in"]).endswith(str(dtype).removeprefix("torch."))
    full = Matcher(fake_model, "cpu")(photo, other_photo)
    assert match.flow.dtype == np.float32
    np.testing.assert_allclose(match.flow, full.flow, atol=0.05)


def test_files_pil_and_arrays_give_the_same(fake_model, photo, other_photo, tmp_path):
    matcher = Matcher(fake_model, "cpu")
    Image.fromarray(photo).save(tmp_path / "a.png")
    expected = matcher(photo, other_photo)
    for source in (tmp_path / "a.png", Image.fromarray(photo), torch.from_numpy(photo).permute(2, 0, 1)):
        np.testing.assert_array_equal(matcher(source, other_photo).flow, expected.flow)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1)])
def test_tiny_and_thin_images(fake_model, photo, size):
    thin = np.zeros(size, np.uint8)
    matcher = Matcher(fake_model, "cpu")
    assert matcher(thin, photo).flow.shape == (*size, 2)
    assert matcher(photo, thin).flow.shape == (40, 60, 2)


def test_a_very_large_image(fake_model, photo):
    match = Matcher(fake_model, "cpu")(np.zeros((4000, 6000), np.uint8), photo)
    assert match.src_size == (4000, 6000)
    shifted = match.grid_flow[:, 0, 0] * np.array([60, 40]) / 96
    assert match.transfer([(5999.5, 3999.5)])[0] == pytest.approx([59.5, 39.5] + shifted, abs=1e-4)


# Batches


def test_a_batch_is_the_same_as_one_by_one(fake_model, photo, other_photo):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((9, 30), (50, 7), (1, 1), (33, 33))]
    images += [photo, other_photo]
    pairs = [(a, b) for a, b in zip(images, images[1:] + images[:1], strict=True)] + [(photo, photo)]
    matcher = Matcher(fake_model, "cpu")
    expected = [matcher(*pair) for pair in pairs]
    for batch_size in (1, 3, 7, 100):
        fake_model.calls.clear()
        found = matcher.batch(pairs, batch_size=batch_size)
        assert [call["shape"][0] for call in fake_model.calls] == [
            min(batch_size, 7 - start) for start in range(0, 7, batch_size)
        ]
        for one, other in zip(found, expected, strict=True):
            assert (one.src_size, one.tgt_size) == (other.src_size, other.tgt_size)
            np.testing.assert_allclose(one.flow, other.flow, atol=1e-4)
            np.testing.assert_allclose(one.confidence, other.confidence, atol=1e-5)
            np.testing.assert_allclose(one.foreground, other.foreground, atol=1e-5)


def test_no_pairs_is_no_match(fake_model):
    assert Matcher(fake_model, "cpu").batch([]) == []
    assert not fake_model.calls


def test_a_generator_is_read_as_needed(fake_model, photo):
    drawn = []

    def pairs():
        for index in range(5):
            drawn.append((index, len(fake_model.calls)))
            yield photo, photo

    assert len(Matcher(fake_model, "cpu").batch(pairs(), batch_size=2)) == 5
    assert drawn == [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2)]


def test_matches_of_one_batch_do_not_hold_on_to_it(fake_model, photo):
    matches = Matcher(fake_model, "cpu").batch([(photo, photo)] * 3)
    assert all(match.grid_flow.base is None for match in matches)


@pytest.mark.parametrize(("value", "kind"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_batch_sizes_that_make_no_sense(fake_model, photo, value, kind):
    with pytest.raises(kind, match="batch_size must be "):
        Matcher(fake_model, "cpu").batch([(photo, photo)], batch_size=value)


def test_what_is_no_pair_is_named(fake_model, photo):
    matcher = Matcher(fake_model, "cpu")
    with pytest.raises(TypeError, match="pairs must be an iterable of \\(source, target\\), got str"):
        matcher.batch("ab")
    with pytest.raises(TypeError, match="pairs must be an iterable"):
        matcher.batch(3)
    with pytest.raises(TypeError, match=r"pairs\[1\] must be a pair \(source, target\), got ndarray"):
        matcher.batch([(photo, photo), photo])
    with pytest.raises(ValueError, match=r"pairs\[2\] must be a pair \(source, target\), got 3 elements"):
        matcher.batch([(photo, photo)] * 2 + [(photo, photo, photo)])


def test_the_image_at_fault_is_named(fake_model, photo):
    matcher = Matcher(fake_model, "cpu")
    pairs = [(photo, photo)] * 3 + [(photo, "missing.png")]
    for batch_size in (1, 2, 8):
        with pytest.raises(FileNotFoundError, match=r"pairs\[3\]\[1\] must be the path .*'missing\.png'"):
            matcher.batch(pairs, batch_size=batch_size)
    with pytest.raises(ValueError, match="src must be finite"):
        matcher(np.full((4, 4), np.nan), photo)
    with pytest.raises(TypeError, match="tgt must be a path, a PIL image"):
        matcher(photo, None)


def test_an_answer_that_is_not_finite_is_an_error(fake_model, photo):
    matcher = Matcher(fake_model, "cpu")
    with torch.no_grad():
        fake_model.grid_flow[0, 5, 5] = torch.nan
    with pytest.raises(RuntimeError, match="the network's answer for src and tgt is not finite"):
        matcher(photo, photo)
    with pytest.raises(RuntimeError, match=r"the network's answer for pairs\[0\] is not finite"):
        matcher.batch([(photo, photo)])


# match


def test_match_loads_a_preset_once(embedded_fake, photo):
    for _ in range(3):
        assert not lpmflow.match(photo, photo, device="cpu").flow.any()
    assert embedded_fake == ["lpmflow-tiny.safetensors"]
    lpmflow.match(photo, photo, model="lpmflow-tiny", device=torch.device("cpu"), dtype="float32")
    assert embedded_fake == ["lpmflow-tiny.safetensors"]
    lpmflow.match(photo, photo, device="cpu", dtype="bfloat16")
    lpmflow.match(photo, photo, device="cpu", dtype=torch.bfloat16)
    assert embedded_fake == ["lpmflow-tiny.safetensors"] * 2
    lpmflow.match(photo, photo, model="lpmflow-base", device="cpu")
    assert embedded_fake[2:] == ["lpmflow-base.safetensors"]


def test_match_from_many_threads_loads_once(embedded_fake, photo):
    flows = []
    threads = [
        threading.Thread(target=lambda: flows.append(lpmflow.match(photo, photo, device="cpu").flow)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(flows) == 4 and not any(flow.any() for flow in flows)
    assert embedded_fake == ["lpmflow-tiny.safetensors"]


def test_match_takes_a_model(make_fake_model, photo):
    found = lpmflow.match(photo, photo, model=make_fake_model((9.6, 0.0)), device="cpu")
    np.testing.assert_allclose(found.flow[..., 0], 6.0, atol=1e-5)


def test_match_refuses_what_the_matcher_refuses(photo):
    with pytest.raises(ValueError, match="device must be .*cpu.*, got 'tpu'"):
        lpmflow.match(photo, photo, device="tpu")
    with pytest.raises(ValueError, match="dtype must be one of"):
        lpmflow.match(photo, photo, dtype="int4")
    with pytest.raises(ValueError, match="model must be one of"):
        lpmflow.match(photo, photo, model="lpmflow-huge")


def test_importing_the_matcher_does_not_import_the_model():
    program = "import sys, lpmflow.matcher; assert 'lpmflow.model' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_the_public_names():
    assert set(lpmflow.__all__) <= set(dir(lpmflow))
    for name in lpmflow.__all__:
        assert getattr(lpmflow, name) is not None
    assert callable(lpmflow.match) and lpmflow.Matcher is Matcher
    assert lpmflow.ops.__name__ == "lpmflow.ops"
    with pytest.raises(AttributeError, match="module 'lpmflow' has no attribute 'mtach'"):
        lpmflow.mtach  # noqa: B018


def test_match_stays_a_function_after_every_import():
    program = """
import pkgutil, importlib, lpmflow
for found in (one for one in pkgutil.iter_modules(lpmflow.__path__) if one.name != "__main__"):
    importlib.import_module(f"lpmflow.{found.name}")
assert callable(lpmflow.match) and isinstance(lpmflow.Match, type)
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


# The embedded weights


@pytest.fixture(scope="module")
def embedded_matcher():
    return Matcher(device="cpu")


@pytest.fixture(scope="module")
def cat():
    data = pytest.importorskip("skimage.data", reason="scikit-image's photographs are not installed")
    return data.chelsea()


def test_embedded_identical_photographs_have_nearly_no_flow(embedded_matcher, cat):
    match = embedded_matcher(cat, cat)
    error = np.linalg.norm(match.flow, axis=-1)
    assert np.median(error) < 0.02 * max(match.src_size)


def test_embedded_shifted_photograph(embedded_matcher, cat):
    """Two crops of one photograph, 30 pixels apart: away from the new border the flow says so."""
    match = embedded_matcher(cat[:, :-30], cat[:, 30:])
    error = np.linalg.norm(match.flow - [-30, 0], axis=-1)[40:-40, 80:-40]
    assert np.median(error) < 0.03 * max(match.src_size)


def test_embedded_half_precision_agrees(embedded_matcher, cat):
    full = embedded_matcher(cat, cat[:, 30:])
    half = Matcher(device="cpu", dtype="bfloat16")(cat, cat[:, 30:])
    assert np.median(np.linalg.norm(full.flow - half.flow, axis=-1)) < 0.02 * max(full.src_size)


def test_the_embedded_network_at_another_size(photo):
    matcher = Matcher(device="cpu", image_size=256)
    assert matcher.model.config.image_size == matcher.model.config.input_size == (256, 256)
    match = matcher(photo, photo)
    assert np.abs(match.flow).mean() < 0.02 * max(photo.shape[:2])
    again = lpmflow.match(photo, photo, device="cpu", image_size=(256, 256))
    np.testing.assert_allclose(again.flow, match.flow, atol=1e-3)


@pytest.mark.parametrize(
    ("size", "wanted"),
    [(100, "image_size must be a multiple of patch_size 16"), (0, "image_size must be a positive integer")],
)
def test_sizes_that_make_no_sense(size, wanted):
    with pytest.raises(ValueError, match=wanted):
        Matcher(device="cpu", image_size=size)


def test_a_loaded_model_has_its_size(fake_model):
    with pytest.raises(ValueError, match="image_size must be None for a model that is loaded already"):
        Matcher(fake_model, "cpu", image_size=256)


@pytest.fixture
def quick_compiler(monkeypatch):
    """`torch.compile` without the compiler behind it: graphs are traced and run as they are. One entry a graph."""
    graphs, real = [], torch.compile

    def record(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def compile(model, **options):
        assert options.pop("mode") is None
        return real(model, backend=record, **options)

    monkeypatch.setattr(torch, "compile", compile)
    yield graphs
    torch._dynamo.reset()


def test_compiled_is_one_graph_and_answers_alike(quick_compiler, photo, other_photo):
    plain = Matcher(image_size=96, device="cpu")
    compiled = Matcher(image_size=96, device="cpu", compile=True)
    for pair in ((photo, other_photo), (other_photo, photo)):
        found, wanted = compiled(*pair), plain(*pair)
        np.testing.assert_allclose(found.flow, wanted.flow, atol=1e-2)
    assert len(quick_compiler) == 1


def test_a_compiled_batch_is_filled_up(quick_compiler, photo, other_photo):
    pairs = [(photo, other_photo), (other_photo, photo), (photo, photo)]
    plain = Matcher(image_size=96, device="cpu").batch(pairs, batch_size=2)
    compiled = Matcher(image_size=96, device="cpu", compile=True).batch(pairs, batch_size=2)
    assert len(compiled) == 3 and len(quick_compiler) == 1
    for found, wanted in zip(compiled, plain, strict=True):
        np.testing.assert_allclose(found.flow, wanted.flow, atol=1e-2)


def test_compile_is_yes_or_no(fake_model):
    with pytest.raises(TypeError, match="compile must be True or False, got str"):
        Matcher(fake_model, compile="reduce-overhead")


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_for_real(photo, other_photo):
    found = Matcher(image_size=96, device="cpu", compile=True)(photo, other_photo)
    wanted = Matcher(image_size=96, device="cpu")(photo, other_photo)
    np.testing.assert_allclose(found.flow, wanted.flow, atol=1e-2)
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_on_the_gpu_is_graphs(photo, other_photo, dtype):
    matcher, plain = (Matcher(dtype=dtype, device="cuda", compile=compile) for compile in (True, False))
    for pair in ((photo, other_photo), (other_photo, photo), (photo, other_photo), (other_photo, photo)):
        difference = np.abs(matcher(*pair).flow - plain(*pair).flow)
        assert difference.mean() < (1e-2 if dtype == "float32" else 1.0)
