"""Thousands of requests of every kind at once, with everything going wrong now and then: each gets
one answer that is its own or an error that is due, and nothing is left behind."""

from __future__ import annotations

import gc
import random
import threading
import time
import tracemalloc
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from typing import Any

import pytest
import torch

from qvlfast.cost import Budget
from qvlfast.engine import Engine
from qvlfast.errors import DeadlineError, InputError, QueueFull
from qvlfast.prompt import Prompt
from qvlfast.request import Pending, Terms
from qvlfast.runner import Sharing
from qvlfast.scheduler import LEVELS
from qvlfast.served import Job
from tests.stand_in import Serving, prompt

POISON, NOT_A_NUMBER = 900, 800
WINDOW = 40


def faulty_models(seed: int) -> list[Serving]:
    """Two stand-ins in one engine, each of which runs out of memory now and then."""
    engine = Engine(ageing=0.05, host_threads=2)
    dice = random.Random(seed)
    made = []
    for tokens in (300, 200):
        serving = Serving(
            Budget(tokens=tokens, patches=64),
            Sharing(prefixes=True, cache_bytes=64_000, vision_cache_bytes=400),
            engine=engine,
            queue_work=10_000,
        )
        model: Any = serving.model
        model.break_down = OutOfMemory(model.break_down, dice)
        model.batches = model.begun = deque(maxlen=1)
        made.append(serving)
    return made


class OutOfMemory:
    """Fails in the first batch, and later in one of fifty on average.

    By chance alone one soak of seventy would have no fault, as it has about 200 batches.
    """

    def __init__(self, usual: Callable[[torch.Tensor], None], dice: random.Random) -> None:
        self._usual = usual
        self._dice = dice
        self._until_next = 0

    def __call__(self, ids: torch.Tensor) -> None:
        if self._until_next == 0:
            self._until_next = self._dice.randrange(1, 100)
            raise MemoryError
        self._until_next -= 1
        self._usual(ids)


class Client:
    """Sends requests, gives up on some, and checks what comes back."""

    def __init__(self, models: Sequence[Serving], seed: int, count: int) -> None:
        self._models = models
        self._dice = random.Random(seed)
        self._count = count
        self._pending: deque[tuple[Pending, int, Terms]] = deque()
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []

    def run(self) -> None:
        while self._count:
            try:
                self._send()
                self._count -= 1
            except QueueFull as full:
                assert full.retry_after > 0
                self.outcomes["QueueFull"] += 1
                time.sleep(0.001)
            if self._dice.random() < 0.03 and self._pending:
                self._dice.choice(self._pending)[0].cancel()
            while len(self._pending) > WINDOW:
                self._check(*self._pending.popleft())
        while self._pending:
            self._check(*self._pending.popleft())

    def _send(self) -> None:
        dice = self._dice
        last = dice.randrange(1, 700)
        if dice.random() < 0.01:
            last = dice.choice([POISON, NOT_A_NUMBER])
        start = [7] * dice.choice([0, 10, 30])
        ids = [*start, *(dice.randrange(1, 700) for _ in range(dice.randrange(0, 20))), last]
        if dice.random() < 0.1:  # something that many ask
            last = dice.randrange(1, 6)
            ids = [last]
        patches = 16 if dice.random() < 0.1 and len(ids) > 8 else 0
        soon = time.monotonic() + dice.choice([0.0, 0.005, 0.1])
        terms = Terms(
            priority=dice.choice(LEVELS),
            client=dice.randrange(5),
            deadline=soon if dice.random() < 0.1 else float("inf"),
            batch_tokens=50 if dice.random() < 0.05 else None,
            vision_cache=dice.random() < 0.9,
        )
        broken = dice.random() < 0.01

        def prepare() -> Prompt:
            if broken:
                raise InputError("unreadable", "no picture")
            return prompt(*ids, patches=patches)

        future = dice.choice(self._models).submit(prepare, terms)
        self._pending.append((future, -1 if broken else last, terms))

    def _check(self, future: Pending, last: int, terms: Terms) -> None:
        try:
            answer = future.result(60)
        except CancelledError:
            name, due = "cancelled", future.unwanted
        except DeadlineError:
            name, due = "late", terms.deadline < float("inf")
        except InputError as error:
            name, due = (
                error.code,
                {"unreadable": -1, "non_finite": NOT_A_NUMBER}[error.code] == last,
            )
        except MemoryError:  # twice, and the second time alone
            name, due = "memory", True
        except RuntimeError:
            name, due = "poison", last == POISON
        else:
            name, due = "answered", answer.value.tolist() == [last] * 3
        self.outcomes[name] += 1
        if not due:
            self.wrong.append(f"{name} for {last}")


def soak(clients: int, count: int, seed: int) -> Counter[str]:
    """Run them; returns how often each outcome was."""
    models = faulty_models(seed)
    made = [Client(models, seed + i, count) for i in range(clients)]
    threads = [threading.Thread(target=client.run) for client in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for serving in models:
        serving.close()
    outcomes: Counter[str] = sum((client.outcomes for client in made), Counter())
    refused = outcomes.pop("QueueFull", 0)
    assert [wrong for client in made for wrong in client.wrong] == []
    assert sum(outcomes.values()) == clients * count
    counts = [serving.metrics() for serving in models]

    def total(name: str) -> int:
        return sum(getattr(metrics, name) for metrics in counts)

    assert total("submitted") == clients * count and total("refused") == refused
    assert total("answered") == outcomes["answered"] > 0.7 * clients * count
    assert total("cancelled") == outcomes["cancelled"] and total("expired") == outcomes["late"]
    failed = sum(outcomes[name] for name in ("unreadable", "non_finite", "memory", "poison"))
    assert total("failed") == failed and total("memory_faults") > 0
    for metrics, serving in zip(counts, models, strict=True):
        assert (metrics.waiting, metrics.preparing, metrics.waiting_work) == (0, 0, 0)
        assert not serving.served.open
    for name in ("prefix_cache", "vision_cache", "answer_cache"):
        assert sum(getattr(metrics, name).hits for metrics in counts), name
    assert not models[0].engine._models
    return outcomes


def test_soak() -> None:
    outcomes = soak(clients=4, count=300, seed=int(time.time()))
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o) in (Job, Pending)]
    assert outcomes["late"] and outcomes["cancelled"]


@pytest.mark.slow
def test_long_soak_keeps_memory_flat() -> None:
    soak(clients=8, count=250, seed=0)
    tracemalloc.start()
    sizes = []
    for round_number in range(5):
        soak(clients=8, count=500, seed=round_number)
        gc.collect()
        sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    # What is left of four more rounds, 16,000 requests, is less than 10 bytes for each.
    assert sizes[-1] - sizes[0] < 160_000, sizes
