"""CUDA graphs of short batches of text, where launching kernels takes longer than running them.

A graph replays the same launches on the same memory, so a batch must have the shape of one that was
captured. Attention is causal, so tokens after a prompt's end change nothing before it: every
prompt is padded at its end to a common length, and the rows of the padding are thrown away. The
boundaries of such a batch (``cu_seqlens``) are then the same for all batches of its bucket.

Batches with pictures, or beyond the largest bucket, run as they are. Texts that fit a bucket run
unshared: what sharing saves of so few tokens is less than what the launches take. (By reasoning:
ten and more a layer, from Python; not measured.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .batch import Batch
from .ops import Forest

_WARM = 2  # runs before a capture: kernels are compiled and plans uploaded outside of it


@dataclass(frozen=True, order=True)
class Bucket:
    """``prompts`` prompts of ``length`` tokens each."""

    prompts: int
    length: int

    @property
    def tokens(self) -> int:
        return self.prompts * self.length


# What a captured graph costs in memory is its activations, which these keep to those of 1,024
# tokens. Steps of two waste half at most, and a quarter on average.
BUCKETS = tuple(
    Bucket(prompts, length)
    for prompts in (1, 2, 4, 8, 16, 32)
    for length in (16, 32, 64, 128, 256)
    if prompts * length <= 1024
)


@dataclass(frozen=True)
class Choice:
    """A bucket, or None; and why, for a reader."""

    bucket: Bucket | None
    reason: str


def fit(lengths: Sequence[int], buckets: Sequence[Bucket] = BUCKETS) -> Choice:
    """The bucket of the fewest tokens that texts of these lengths fit into."""
    longest = max(lengths)
    fitting = [b for b in buckets if b.prompts >= len(lengths) and b.length >= longest]
    if not fitting:
        return Choice(None, f"{len(lengths)} prompts of up to {longest} tokens fit no bucket")
    best = min(fitting, key=lambda b: (b.tokens, b.prompts))
    return Choice(best, f"{sum(lengths)} tokens padded to {best.tokens}")


def choose_bucket(batch: Batch, buckets: Sequence[Bucket] = BUCKETS) -> Choice:
    """:func:`fit` for a batch as it was packed; None for one that is no plain batch of text."""
    if batch.vision is not None or len(batch.visual_index):
        return Choice(None, "it has pictures")
    forest = batch.forest
    lengths = np.diff(forest.cu_q)
    if (forest.parent >= 0).any() or not np.array_equal(forest.cu_q, forest.cu_k):
        return Choice(None, "its prompts share beginnings")
    if len(batch.read) != len(lengths) or (batch.read != forest.cu_q[1:] - 1).any():
        return Choice(None, "it reads other tokens than the last of each prompt")
    return fit(lengths.tolist(), buckets)


def pad(batch: Batch, bucket: Bucket) -> tuple[Batch, NDArray[np.int64]]:
    """The batch with every prompt padded to the bucket's length, all of whose tokens are read.

    Returns:
        The padded batch, and the rows of its answer that the batch had asked for ``[R]``.
    """
    lengths = np.diff(batch.forest.cu_q)
    rows = np.concatenate(
        [i * bucket.length + np.arange(n) for i, n in enumerate(lengths)], dtype=np.int64
    )
    place = torch.from_numpy(rows).to(batch.ids.device)
    ids = batch.ids.new_zeros(bucket.tokens)
    ids[place] = batch.ids
    positions = batch.positions.new_zeros(3, bucket.tokens)
    positions[:, place] = batch.positions
    padded = replace(
        batch,
        ids=ids,
        positions=positions,
        forest=Forest.plain([bucket.length] * bucket.prompts),
        read=np.arange(bucket.tokens),
    )
    return padded, rows[batch.read]


Forward: TypeAlias = Callable[[Batch], Tensor]


class Capture(Protocol):
    """Records what ``forward`` does with a batch; the CUDA one is :class:`CudaCapture`."""

    def __call__(self, forward: Forward, batch: Batch) -> Forward:
        """What does the same again with the ids and positions of another batch of that shape; its
        answer may be overwritten by the next of any capture."""
        ...

    def forget(self) -> None:
        """What was captured is gone."""
        ...


class Graphs:
    """Runs plain batches of text by replaying graphs, and others by ``forward``.

    There is one graph a bucket at most. Not thread-safe: replays share memory.

    Args:
        forward: the model's; it must neither copy from the host nor wait for the device when it is
            called with a batch that it has seen.
        capture: records each bucket at its first use.
        buckets: shapes to capture.
    """

    def __init__(
        self, forward: Forward, capture: Capture, buckets: Sequence[Bucket] = BUCKETS
    ) -> None:
        self._forward = forward
        self._capture = capture
        self._captured: dict[Bucket, Forward] = {}
        self.buckets = tuple(buckets)

    @property
    def captured(self) -> tuple[Bucket, ...]:
        """The buckets that there is a graph of, in the order of their first use."""
        return tuple(self._captured)

    def __call__(self, batch: Batch) -> Tensor:
        """What ``forward`` gives, a row a read token: ``[R, …]``."""
        bucket = choose_bucket(batch, self.buckets).bucket
        if bucket is None:
            return self._forward(batch)
        padded, rows = pad(batch, bucket)
        if bucket not in self._captured:
            self._captured[bucket] = self._capture(self._forward, padded)
        answer = self._captured[bucket](padded)
        return answer[torch.from_numpy(rows).to(answer.device)]

    def forget(self) -> None:
        """Drop all graphs and their memory; they are captured anew when they are used."""
        self._captured.clear()
        self._capture.forget()


class CudaCapture:
    """Captures CUDA graphs.

    Args:
        keep: called after each capture; what it returns lives as long as the graph. For what
            ``forward`` has put on the device and may drop, such as plans of attention.
    """

    def __init__(self, keep: Callable[[], object] = lambda: None) -> None:
        self._keep = keep
        self._pool: Any = None

    def __call__(self, forward: Forward, batch: Batch) -> Forward:
        # One pool for all graphs: no two run at once, and an answer is copied before the next.
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            return _Captured(forward, batch, self._keep, self._pool)
        except BaseException:
            self.forget()  # a pool that no graph has come to own may not be asked for again
            raise

    def forget(self) -> None:
        self._pool = None


class _Captured:
    """One graph with the tensors it reads and writes."""

    def __init__(
        self, forward: Forward, batch: Batch, keep: Callable[[], object], pool: Any
    ) -> None:
        # Kept, with its forest: plans of attention are found by the objects they were made for.
        self._batch = replace(batch, ids=batch.ids.clone(), positions=batch.positions.clone())
        side = torch.cuda.Stream(batch.ids.device)
        side.wait_stream(torch.cuda.current_stream(batch.ids.device))
        with torch.cuda.stream(side):
            for _ in range(_WARM):
                forward(self._batch)
        torch.cuda.current_stream(batch.ids.device).wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads, of another model say, may go on using the device.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._answer = forward(self._batch)
        self._kept = keep()

    def __call__(self, batch: Batch) -> Tensor:
        """The answer, which the next replay overwrites."""
        self._batch.ids.copy_(batch.ids)
        self._batch.positions.copy_(batch.positions)
        self._graph.replay()
        return self._answer


def graphs_for(
    forward: Forward, device: torch.device, backend: str, most_tokens: int
) -> Graphs | None:
    """Graphs where they can be captured: of the Triton kernels, on a CUDA device. Others wait for
    the device, or ask the host, in the middle of a pass.

    Args:
        backend: name of the ops that ``forward`` uses.
        most_tokens: padded batches have no more.
    """
    if device.type != "cuda" or backend != "triton":
        return None
    from .kernels import attention

    buckets = [bucket for bucket in BUCKETS if bucket.tokens <= most_tokens]
    return Graphs(forward, CudaCapture(lambda: list(attention._PLANS.values())), buckets)
