"""Calls of an ``Embedder`` or ``Reranker`` beside one another: urgency, time limits, coroutines,
Ctrl-C, and inputs that take long."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.checkpoints import write_checkpoint
from qvlfast import BatchError, DeadlineError, Embedder, Reranker
from tests.samples import picture
from tests.stand_in import until


@pytest.fixture(scope="module")
def embedder(tiny_checkpoint: Path) -> Iterator[Embedder]:
    # Without a cache: what takes long must do so in each test.
    options = {"max_length": 20_000, "queue_tokens": 2000, "cache_bytes": 0}
    with Embedder.from_pretrained(tiny_checkpoint, **options) as made:
        yield made


LONG = "many different words make " * 1500  # more tokens than queue_tokens


def test_coroutines_get_what_calls_get(
    embedder: Embedder, caplog: pytest.LogCaptureFixture
) -> None:
    items: list[Any] = ["one", "two words", {"image": picture(64, 64)}, "x" * 50]

    async def together() -> list[Any]:
        return await asyncio.gather(
            embedder.encode_async(items, dimensions=16),
            embedder.encode_async("one", convert_to="torch"),
            embedder.encode_async(["bad", {"image": "/nowhere.png"}], on_error="return"),
            embedder.encode_async([f"text {i}" for i in range(300)]),  # more than a window
        )

    some, one, failed, many = asyncio.run(together())
    gc.collect()
    assert not caplog.records  # of futures whose error nobody looked at
    assert np.array_equal(some, embedder.encode(items, dimensions=16))
    assert np.array_equal(one.numpy(), embedder.encode("one"))
    assert list(failed.errors) == [1] and np.isfinite(failed.vectors[0]).all()
    assert np.array_equal(many, embedder.encode([f"text {i}" for i in range(300)]))


def test_a_cancelled_coroutine_gives_up_its_work(embedder: Embedder) -> None:
    before = embedder.metrics()

    async def impatient() -> None:
        await asyncio.wait_for(embedder.encode_async([LONG] * 50), timeout=0.3)

    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(impatient())
    until(lambda: embedder.metrics().preparing == embedder.metrics().waiting == 0)
    embedder.encode("one")  # comes after what was running
    after = embedder.metrics()
    assert after.cancelled > before.cancelled
    assert after.answered - before.answered < 50


def test_rerank_coroutines(tiny_checkpoint: Path) -> None:
    documents = ["one", "two", {"image": picture(64, 64)}]
    pairs = [("query", document) for document in documents]
    with Reranker.from_pretrained(tiny_checkpoint) as reranker:

        async def both() -> tuple[Any, Any]:
            return await asyncio.gather(
                reranker.rank_async("query", documents, return_documents=True),
                reranker.predict_async(pairs),
            )

        ranked, scores = asyncio.run(both())
        assert ranked == reranker.rank("query", documents, return_documents=True)
        assert np.array_equal(scores, reranker.predict(pairs))
        assert reranker.metrics().answered == 12
        with pytest.raises(ValueError, match="priority is 'now'"):
            reranker.rank("query", documents, priority="now")


def test_a_timeout_is_the_calls(embedder: Embedder) -> None:
    with pytest.raises(BatchError) as failed:
        embedder.encode(["one", *[LONG] * 30], timeout=0.1)
    assert {type(error) for error in failed.value.errors.values()} == {DeadlineError}
    with pytest.raises(DeadlineError):
        embedder.encode("one", timeout=1e-9)
    with pytest.raises(ValueError, match="timeout is 0"):
        embedder.encode("one", timeout=0)
    assert embedder.encode("one", timeout=60).shape == (embedder.dimensions,)


@pytest.mark.parametrize("priority", ["normal", "interactive"])
def test_short_calls_pass_a_long_input(embedder: Embedder, priority: Any) -> None:
    ended: dict[str, float] = {}

    def long_call() -> None:
        vectors.append(embedder.encode(LONG))
        ended["long"] = time.perf_counter()

    vectors: list[np.ndarray] = []
    before = embedder.metrics().batches
    thread = threading.Thread(target=long_call)
    thread.start()
    until(lambda: embedder.metrics().batches > before)
    short = embedder.encode("a short one", priority=priority)
    ended["short"] = time.perf_counter()
    thread.join()
    assert ended["short"] < ended["long"]
    assert np.array_equal(short, embedder.encode("a short one"))
    assert np.array_equal(vectors[0], embedder.encode(LONG))


def test_calls_wait_while_the_queue_is_full(embedder: Embedder) -> None:
    items = [LONG[: 4000 + i] for i in range(24)]
    embedder.encode(items[0])  # what is being prepared is thought to cost as much
    before = embedder.metrics().refused
    vectors = embedder.encode(items, batch_tokens=1)
    assert embedder.metrics().refused > before
    assert np.array_equal(vectors[5], embedder.encode(items[5]))


def test_a_full_queue_lets_each_call_have_a_turn(embedder: Embedder) -> None:
    embedder.encode(LONG[:4000])
    before = embedder.metrics().refused
    # Endless, so that it is there as long as the other.
    many = (LONG[: 4000 + i] for i in range(1_000_000))
    greedy, done = embedder.encode_iter(many, batch_tokens=1), threading.Event()

    def take() -> None:
        while not done.is_set():
            next(greedy)

    thread = threading.Thread(target=take)
    thread.start()
    until(lambda: embedder.metrics().refused > before)
    short = embedder.encode("a short one", timeout=60)
    assert thread.is_alive()
    done.set()
    thread.join()
    greedy.close()
    assert np.array_equal(short, embedder.encode("a short one"))


def test_ctrl_c_leaves_a_usable_object(embedder: Embedder) -> None:
    expected = embedder.encode("one")
    before = embedder.metrics()
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        embedder.encode([LONG] * 200)
    assert np.array_equal(embedder.encode("one"), expected)
    after = embedder.metrics()
    # What was under way is not finished first.
    assert after.answered - before.answered < 100
    assert after.preparing == after.waiting == 0


@pytest.mark.slow
def test_32k_tokens_in_bounded_memory(tmp_path: Path) -> None:
    """All tokens' hidden states of one feed-forward layer would be 1 GB."""
    shape = {"ffn": 8192, "layers": 2, "deepstack": (0,)}
    folder = write_checkpoint(tmp_path / "model", shape)
    program = (
        "import resource, sys, qvlfast\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "with qvlfast.Embedder.from_pretrained(sys.argv[1], max_length=40_000) as embedder:\n"
        "    embedder.encode('word ' * 1000)\n"
        "    before = peak()\n"
        "    found = embedder.encode('many different words make ' * 8000, details=True)\n"
        "    assert found.usage[0].tokens > 32_000\n"
        "    print(peak() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    # Keys and values twice, hidden states, tables and pieces are about 300 MB.
    assert int(done.stdout) < 500_000
