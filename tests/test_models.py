"""Several models in the engine of a device: one queue, one thread, and no one in another's way."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qvlfast import Embedder, Reranker
from qvlfast.engine import Engine, engine_of
from qvlfast.errors import BackendError
from qvlfast.request import Terms
from qvlfast.runner import Sharing
from tests.stand_in import Serving, prompt, runner_of, until


@pytest.fixture
def models() -> Iterator[tuple[Serving, Serving]]:
    engine = Engine(host_threads=2)
    sharing = Sharing(prefixes=True, cache_bytes=1 << 20)
    one, other = Serving(sharing=sharing, engine=engine), Serving(sharing=sharing, engine=engine)
    yield one, other
    for serving in (one, other):
        serving.model.gate.set()
        serving.close()


def test_an_urgent_request_to_one_passes_the_bulk_job_of_another(
    models: tuple[Serving, Serving],
) -> None:
    bulk, other = models
    order: list[str] = []
    bulk.model.gate.clear()
    jobs = [
        bulk.submit(lambda i=i: prompt(*range(i, i + 40)), Terms(priority="bulk")) for i in range(3)
    ]
    until(lambda: len(bulk.model.begun) == 1 and bulk.metrics().waiting == 2)
    urgent = other.submit(lambda: prompt(1, 2), Terms(priority="interactive"))
    until(lambda: other.metrics().waiting == 1)
    assert not other.model.begun, "two batches at once"
    for future in (*jobs, urgent):
        future.add_done_callback(lambda f: order.append("urgent" if f is urgent else "bulk"))
    bulk.model.gate.set()
    assert urgent.result(10).value[0] == 2
    assert [job.result(10).value[0] for job in jobs] == [39, 40, 41]
    assert order == ["urgent", "bulk", "bulk", "bulk"]


def test_batches_are_of_one_model(models: tuple[Serving, Serving]) -> None:
    one, other = models
    one.model.gate.clear()
    held = one.submit(lambda: prompt(1))
    until(lambda: len(one.model.begun) == 1)
    futures = [models[i % 2].submit(lambda i=i: prompt(10 + i)) for i in range(8)]
    until(lambda: one.metrics().waiting == other.metrics().waiting == 4)
    one.model.gate.set()
    assert [f.result(10).value[0] for f in (held, *futures)] == [1, *range(10, 18)]
    assert sorted(one.model.begun[1]) == [10, 12, 14, 16]
    assert sorted(other.model.begun[0]) == [11, 13, 15, 17]


def test_one_that_is_closed_leaves_the_other() -> None:
    before = threading.active_count()
    engine = Engine(host_threads=2)
    one, other = Serving(engine=engine), Serving(engine=engine)
    for serving in (one, other):
        assert serving.submit(lambda: prompt(5)).result(10).value[0] == 5
    one.close()
    with pytest.raises(BackendError, match="was closed"):
        one.submit(lambda: prompt(1))
    assert other.submit(lambda: prompt(6)).result(10).value[0] == 6
    other.close()
    assert threading.active_count() == before
    later = Serving(engine=engine)
    assert later.submit(lambda: prompt(7)).result(10).value[0] == 7
    later.close()
    assert threading.active_count() == before and not engine._models


def test_a_model_that_was_never_asked_closes() -> None:
    engine = Engine()
    one, other = Serving(engine=engine), Serving(engine=engine)
    one.close()
    one.close()
    other.close()
    engine.abandon()
    assert not engine._models


def test_closing_one_waits_for_its_own_answers_only(models: tuple[Serving, Serving]) -> None:
    one, other = models
    assert one.submit(lambda: prompt(4)).result(10).value[0] == 4
    other.model.gate.clear()
    held = other.submit(lambda: prompt(1))
    until(lambda: len(other.model.begun) == 1)
    one.close()  # returns, though the other is at work
    assert not held.done()
    other.model.gate.set()
    assert held.result(10).value[0] == 1


def test_memory_is_freed_for_all_and_one_budget_shrinks(models: tuple[Serving, Serving]) -> None:
    one, other = models
    assert other.submit(lambda: prompt(1)).result(10).value[0] == 1
    assert other.metrics().answer_cache.entries == 1
    assert one.submit(lambda: prompt(902)).result(10).value[0] == 902
    assert other.metrics().answer_cache.entries == 0
    assert (one.metrics().budget_tokens, other.metrics().budget_tokens) == (20, 40)
    assert (one.metrics().memory_faults, other.metrics().memory_faults) == (1, 0)


def test_a_fault_in_the_engines_thread_is_told_to_all(
    models: tuple[Serving, Serving], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = models
    one.model.gate.clear()
    first = one.submit(lambda: prompt(1))
    until(lambda: len(one.model.begun) == 1)
    lost = [serving.submit(lambda: prompt(2)) for serving in models]
    until(lambda: one.metrics().waiting == other.metrics().waiting == 1)

    def broken(*_: Any, **__: Any) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr(one.engine._scheduler, "pop", broken)
    one.model.gate.set()
    for future in lost:
        with pytest.raises(AssertionError, match="a bug"):
            future.result(10)
    assert first.result(10).value[0] == 1
    for serving in models:
        assert serving.submit(lambda: prompt(3)).result(10).value[0] == 3
        assert serving.metrics().waiting == serving.metrics().preparing == 0


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_has_them_all(models: tuple[Serving, Serving]) -> None:
    closed = Serving(engine=models[0].engine)
    for serving in (*models, closed):
        assert serving.submit(lambda: prompt(1)).result(10).value[0] == 1
    closed.close()
    child = os.fork()
    if child == 0:
        answers = [serving.submit(lambda: prompt(7)).result(10).value[0] for serving in models]
        os._exit(0 if answers == [7, 7] and len(models[0].engine._models) == 2 else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_device_has_one_engine() -> None:
    cpu = engine_of(torch.device("cpu"))
    assert engine_of(torch.device("cpu")) is cpu
    assert engine_of(torch.device("cuda", 0)) is not cpu


def test_both_classes_at_once(tiny_checkpoint: Path) -> None:
    """The same values as one after the other, and one engine."""
    texts = [f"a text that goes on and on, number {i}" for i in range(12)]
    with (
        Embedder.from_pretrained(tiny_checkpoint, cache_bytes=0) as embedder,
        Reranker.from_pretrained(tiny_checkpoint, cache_bytes=0) as reranker,
    ):
        assert embedder._runtime.engine is reranker._runtime.engine
        assert runner_of(embedder) is not runner_of(reranker)
        vectors = embedder.encode(texts)
        scores = reranker.predict([("a query", text) for text in texts])
        found: dict[str, Any] = {}

        def embed() -> None:
            found["vectors"] = [embedder.encode(texts) for _ in range(5)]

        def rerank() -> None:
            found["scores"] = [
                reranker.predict([("a query", text) for text in texts]) for _ in range(5)
            ]

        threads = [threading.Thread(target=target) for target in (embed, rerank)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    # Batches fall differently each time, which is nothing but rounding in float32.
    for again in found["vectors"]:
        np.testing.assert_allclose(again, vectors, atol=1e-5)
    for again in found["scores"]:
        np.testing.assert_allclose(again, scores, atol=1e-5)
