"""What a user of ``Embedder`` sees."""

from __future__ import annotations

import gc
import itertools
import math
import os
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qvlfast import (
    BackendError,
    BatchError,
    Embedder,
    Encoded,
    InputError,
    Reranker,
    TruncationWarning,
)
from qvlfast.engine import Engine
from qvlfast.model import drain
from qvlfast.vectors import cut
from tests.samples import Film, picture, write_film

TEXTS = ["one", "two words", "three little words"]


@pytest.fixture(scope="module")
def embedder(tiny_checkpoint: Path) -> Iterator[Embedder]:
    with Embedder.from_pretrained(tiny_checkpoint) as made:
        yield made


def test_shapes_and_unit_length(embedder: Embedder) -> None:
    vectors = embedder.encode(TEXTS)
    assert vectors.shape == (3, embedder.dimensions) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert embedder.encode("one").shape == (embedder.dimensions,)
    assert embedder.encode(["one"]).shape == (1, embedder.dimensions)
    assert embedder.encode([]).shape == (0, embedder.dimensions)
    assert embedder.encode(text for text in TEXTS).shape == (3, embedder.dimensions)
    np.testing.assert_allclose(vectors[0], embedder.encode("one"), atol=1e-6)


def test_every_form_of_one_picture_is_one_vector(embedder: Embedder, tmp_path: Path) -> None:
    image = picture(70, 50)
    path = tmp_path / "a b.png"
    image.save(path)
    forms = [image, {"image": image}, {"image": str(path)}, {"image": path}]
    forms += [{"image": path.read_bytes()}, {"image": path.as_uri()}, {"image": [image]}]
    forms += [np.asarray(image)]
    vectors = embedder.encode(forms)
    assert np.abs(vectors - vectors[0]).max() < 1e-6
    assert embedder.encode(image).shape == embedder.encode(np.asarray(image)).shape
    assert embedder.encode(image).ndim == 1


def test_matryoshka(embedder: Embedder) -> None:
    full, raw = embedder.encode(TEXTS), embedder.encode(TEXTS, normalize=False)
    short = embedder.encode(TEXTS, dimensions=16)
    expected = full[:, :16] / np.linalg.norm(full[:, :16], axis=1, keepdims=True)
    np.testing.assert_allclose(short, expected, atol=1e-6)
    assert np.abs(np.linalg.norm(raw, axis=1) - 1).min() > 0.1
    for bad in (0, -1, embedder.dimensions + 1):
        with pytest.raises(ValueError, match=f"dimensions is {bad}"):
            embedder.encode(TEXTS, dimensions=bad)


@pytest.mark.parametrize("backend", ["native", "reference", "triton"])
def test_the_model_itself_cuts_vectors(tiny_checkpoint: Path, backend: str) -> None:
    """Of what is wanted the backend's ``pool`` makes unit vectors; the host only passes it on."""
    with Embedder.from_pretrained(tiny_checkpoint, device="cpu", backend=backend) as embedder:
        ops: Any = embedder._runtime.model.ops
        pool, sizes, made = ops.pool, [], []

        def spy(*args: Any, size: int | None = None, **rest: Any) -> torch.Tensor:
            sizes.append(size)
            made.append(pool(*args, size=size, **rest))
            return made[-1]

        ops.pool = spy
        raw = embedder.encode("one", normalize=False)
        got = [embedder.encode("one", dimensions=size) for size in (None, 24, 1)]
        assert sizes == [None, embedder.dimensions, 24, 1]
        for vector, size, tensor in zip(got, sizes[1:], made[1:], strict=True):
            np.testing.assert_allclose(vector, cut(raw[None], size, True)[0], rtol=0, atol=1e-6)
            np.testing.assert_array_equal(vector, tensor[0].numpy())


def test_a_batch_may_hold_vectors_of_several_sizes(embedder: Embedder) -> None:
    """Equal inputs among them, which are computed once; each is what it is alone, bit for bit."""
    runner = embedder._runtime.served.runner
    wanted = [("one", None), ("two", 8), ("one", 8), ("three", None), ("two", 24), ("two", 8)]

    def run(some: list[tuple[str, int | None]]) -> list[np.ndarray]:
        return drain(
            runner.run([runner.ready(embedder._request(t, None)(), True, n) for t, n in some])
        )

    together = run(wanted)
    assert [len(vector) for vector in together] == [n or embedder.dimensions for _, n in wanted]
    for one, vector in zip(wanted, together, strict=True):
        np.testing.assert_array_equal(vector, run([one])[0])
    full, short = together[0], together[2]
    np.testing.assert_allclose(short, cut(full[None], 8, True)[0], rtol=0, atol=1e-6)


def test_vector_types(embedder: Embedder) -> None:
    d = embedder.dimensions
    for output, dtype, width in [
        ("int8", np.int8, d),
        ("uint8", np.uint8, d),
        ("binary", np.int8, d // 8),
        ("ubinary", np.uint8, d // 8),
    ]:
        encoded = embedder.encode(TEXTS, output=output, details=True)
        assert encoded.vectors.dtype == dtype and encoded.vectors.shape == (3, width)
        assert (encoded.scales is not None) == ("int8" in output)
        same = embedder.similarity(encoded.vectors, encoded.vectors, output)
        np.testing.assert_allclose(np.diag(same), 1, atol=1e-5)


def test_instructions(embedder: Embedder) -> None:
    default = embedder.encode("a")
    task = embedder.encode("a", "Find pictures")
    assert np.abs(default - task).max() > 1e-3
    own = embedder.encode({"text": "a", "instruction": "Find pictures"}, "Something else")
    np.testing.assert_allclose(own, task, atol=1e-6)
    for method in (embedder.encode_query, embedder.encode_document):
        np.testing.assert_allclose(method("a", instruction="Find pictures"), task, atol=1e-6)
        np.testing.assert_allclose(method(["a"])[0], default, atol=1e-6)
    np.testing.assert_allclose(embedder.encode("a", "Represent the user's input."), default)


def test_default_instruction_of_a_model(tiny_checkpoint: Path, embedder: Embedder) -> None:
    task = "Find pictures"
    with Embedder.from_pretrained(tiny_checkpoint, default_instruction=task) as other:
        np.testing.assert_allclose(other.encode("a"), embedder.encode("a", task), atol=1e-6)


def test_torch_and_the_official_method(embedder: Embedder) -> None:
    assert isinstance(embedder.encode("a", convert_to="torch"), torch.Tensor)
    vectors = embedder.process([{"text": "a"}, {"text": "b", "instruction": "c"}])
    assert vectors.shape == (2, embedder.dimensions) and vectors.dtype == torch.float32
    np.testing.assert_allclose(vectors[0].numpy(), embedder.encode("a"), atol=1e-6)


def test_details(embedder: Embedder) -> None:
    encoded = embedder.encode(["a", {"image": picture(64, 96)}, {}], details=True)
    assert isinstance(encoded, Encoded) and encoded.errors == {} and encoded.scales is None
    tokens = [u.tokens for u in encoded.usage if u]
    visual = [u.visual_tokens for u in encoded.usage if u]
    assert visual == [0, 6, 0] and tokens[1] > tokens[0] > 10


def test_truncation_is_reported_and_warned_about_once(tiny_checkpoint: Path) -> None:
    with Embedder.from_pretrained(tiny_checkpoint, max_length=40) as embedder:
        items = ["short", "long text " * 100, "long text " * 50]
        with pytest.warns(TruncationWarning, match=r"2 of 3 .*first is item 1") as caught:
            encoded = embedder.encode(items, details=True)
        assert len(caught) == 1
        lost = [u.truncated_tokens for u in encoded.usage]
        assert lost[0] == 0 and lost[1] > lost[2] > 0
        assert all(u.tokens <= 40 for u in encoded.usage)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            embedder.encode("short")
            each = list(embedder.encode_iter(items, output="int8", details=True))
        assert [e.usage[0].truncated_tokens for e in each] == lost
        whole = encoded.vectors[2]
        np.testing.assert_allclose(each[2].vectors * each[2].scales, whole, atol=0.5 / 127)
        with pytest.warns(TruncationWarning, match="item 1 was longer than max_length") as caught:
            vectors = list(embedder.encode_iter(items))
        assert len(caught) == 1 and caught[0].filename == __file__
        np.testing.assert_allclose(vectors, encoded.vectors, atol=1e-6)
    with Embedder.from_pretrained(tiny_checkpoint, max_length=40, truncate=False) as embedder:
        with pytest.raises(BatchError) as caught_error:
            embedder.encode(items)
        assert set(caught_error.value.errors) == {1, 2}
        assert "40" in str(caught_error.value.errors[1])


def test_errors_raise_after_the_good_items_are_done(embedder: Embedder) -> None:
    items = ["one", {"image": "nowhere.png"}, "two words", 7]
    with pytest.raises(BatchError, match="2 items failed") as caught:
        embedder.encode(items)
    results, errors = caught.value.results, caught.value.errors
    assert [errors[i].code for i in sorted(errors)] == ["not_found", "invalid_type"]
    assert np.isnan(results[[1, 3]]).all()
    np.testing.assert_allclose(results[[0, 2]], embedder.encode(TEXTS[:2]), atol=1e-6)
    encoded = embedder.encode(items, on_error="return")
    assert set(encoded.errors) == {1, 3} and encoded.usage[1] is None
    np.testing.assert_allclose(encoded.vectors, results, atol=1e-6)


def test_a_single_bad_input_raises_its_own_error(embedder: Embedder) -> None:
    with pytest.raises(InputError, match=r"nowhere\.png"):
        embedder.encode({"image": "nowhere.png"})
    encoded = embedder.encode({"image": "nowhere.png"}, on_error="return")
    assert np.isnan(encoded.vectors).all() and encoded.errors[0].code == "not_found"


def test_iterating_keeps_order_and_reads_a_bounded_distance_ahead(embedder: Embedder) -> None:
    read = itertools.count()
    texts = (f"text {next(read)}" for _ in itertools.repeat(None))
    stream = embedder.encode_iter(texts, dimensions=32)
    some = [next(stream) for _ in range(20)]
    stream.close()
    assert next(read) < 1000
    expected = embedder.encode([f"text {i}" for i in range(20)], dimensions=32)
    np.testing.assert_allclose(np.stack(some), expected, atol=1e-6)


def test_iterating_over_errors(embedder: Embedder) -> None:
    items: list[Any] = ["a", 5, "b"]
    found = list(embedder.encode_iter(items, on_error="return"))
    assert isinstance(found[1], InputError) and found[0].shape == found[2].shape
    stream = embedder.encode_iter(items)
    next(stream)
    with pytest.raises(InputError, match="int"):
        next(stream)


def test_an_iterable_that_fails_leaves_a_usable_object(embedder: Embedder) -> None:
    def broken() -> Iterator[str]:
        yield "a"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(embedder.encode_iter(broken()))
    assert embedder.encode("a").shape == (embedder.dimensions,)


def test_many_threads_get_their_own_vectors(embedder: Embedder) -> None:
    expected = embedder.encode([f"thread {i}" for i in range(8)])
    wrong: list[int] = []

    def client(i: int) -> None:
        for _ in range(5):
            got = embedder.encode([f"thread {i}", {"image": picture(40 + i, 40)}])
            if np.abs(got[0] - expected[i]).max() > 1e-5:
                wrong.append(i)

    threads = [threading.Thread(target=client, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_non_finite_results_are_errors(tiny_checkpoint: Path) -> None:
    with Embedder.from_pretrained(tiny_checkpoint) as embedder:
        norm = embedder._runtime.model.weights.text.norm
        with torch.inference_mode():
            broken = norm.clone().fill_(torch.nan)
        object.__setattr__(embedder._runtime.model.weights.text, "norm", broken)
        with pytest.raises(InputError, match="NaN or infinity") as caught:
            embedder.encode("a")
        assert caught.value.code == "non_finite"


@pytest.fixture
def own_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other model keeps its threads."""
    engine = Engine()
    monkeypatch.setattr("qvlfast.runtime.engine_of", lambda device: engine)


@pytest.mark.usefixtures("own_engine")
def test_closing(tiny_checkpoint: Path) -> None:
    before = threading.active_count()
    with Embedder.from_pretrained(tiny_checkpoint) as embedder:
        embedder.encode("a")
    assert threading.active_count() == before
    with pytest.raises(BackendError, match="was closed"):
        embedder.encode("a")


@pytest.mark.usefixtures("own_engine")
@pytest.mark.parametrize("used", [False, True])
def test_dropping_it_frees_the_model(tiny_checkpoint: Path, used: bool) -> None:
    before = threading.active_count()
    embedder = Embedder.from_pretrained(tiny_checkpoint)
    if used:
        embedder.encode(TEXTS)
    model = weakref.ref(embedder._runtime.model)
    del embedder
    for _ in range(100):
        gc.collect()
        if model() is None and threading.active_count() == before:
            return
        time.sleep(0.05)
    pytest.fail("the model or its threads outlive the Embedder")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "tpu"}, BackendError, "'tpu'"),
        ({"device": "cuda:99"}, BackendError, "cuda:99"),
        ({"device": "meta"}, BackendError, "not supported"),
        ({"backend": "fast"}, BackendError, "'fast' is unknown"),
        ({"dtype": "int3"}, ValueError, "'int3' is not supported"),
        ({"max_length": 0}, ValueError, "max_length is 0"),
        ({"min_pixels": 9, "max_pixels": 3}, ValueError, "min_pixels"),
        ({"fps": 0}, ValueError, "fps"),
        ({"max_frames": 1}, ValueError, "max_frames is 1: use a whole number from 2 up"),
        ({"total_pixels": 0}, ValueError, "total_pixels is 0"),
        ({"batch_tokens": 0}, ValueError, "batch_tokens is 0: use a whole number from 1 up"),
        ({"batch_tokens": 512.0}, TypeError, "batch_tokens is 512.0 of type float"),
        ({"batch_patches": "9"}, TypeError, "batch_patches is '9' of type str"),
        ({"cache_bytes": 1e9}, TypeError, "cache_bytes is 1000000000.0 of type float"),
        ({"vision_cache_bytes": -1}, ValueError, "vision_cache_bytes is -1: .* from 0 up"),
        ({"queue_tokens": 0}, ValueError, "queue_tokens is 0"),
        ({"allow_media_domains": "example.org"}, ValueError, "use a list of hosts"),
        ({"total_pixels": math.nan}, ValueError, "total_pixels is nan"),
        ({"min_pixels": "100"}, ValueError, "min_pixels is '100'"),
        ({"fps": None}, ValueError, "fps is None"),
        ({"default_instruction": 5}, InputError, "the instruction is an int"),
        ({"quantisation": "int8"}, TypeError, "quantisation"),
    ],
)
def test_bad_options_are_named(tiny_checkpoint: Path, options, error, message) -> None:
    with pytest.raises(error, match=message):
        Embedder.from_pretrained(tiny_checkpoint, **options)


def test_instructions_are_texts(embedder: Embedder) -> None:
    wrong: Any
    for wrong in (0, False, {}, b"x", "\udcff"):
        with pytest.raises(InputError, match="the instruction "):
            embedder.encode("a", wrong)
        with pytest.raises(InputError, match="the instruction "):
            next(embedder.encode_iter(["a"], wrong))


@pytest.mark.parametrize(
    ("load", "name", "advice"),
    [
        (Embedder.from_pretrained, "My-Reranker-2B", "use qvlfast.Reranker"),
        (Reranker.from_pretrained, "Some-Embedding-2B", "use qvlfast.Embedder"),
        (Embedder.from_pretrained, "Some-Embedding-2B", None),
        (Reranker.from_pretrained, "neither", None),
    ],
)
def test_a_model_of_the_other_kind(
    tiny_checkpoint: Path, tmp_path: Path, load: Any, name: str, advice: str | None
) -> None:
    folder = tmp_path / name
    folder.symlink_to(tiny_checkpoint)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load(folder).close()
    found = [w for w in caught if "by its name" in str(w.message)]
    assert [w.filename for w in found] == [__file__] * (advice is not None)
    assert all(str(folder) in str(w.message) and advice in str(w.message) for w in found)


def test_a_cpu_has_no_number(tiny_checkpoint: Path, embedder: Embedder) -> None:
    with Embedder.from_pretrained(tiny_checkpoint, device="cpu:0") as other:
        assert other._runtime.engine is embedder._runtime.engine


@pytest.mark.parametrize(
    "options", [{"output": "int4"}, {"on_error": "ignore"}, {"convert_to": "jax"}]
)
def test_bad_choices_are_named(embedder: Embedder, options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name} is '{value}'"):
        embedder.encode("a", **options)
    with pytest.raises(TypeError):
        embedder.encode("a", unknown=1)


def test_a_long_video_is_fitted_to_the_length_limit_and_says_so(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / "film.mp4"
    write_film(path, Film(width=512, height=512, count=32, fps=Fraction(8)))
    item = {"video": path, "text": "some words", "max_frames": 16, "fps": 4.0}
    small = {"max_length": 100_000, "total_pixels": 16 * 150_000 // 2}
    with Embedder.from_pretrained(tiny_checkpoint, **small) as embedder:
        usage = embedder.encode(item, details=True).usage[0]
        bare = len(embedder._prepare({**item, "text": ""}, None).ids)
        assert not usage.video_reduced
    with Embedder.from_pretrained(tiny_checkpoint, **{**small, "max_length": bare}) as embedder:
        with pytest.warns(TruncationWarning):
            exact = embedder.encode(item, details=True).usage[0]
        assert not exact.video_reduced and exact.truncated_tokens > 0
        assert exact.visual_tokens == usage.visual_tokens
    limit = {**small, "max_length": bare - 1}
    with Embedder.from_pretrained(tiny_checkpoint, **limit) as embedder:
        reduced = embedder.encode(item, details=True).usage[0]
        assert reduced.video_reduced and reduced.truncated_tokens == 0
        assert reduced.visual_tokens < usage.visual_tokens


@pytest.mark.parametrize("waiting", [False, True])
def test_a_program_that_does_not_close_it_ends_well(tiny_checkpoint: Path, waiting: bool) -> None:
    """Also with work under way, which is dropped."""
    program = (
        "import sys, numpy, qvlfast\n"
        "embedder = qvlfast.Embedder.from_pretrained(sys.argv[1])\n"
        "picture = numpy.zeros((512, 512, 3), numpy.uint8)\n"
        "assert embedder.encode([picture, 'a']).shape == (2, 128)\n"
    )
    if waiting:
        program += "runtime = embedder._runtime\n"
        program += "request = embedder._request(picture, None)\n"
        program += "[runtime.engine.submit(runtime.served, request) for _ in range(50)]\n"
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", program, str(tiny_checkpoint)],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
