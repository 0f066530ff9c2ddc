"""An engine around a stand-in for the model, for tests of everything but the model."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch

from qvlfast import Embedder, Reranker
from qvlfast.cost import Budget
from qvlfast.engine import Engine
from qvlfast.metrics import Metrics
from qvlfast.model import Model
from qvlfast.pixels import Patches
from qvlfast.prompt import Prompt
from qvlfast.request import DEFAULT_TERMS, Pending, Terms
from qvlfast.runner import Runner, Sharing

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
    """Answers each request with its last id; ids from 900 on break the batch they are in.

    A batch is of two pieces. What breaks is told apart by id: 900 raises in the first piece, 901
    runs out of memory, 902 does so once; 800 gives NaN.
    """

    config = SimpleNamespace(
        vision=SimpleNamespace(
            spatial_merge_size=2, hidden_size=1, intermediate_size=1, depth=1, deepstack_layers=()
        ),
        text=SimpleNamespace(
            hidden_size=1, intermediate_size=1000, num_heads=1, num_kv_heads=1, head_dim=1,
            num_layers=1,
        ),
    )  # fmt: skip

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.begun: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.faults = {902}

    def vision(self, batch, *, memory):
        yield
        return [torch.zeros(len(batch.positions[0]) // 4, 1)]

    def text(self, batch, levels=(), resident=(), keep=(), *, cuts, memory):
        last = batch.ids[torch.from_numpy(batch.read)]
        self.begun.append(last.tolist())
        self.gate.wait(10)
        self.batches.append(last.tolist())
        self.break_down(batch.ids)
        yield
        values = last.float()
        values[last == 800] = torch.nan
        keys = torch.zeros(len(batch.ids), 1, 1)
        return SimpleNamespace(
            values=tuple(values[cut.reads, None].repeat(1, cut.size or 3) for cut in cuts),
            kept=tuple(((keys[span].clone(), keys[span].clone()),) for span in keep),
        )

    def break_down(self, ids: torch.Tensor) -> None:
        if (ids == 900).any():
            raise RuntimeError("bad batch")
        if (ids == 901).any():
            raise MemoryError
        for fault in list(self.faults):
            if (ids == fault).any():
                self.faults.discard(fault)
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")


class Serving:
    """A stand-in in an engine, of its own unless one is given."""

    def __init__(
        self,
        budget: Budget | None = None,
        sharing: Sharing | None = None,
        *,
        engine: Engine | None = None,
        queue_work: float = math.inf,
        **options: Any,
    ) -> None:
        self.model = StandIn()
        self.runner = Runner(cast(Model, self.model), CPU, sharing or Sharing(prefixes=False))
        self.engine = engine or Engine(**{"host_threads": 2, **options})
        budget = budget or Budget(tokens=40, patches=64)
        self.served = self.engine.serve(self.runner, budget, queue_work=queue_work)

    def submit(
        self, prepare: Callable[[], Prompt], terms: Terms = DEFAULT_TERMS, **options: bool
    ) -> Pending:
        return self.engine.submit(self.served, prepare, terms, **options)

    def metrics(self) -> Metrics:
        return self.engine.metrics(self.served)

    def close(self) -> None:
        self.engine.close(self.served)


def runner_of(loaded: Embedder | Reranker) -> Runner:
    return loaded._runtime.served.runner


def forget_answers(loaded: Embedder | Reranker) -> None:
    """So that a repeated call is computed, with the beginnings and pictures that are kept."""
    runner_of(loaded)._answers.clear()


def until(condition: Callable[[], bool]) -> None:
    """Wait for another thread to bring something about."""
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("it did not come about in 10 s")
