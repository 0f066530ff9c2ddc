"""One input or many, whatever callers pass for them; and objects that are used in odd ways."""

from __future__ import annotations

import asyncio
import copy
import gc
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageSequence

from qvlfast import Embedder, Reranker, TruncationWarning
from qvlfast.errors import InputError
from qvlfast.gallery import EMBEDDER, RERANKER
from qvlfast.request import Terms
from tests.stand_in import Serving, prompt

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def embedder() -> Iterator[Embedder]:
    with Embedder.from_pretrained(EMBEDDER, max_length=600) as made:
        yield made


@pytest.fixture(scope="module")
def reranker() -> Iterator[Reranker]:
    with Reranker.from_pretrained(RERANKER) as made:
        yield made


def shades() -> list[np.ndarray]:
    return [np.full((32, 32, 3), 12 * i, np.uint8) for i in range(20)]


def same_array() -> Iterator[Any]:
    buffer = np.zeros((32, 32, 3), np.uint8)
    for shade in shades():
        buffer[:] = shade
        yield buffer


def same_picture() -> Iterator[Any]:
    picture = Image.new("RGB", (32, 32))
    for shade in shades():
        picture.paste(Image.fromarray(shade))
        yield picture


def same_dict() -> Iterator[Any]:
    item: dict[str, Any] = {}
    for shade in shades():
        item["image"] = [shade]
        yield item


def same_bytes() -> Iterator[Any]:
    pictures = []
    for shade in shades():
        file = io.BytesIO()
        Image.fromarray(shade).save(file, "BMP")  # all of one size
        pictures.append(file.getvalue())
    buffer = bytearray(len(pictures[0]))
    for picture in pictures:
        buffer[:] = picture
        yield {"image": buffer if buffer[-1] % 2 else memoryview(buffer)}


class Reader:
    """Reads into one array, again for each that asks."""

    def __iter__(self) -> Iterator[Any]:
        return same_array()


@pytest.mark.parametrize("reused", [same_array, same_picture, same_dict, same_bytes, Reader])
def test_a_generator_may_use_its_object_again(
    embedder: Embedder, reused: Callable[[], Iterable[Any]]
) -> None:
    expected = embedder.encode(shades())
    assert len(np.unique(expected.round(4), axis=0)) == len(expected)
    for found in (list(embedder.encode_iter(reused())), embedder.encode(reused())):
        np.testing.assert_array_equal(found, expected)


def test_frames_of_one_animation(embedder: Embedder, tmp_path: Path) -> None:
    frames = [Image.fromarray(shade) for shade in shades()]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    with Image.open(tmp_path / "a.webp") as animation:
        found = list(embedder.encode_iter(ImageSequence.Iterator(animation)))
    np.testing.assert_array_equal(found, embedder.encode(frames))


def test_opened_pictures_are_what_they_are_in_a_list(embedder: Embedder) -> None:
    levels = np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 60
    files = []
    for format in ("PNG", "TIFF", "PPM", "JPEG"):
        file = io.BytesIO()
        Image.fromarray(levels if format != "JPEG" else levels.astype(np.uint8)).save(file, format)
        files.append(file)
    damaged = io.BytesIO(files[3].getvalue()[:-200])
    found = list(
        embedder.encode_iter((Image.open(f) for f in (*files, damaged)), on_error="return")
    )
    np.testing.assert_array_equal(
        found[:4], embedder.encode([{"image": f.getvalue()} for f in files])
    )
    assert isinstance(found[4], InputError) and found[4].code == "unreadable"


def test_a_deep_value_from_a_generator_is_an_items_error(embedder: Embedder) -> None:
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    found = list(embedder.encode_iter(iter([{"image": deep}, "good"]), on_error="return"))
    assert isinstance(found[0], InputError) and found[1].shape == (embedder.dimensions,)


def test_frames_of_videos_are_copied(embedder: Embedder) -> None:
    frames = [shade.copy() for shade in shades()[:4]]

    def videos() -> Iterator[Any]:
        yield {"video": [frames[:2], frames[2:]]}
        for frame in frames:
            frame[:] = 255
        yield "text"

    expected = embedder.encode({"video": [shades()[:2], shades()[2:4]]})
    np.testing.assert_array_equal(next(embedder.encode_iter(videos())), expected)


def test_one_where_many_are_due(embedder: Embedder, reranker: Reranker) -> None:
    picture = shades()[0]
    calls: list[Callable[[], Any]] = [
        lambda: list(embedder.encode_iter("hello")),
        lambda: embedder.process({"text": "a"}),  # type: ignore[arg-type]
        lambda: embedder.process("abc"),  # type: ignore[arg-type]
        lambda: reranker.rank("pizza", "cat"),
        lambda: reranker.rank("pizza", {"text": "cat"}),  # type: ignore[arg-type]
        lambda: reranker.rank("pizza", picture),  # type: ignore[arg-type]
        lambda: reranker.process({"query": "a", "documents": "bcd"}),
        lambda: reranker.predict("pizza"),
        lambda: reranker.rank("pizza", 5),  # type: ignore[arg-type]
    ]
    for call in calls:
        with pytest.raises(TypeError, match="pass a list of inputs"):
            call()
    for wrong in (None, 5, Path("a.png")):
        with pytest.raises(TypeError, match="pass a string, a picture, a dict"):
            embedder.encode(wrong)


def test_arrays_of_strings_are_lists(embedder: Embedder) -> None:
    found = embedder.encode(np.array(["a", "b"]))
    np.testing.assert_array_equal(found, embedder.encode(["a", "b"]))


def test_pairs(reranker: Reranker) -> None:
    pairs = [("pizza", "cat"), ("pizza", "slice"), ("dog", "cat")]
    scores = reranker.predict(pairs)
    for one in (pairs[0], list(pairs[0])):
        assert reranker.predict(one) == scores[0]
    for two in (pairs[:2], tuple(pairs[:2]), [list(pair) for pair in pairs[:2]]):
        assert reranker.predict(two).tolist() == scores[:2].tolist()
    assert reranker.predict(np.array(pairs)).tolist() == scores.tolist()


def test_those_that_failed_come_after_the_best(reranker: Reranker) -> None:
    results = reranker.rank("pizza", ["cat", None, "slice"], top_k=1, on_error="return")
    assert [set(result) for result in results] == [{"index", "score"}, {"index", "score", "error"}]
    assert results[1]["index"] == 1 and np.isnan(results[1]["score"])


def test_the_script_reads_the_querys_picture_once(
    reranker: Reranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    usual = reranker._runtime.load_media
    monkeypatch.setattr(
        reranker._runtime,
        "load_media",
        lambda item, rest: (read.append(item), usual(item, rest))[1],
    )
    query = {"image": Image.fromarray(shades()[3])}
    documents = [{"text": "cat"}, {"text": "dog"}, {"text": "red"}]
    scores = reranker.process({"query": query, "documents": documents})
    assert sum(bool(item.images) for item in read) == 1
    assert scores == reranker.predict([(query, document) for document in documents]).tolist()
    with pytest.raises(InputError):
        reranker.process({"query": {"image": b"no picture"}, "documents": documents})


@pytest.mark.parametrize("wrong", [64.0, True, "64"])
def test_dimensions_of_another_type(embedder: Embedder, wrong: Any) -> None:
    with pytest.raises(TypeError, match="dimensions is"):
        embedder.encode("a", dimensions=wrong)


def test_dimensions_from_numpy(embedder: Embedder) -> None:
    size: Any = np.int64(16)
    assert embedder.encode("a", dimensions=size).shape == (16,)


def test_an_iteration_warns_once_of_cut_texts(embedder: Embedder) -> None:
    with pytest.warns(TruncationWarning) as caught:
        assert len(list(embedder.encode_iter(["word " * 1000] * 3))) == 3
    assert len(caught) == 1


def test_a_client_is_hashable(embedder: Embedder) -> None:
    with pytest.raises(TypeError, match=r"client is \['tenant', 1\]"):
        embedder.encode("a", client=["tenant", 1])  # type: ignore[arg-type]
    assert embedder.metrics().preparing == 0


def test_what_is_interrupted_while_it_is_submitted_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    serving = Serving()
    assert serving.submit(lambda: prompt(1)).result(10).value[0] == 1

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    assert serving.engine._host is not None
    with monkeypatch.context() as patch:
        patch.setattr(serving.engine._host, "submit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            serving.submit(lambda: prompt(2), Terms())
    assert serving.metrics().preparing == 0
    assert serving.submit(lambda: prompt(3)).result(10).value[0] == 3
    serving.close()


@pytest.mark.parametrize("of", [pickle.dumps, copy.deepcopy])
def test_no_copies(embedder: Embedder, of: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match="cannot be pickled or copied"):
        of(embedder)


def test_classes_are_made_by_from_pretrained() -> None:
    for kind in (Embedder, Reranker):
        with pytest.raises(TypeError, match=rf"use {kind.__name__}.from_pretrained"):
            kind("a folder")  # type: ignore[arg-type]


def test_a_cancelled_coroutine_leaves_no_complaint(embedder: Embedder) -> None:
    complaints: list[dict[str, Any]] = []
    cancelled: list[bool] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, c: complaints.append(c))
        for i in range(5):
            texts = [f"text {i} {j}" for j in range(50)]
            task = asyncio.create_task(embedder.encode_async(texts))
            await asyncio.sleep(0.002 * i)
            task.cancel()
            done, _ = await asyncio.wait([task])
            cancelled.extend(one.cancelled() for one in done)
        await asyncio.to_thread(embedder.encode, "after them")
        gc.collect()

    asyncio.run(main())
    gc.collect()
    assert complaints == [] and cancelled[0]


def python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "program",
    [
        "Embedder.from_pretrained(EMBEDDER, backend=BACKEND).encode(['pizza'])",
        "model = Embedder.from_pretrained(EMBEDDER, backend=BACKEND)\n"
        "model.encode(['pizza'])\n"
        "del model",
    ],
)
def test_a_program_ends_well_after_dropping_a_model(program: str, backend: str) -> None:
    """Threads of a model that is gone do not outlive the interpreter."""
    start = "from qvlfast import Embedder\nfrom qvlfast.gallery import EMBEDDER\n"
    for _ in range(2):
        done = python(
            f"{start}BACKEND = {backend!r}\n{program}", OMP_NUM_THREADS="1", QVLFAST_THREADS="1"
        )
        assert (done.returncode, done.stderr) == (0, "")


def test_a_wrong_instruction_set_is_told_at_load() -> None:
    program = (
        "from qvlfast import BackendError, Embedder\n"
        "from qvlfast.gallery import EMBEDDER\n"
        "try:\n"
        "    Embedder.from_pretrained(EMBEDDER)\n"
        "except BackendError as error:\n"
        "    print(error)\n"
    )
    done = python(program, QVLFAST_ISA="avx3")
    assert "QVLFAST_ISA=avx3" in done.stdout and done.returncode == 0, done.stderr
