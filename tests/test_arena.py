"""Activations in a block that was planned before: nothing spills, nothing is used after its end."""

from __future__ import annotations

import os
from collections.abc import Generator

import numpy as np
import pytest
import torch
from samples import picture

from qvlfast import Embedder, Quantization, Reranker
from qvlfast.arena import HEAP, Arena
from qvlfast.gallery import EMBEDDER, RERANKER
from qvlfast.inputs import Item
from qvlfast.prompt import Prompt
from qvlfast.runner import Runner

CPU = torch.device("cpu")
RNG = np.random.default_rng(20261126)


class Poisoned(Arena):
    """Whatever is used after its scope is NaN, or −1 in integers."""

    def _free(self, start: int) -> None:
        self._block[start:] = 0xFF
        super()._free(start)


def test_results_follow_one_another_and_scopes_give_back() -> None:
    arena = Arena(CPU)
    arena.reserve(4096)
    first = arena.empty((3, 5), dtype=torch.float32)
    with arena.scope():
        second = arena.empty((7,), dtype=torch.bfloat16)
        assert second.data_ptr() - first.data_ptr() == 256
        with arena.scope():
            arena.empty((100,), dtype=torch.int8)
    third = arena.empty((2, 2), dtype=torch.float32)
    assert third.data_ptr() == second.data_ptr()
    assert arena.peak == 3 * 256
    assert arena.spilled == 0
    first.fill_(1.0)
    third.fill_(2.0)
    assert (first == 1.0).all()


def test_a_scope_ends_with_its_exception() -> None:
    arena = Arena(CPU)
    arena.reserve(1024)
    with pytest.raises(RuntimeError), arena.scope():
        before = arena.empty((4,), dtype=torch.float32)
        raise RuntimeError
    assert arena.empty((4,), dtype=torch.float32).data_ptr() == before.data_ptr()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_has_its_own() -> None:
    arena = Arena(CPU)
    arena.reserve(4096)
    mine = arena.empty((100,), dtype=torch.float32)
    mine.fill_(1.0)
    child = os.fork()
    if child == 0:
        mine.fill_(2.0)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert (mine == 1.0).all()


def test_what_does_not_fit_comes_from_the_heap() -> None:
    arena = Arena(CPU)
    arena.reserve(1024)
    held = arena.size
    inside = arena.empty((held,), dtype=torch.int8)
    outside = arena.empty((8,), dtype=torch.float32)
    assert arena.spilled == 32
    start = inside.data_ptr()
    assert not start <= outside.data_ptr() < start + held
    arena.reserve(held + 512)
    assert arena.spilled == 0
    assert arena.size >= held + 512


def test_a_larger_block_takes_the_place_of_a_smaller_one() -> None:
    arena = Arena(CPU)
    arena.reserve(1 << 20)
    small = arena.size
    arena.reserve(1 << 10)
    assert arena.size == small
    arena.reserve(1 << 23)
    assert arena.size >= 1 << 23
    arena.release()
    assert arena.size == 0


def test_memory_that_cannot_be_had_is_a_memory_fault() -> None:
    with pytest.raises(MemoryError, match="bytes for activations"):
        Arena(CPU).reserve(1 << 60)


def test_the_heap_keeps_nothing() -> None:
    with HEAP.scope():
        x = HEAP.empty((2, 3), dtype=torch.float32)
    assert x.shape == (2, 3)


def texts(count: int, most: int) -> list[str]:
    words = ["red", "кошка", "ラーメン", "tree", "sonne"]
    return [" ".join(RNG.choice(words, int(RNG.integers(1, most)))) for _ in range(count)]


def runner_of(loaded: Embedder | Reranker) -> Runner:
    return loaded._runtime.served.runner


def poison(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qvlfast.runner.Arena", Poisoned)
    runner.forget()


INPUTS = [
    {"text": "a red bus"},
    {"image": picture(200, 120)},
    {"image": picture(640, 480), "text": "what is this?"},
    {"text": "long " * 1500},
    {"image": [picture(64, 64), picture(96, 64)], "text": "two of them"},
]


@pytest.mark.parametrize("quantization", [None, "int8", "int4", Quantization("int8", vision=True)])
def test_nothing_is_used_after_its_scope_and_nothing_spills(
    quantization: str | Quantization | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = Embedder.from_pretrained(
        EMBEDDER, quantization=quantization, cache_bytes=0, vision_cache_bytes=0
    )
    runner = runner_of(loaded)
    inputs = [*INPUTS, *texts(40, 60)]
    poison(runner, monkeypatch)
    got = loaded.encode(inputs)
    (arena,) = runner._arenas
    assert isinstance(arena, Poisoned)
    assert arena.peak > 0
    metrics = loaded.metrics()
    assert (metrics.arena_bytes, metrics.arena_spilled) == (arena.size, 0)
    runner._plan = None
    assert np.array_equal(got, loaded.encode(inputs))


def test_a_rerank_with_kept_beginnings_does_not_spill(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = Reranker.from_pretrained(RERANKER)
    runner = runner_of(loaded)
    poison(runner, monkeypatch)
    pictures = [{"image": picture(96, 96 + 32 * i)} for i in range(4)]
    pairs = [("long query " * 150, document) for document in [*pictures, *texts(30, 40)]]
    first = loaded.predict(pairs)
    runner._answers.clear()
    again = loaded.predict(pairs)  # with the query's keys and values resident
    assert runner.counts["prefix_cache"].hits > 0
    assert loaded.metrics().arena_spilled == 0
    # Batches of other rows, whose bfloat16 differs in the last bits.
    np.testing.assert_allclose(first, again, atol=1e-2)


def test_a_batch_between_two_pieces_has_memory_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = Embedder.from_pretrained(EMBEDDER, cache_bytes=0)
    runner = runner_of(loaded)
    poison(runner, monkeypatch)
    ready = [runner.ready(prompt_of(loaded, text)) for text in ("one two " * 2000, "short text")]
    alone = [finish(runner.run([r])) for r in ready]
    slow = runner.run([ready[0]])
    for step in range(200):
        if step % 3 == 0:
            between = finish(runner.run([ready[1]]))
            assert np.array_equal(between[0], alone[1][0])
        try:
            next(slow)
        except StopIteration as stop:
            assert np.array_equal(stop.value[0], alone[0][0])
            break
    else:
        raise AssertionError("not finished in 200 pieces")
    assert step > 6
    assert len(runner._arenas) == 2
    slow = runner.run([ready[0]])
    next(slow)
    slow.close()
    assert len(runner._arenas) == 2


def prompt_of(loaded: Embedder, text: str) -> Prompt:
    item = Item(videos=(), images=(), texts=(text,), instruction=None, fps=None, max_frames=None)
    return loaded._runtime.prompter.embed(item, (), 8192)


def finish(pieces: Generator[None, None, list[np.ndarray]]) -> list[np.ndarray]:
    while True:
        try:
            next(pieces)
        except StopIteration as stop:
            return stop.value


def test_memory_faults_give_the_blocks_back(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = Embedder.from_pretrained(EMBEDDER)
    limit, reserve = 1 << 20, Arena.reserve

    def bounded(self: Arena, size: int) -> None:
        if size > limit:
            raise MemoryError(f"{size}")
        reserve(self, size)

    monkeypatch.setattr(Arena, "reserve", bounded)
    made = loaded.encode(texts(400, 60))
    assert np.isfinite(made).all()
    assert loaded.metrics().memory_faults > 0
