"""The engine's promises with a stand-in for the model: every request is answered, once."""

from __future__ import annotations

import os
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qvlfast.engine import Engine
from qvlfast.errors import BackendError, InputError
from qvlfast.pixels import Patches
from qvlfast.prompt import Prompt
from qvlfast.scheduler import Budget

CPU = torch.device("cpu")


def prompt(*ids: int, patches: int = 0) -> Prompt:
    media = ()
    if patches:
        pixels = np.zeros((patches, 12), dtype=np.uint8)
        media = (Patches(pixels, (1, 2, patches // 2), patches // 4),)
    tokens = np.array(ids, dtype=np.int32)
    positions = np.tile(np.arange(len(ids), dtype=np.int32), (3, 1))
    index = np.arange(patches // 4, dtype=np.int32)
    return Prompt(tokens, positions, media, index)


class StandIn:
    """Answers each request with its last id; ids from 900 on break the batch they are in."""

    config = SimpleNamespace(vision=SimpleNamespace(spatial_merge_size=2))

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.gate = threading.Event()
        self.gate.set()

    def forward(self, batch):
        self.gate.wait(10)
        self.batches.append(len(batch.read))
        if (batch.ids >= 900).any():
            raise RuntimeError("bad batch")
        last = batch.ids[torch.from_numpy(batch.read)].float()
        last[last == 800] = torch.nan
        return last[:, None].repeat(1, 3)


@pytest.fixture
def engine():
    budget = Budget(tokens=40, patches=64)
    made = Engine(StandIn(), CPU, budget, share_prefixes=False, host_threads=2)
    yield made
    made.close()


def test_answers_and_usage(engine: Engine) -> None:
    future = engine.submit(lambda: prompt(1, 2, 3, 4, patches=8))
    answer = future.result(10)
    assert answer.value.tolist() == [4, 4, 4]
    assert (answer.usage.tokens, answer.usage.visual_tokens) == (4, 2)
    assert answer.usage.truncated_tokens == 0 and not answer.usage.video_reduced


def test_many_threads(engine: Engine) -> None:
    def client(base: int) -> None:
        futures = [engine.submit(lambda i=i: prompt(1, base + i)) for i in range(50)]
        results.extend(f.result(10).value[0] == base + i for i, f in enumerate(futures))

    results: list[bool] = []
    threads = [threading.Thread(target=client, args=(100 * t,)) for t in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 300 and all(results)


def test_one_bad_request_costs_no_other_its_answer(engine: Engine) -> None:
    engine.model.gate.clear()
    ids = [1, 2, 900, 4, 5, 800, 7, 901]
    futures = [engine.submit(lambda i=i: prompt(i)) for i in ids]
    engine.model.gate.set()
    for i, future in zip(ids, futures, strict=True):
        error = future.exception(10)
        if i >= 900:
            assert isinstance(error, RuntimeError)
        elif i == 800:
            assert isinstance(error, InputError) and error.code == "non_finite"
        else:
            assert error is None and future.result().value[0] == i


def test_an_error_in_preparation_is_that_requests(engine: Engine) -> None:
    def broken() -> Prompt:
        raise InputError("unreadable", "no picture")

    bad, good = engine.submit(broken), engine.submit(lambda: prompt(6))
    assert good.result(10).value[0] == 6
    with pytest.raises(InputError, match="no picture"):
        bad.result(10)


def test_budget_and_per_call_budget(engine: Engine) -> None:
    def run(batch_tokens):
        engine.model.batches.clear()
        engine.model.gate.clear()
        futures = [engine.submit(lambda: prompt(*range(10)), batch_tokens) for _ in range(9)]
        time.sleep(0.2)
        engine.model.gate.set()
        for future in futures:
            future.result(10)
        return engine.model.batches

    assert max(run(None)) == 4
    assert max(run(20)) == 2


def test_a_request_over_the_budget_runs_alone(engine: Engine) -> None:
    assert engine.submit(lambda: prompt(*range(500))).result(10).value[0] == 499


def test_cancelled_work_is_not_run(engine: Engine) -> None:
    engine.model.gate.clear()
    first = engine.submit(lambda: prompt(1))
    time.sleep(0.2)
    second = engine.submit(lambda: prompt(2))
    assert second.cancel()
    engine.model.gate.set()
    assert first.result(10).value[0] == 1
    assert engine.submit(lambda: prompt(3)).result(10).value[0] == 3
    assert sum(engine.model.batches) == 2


def test_prepared_pixels_are_bounded(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qvlfast.engine._MAX_WAITING_PATCHES", 100)
    engine.model.gate.clear()
    prepared = []

    def prepare() -> Prompt:
        prepared.append(1)
        return prompt(1, patches=64)

    futures = [engine.submit(prepare) for _ in range(20)]
    time.sleep(0.3)
    # One batch in the model, two waiting (128 patches), and what two host threads had begun.
    assert len(prepared) <= 5
    engine.model.gate.set()
    for future in futures:
        future.result(10)
    assert len(prepared) == 20


def test_close_answers_what_was_accepted() -> None:
    engine = Engine(StandIn(), CPU, Budget(), host_threads=1)
    futures = [engine.submit(lambda i=i: prompt(i)) for i in range(30)]
    engine.close()
    engine.close()
    assert [f.result(0).value[0] for f in futures] == list(range(30))
    with pytest.raises(BackendError, match="closed"):
        engine.submit(lambda: prompt(1))


def test_threads_start_at_the_first_request_only() -> None:
    before = threading.active_count()
    engine = Engine(StandIn(), CPU, Budget())
    assert threading.active_count() == before
    engine.close()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_works_in_a_forked_child(engine: Engine) -> None:
    assert engine.submit(lambda: prompt(1)).result(10).value[0] == 1
    child = os.fork()
    if child == 0:
        ok = engine.submit(lambda: prompt(7)).result(10).value[0] == 7
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0
