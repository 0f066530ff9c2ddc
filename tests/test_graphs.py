"""Buckets of CUDA graphs, padding, and the choice of flash-attn; what runs on a GPU is marked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qvlfast import Embedder, Reranker
from qvlfast.batch import Batch, pack
from qvlfast.checkpoint import Checkpoint
from qvlfast.config import load_config, load_pixel_config
from qvlfast.dispatch import choose_ops
from qvlfast.flash import Call, choose_attention, describe, flash_first
from qvlfast.graphs import BUCKETS, Bucket, Forward, Graphs, choose_bucket, fit, graphs_for, pad
from qvlfast.model import Model
from qvlfast.ops import Forest, Ops
from qvlfast.stand_in import stand_in_prompt
from qvlfast.weights import load_weights

CPU = torch.device("cpu")


def load(folder: Path, device: torch.device, backend: str, dtype: torch.dtype) -> Model:
    config, ops = load_config(folder), choose_ops(backend, device, dtype)
    weights = load_weights(
        Checkpoint(folder), config, load_pixel_config(folder), ops, dtype=dtype, device=device,
        answer_ids=None,
    )  # fmt: skip
    return Model(config, weights, ops)


def texts(model: Model, *lengths: int, device: torch.device = CPU, share: bool = False) -> Batch:
    rng = np.random.default_rng(0)
    prompts = []
    for length in lengths:
        prompt = stand_in_prompt(model.config, length)
        prompt.ids[:] = rng.integers(0, 1000, length)
        prompt.positions[:] = np.arange(length)
        prompts.append(prompt)
    return pack(prompts, 2, device, share=share).batch


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ((1,), Bucket(1, 16)),
        ((16,), Bucket(1, 16)),
        ((17,), Bucket(1, 32)),
        ((31, 3), Bucket(2, 32)),
        ((9,) * 5, Bucket(8, 16)),
        ((256,) * 3, Bucket(4, 256)),
        ((257,), None),
        ((100,) * 9, None),
    ],
)
def test_buckets(lengths: tuple[int, ...], expected: Bucket | None, tiny_checkpoint: Path) -> None:
    config = load_config(tiny_checkpoint)
    batch = pack([stand_in_prompt(config, n) for n in lengths], 2, CPU).batch
    choice = choose_bucket(batch)
    assert choice.bucket == expected
    said = f"padded to {expected.tokens}" if expected else "fit no bucket"
    assert said in choice.reason


def test_what_is_no_plain_batch_of_text_gets_no_bucket(tiny_checkpoint: Path) -> None:
    config = load_config(tiny_checkpoint)
    one, other = stand_in_prompt(config, 20), stand_in_prompt(config, 20)
    other.ids[10:] = 1
    assert "share beginnings" in choose_bucket(pack([one, other], 2, CPU, share=True).batch).reason
    seen = stand_in_prompt(config, 20, (1, 4, 4))
    assert "pictures" in choose_bucket(pack([seen], 2, CPU).batch).reason


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_padding_changes_nothing(tiny_checkpoint: Path, backend: str) -> None:
    model = load(tiny_checkpoint, CPU, backend, torch.float32)
    for lengths in ((5,), (16,), (3, 31, 20), (1, 1, 9)):
        batch = texts(model, *lengths)
        bucket = choose_bucket(batch).bucket
        assert bucket is not None
        padded, rows = pad(batch, bucket)
        assert len(padded.ids) == bucket.tokens
        # Products of other shapes add in another order.
        torch.testing.assert_close(
            model.forward(padded)[torch.from_numpy(rows)], model.forward(batch), rtol=0, atol=2e-5
        )


class FakeCapture:
    """Does what a CUDA graph does but fast: reads the tensors of its own batch, and writes the
    memory that all of them share."""

    def __init__(self) -> None:
        self.memory: torch.Tensor | None = None
        self.taken: list[int] = []
        self.forgotten = 0
        self.faults: list[BaseException] = []

    def __call__(self, forward: Forward, batch: Batch) -> Forward:
        if self.faults:
            raise self.faults.pop()
        own = replace(batch, ids=batch.ids.clone(), positions=batch.positions.clone())
        self.taken.append(len(batch.ids))

        def replay(given: Batch) -> torch.Tensor:
            own.ids.copy_(given.ids)
            own.positions.copy_(given.positions)
            made = forward(own)
            if self.memory is None:
                self.memory = made.new_full((1024, *made.shape[1:]), torch.nan)
            self.memory[: len(made)] = made
            return self.memory[: len(made)]

        return replay

    def forget(self) -> None:
        self.forgotten += 1


def test_one_graph_a_bucket(tiny_checkpoint: Path) -> None:
    model = load(tiny_checkpoint, CPU, "native", torch.float32)
    capture = FakeCapture()
    graphs = Graphs(model.forward, capture)
    answers = []
    for lengths in ((5,), (7,), (16, 3), (20,), (6,), (300,), (2, 15)):
        batch = texts(model, *lengths)
        answers.append((graphs(batch), model.forward(batch)))
    assert graphs.captured == (Bucket(1, 16), Bucket(2, 16), Bucket(1, 32))
    assert capture.taken == [16, 32, 32]
    for got, expected in answers:  # after the last replay: none of them is the shared memory
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    graphs.forget()
    assert graphs.captured == () and capture.forgotten == 1
    graphs(texts(model, 9))
    assert graphs.captured == (Bucket(1, 16),)


def test_where_there_are_graphs(tiny_checkpoint: Path) -> None:
    model = load(tiny_checkpoint, CPU, "reference", torch.float32)
    cuda = torch.device("cuda")
    assert graphs_for(model.forward, CPU, "triton", 1024) is None
    assert graphs_for(model.forward, cuda, "reference", 1024) is None
    made = graphs_for(model.forward, cuda, "triton", 64)
    assert made is not None and made.captured == ()
    assert set(made.buckets) == {b for b in BUCKETS if b.tokens <= 64}
    assert fit([40, 3], made.buckets).bucket is None and fit([30, 3], made.buckets).bucket


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> FakeCapture:
    """What models that are loaded in the test capture with, though they are on the CPU."""
    capture = FakeCapture()

    def make(forward: Forward, device: torch.device, backend: str, most: int) -> Graphs:
        return Graphs(forward, capture, [b for b in BUCKETS if b.tokens <= most])

    monkeypatch.setattr("qvlfast.runtime.graphs_for", make)
    return capture


PICTURE = Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3))
INPUTS = ["one", "another text", "one", {"image": PICTURE}, "and " * 120, "one", PICTURE]


@pytest.mark.parametrize("share", [True, False])
def test_the_engine_replays_what_fits(
    tiny_checkpoint: Path, capture: FakeCapture, share: bool
) -> None:
    options = {"share_prefixes": share, "cache_bytes": 1 << 20 if share else 0}
    with (
        Embedder.from_pretrained(tiny_checkpoint, **options, cuda_graphs=False) as plain,
        Embedder.from_pretrained(tiny_checkpoint, **options) as graphs,
    ):
        expected = np.stack([plain.encode(value) for value in INPUTS])
        assert capture.taken == []
        got = np.stack([graphs.encode(value) for value in INPUTS])
        # Texts alone: a bucket of 32 tokens for the short, one of 256 for the long; no picture.
        assert capture.taken == [32, 256]
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5)
        together = graphs.encode(INPUTS)
        np.testing.assert_allclose(together, expected, rtol=0, atol=2e-5)
        counted = graphs.metrics()
        assert counted.answered == 2 * len(INPUTS) and counted.errors == {}
    with Embedder.from_pretrained(tiny_checkpoint, batch_tokens=31, **options) as narrow:
        del capture.taken[:]
        narrow.encode(["one", "another text"])
        assert capture.taken == []


def test_scores_come_out_too(tiny_checkpoint: Path, capture: FakeCapture) -> None:
    documents = ["one document", "another", "a third " * 9]
    with (
        Reranker.from_pretrained(tiny_checkpoint, cuda_graphs=False) as plain,
        Reranker.from_pretrained(tiny_checkpoint) as graphs,
    ):
        expected = plain.predict([("a query", d) for d in documents])
        got = graphs.predict([("a query", d) for d in documents])
    assert capture.taken
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)


def test_a_fault_of_memory_drops_the_graphs(tiny_checkpoint: Path, capture: FakeCapture) -> None:
    with Embedder.from_pretrained(tiny_checkpoint) as embedder:
        expected = embedder.encode("one")
        capture.faults = [MemoryError()]
        long = embedder.encode("and " * 120)
        assert capture.forgotten == 1 and embedder.metrics().memory_faults == 1
        np.testing.assert_array_equal(embedder.encode("one"), expected)
        assert capture.taken == [32, 256, 32] and np.isfinite(long).all()
        # Any other is the request's own, and later ones are answered.
        capture.faults = [RuntimeError("operation not permitted when stream is capturing")]
        with pytest.raises(RuntimeError, match="stream is capturing"):
            embedder.encode("words " * 50)
        np.testing.assert_array_equal(embedder.encode("one"), expected)


PLAIN = Call("cuda", 80, torch.bfloat16, 128, edges=False, read=False)


@pytest.mark.parametrize(
    ("change", "installed", "flash", "reason"),
    [
        ({}, "2.8.3", True, "flash-attn 2.8.3, a batch without shared beginnings"),
        ({"dim": 72}, "2.8.3", True, ""),
        ({"capability": 90, "dtype": torch.float16}, "2.7.0.post2", True, ""),
        ({}, None, False, "not installed"),
        ({}, "2.6.3", False, "flash-attn 2.6.3 is older than 2.7"),
        ({"device": "cpu", "capability": 0}, "2.8.3", False, "on CUDA, not on cpu"),
        ({"capability": 120}, "2.8.3", False, "not for sm_120"),
        ({"dtype": torch.float32}, "2.8.3", False, "takes 16 bits"),
        ({"dim": 260}, "2.8.3", False, "heads of 260 values"),
        ({"edges": True}, "2.8.3", False, "share beginnings"),
        ({"read": True}, "2.8.3", False, "only the read tokens"),
    ],
)
def test_the_choice_of_attention(
    change: dict, installed: str | None, flash: bool, reason: str
) -> None:
    choice = choose_attention(Call(**(vars(PLAIN) | change)), installed)
    assert choice.flash == flash and reason in choice.reason
    assert str(choice).startswith("flash-attn:" if flash else "own attention:")


def test_a_cpu_keeps_its_own_attention() -> None:
    q = torch.randn(6, 2, 16)
    plain = Forest.plain([2, 4])
    shared = Forest(plain.cu_q, plain.cu_k, np.array([-1, 0], np.int32))
    assert not describe(q, plain, None).edges and describe(q, shared, None).edges
    assert describe(q, plain, np.array([1])).read
    run = flash_first(Ops.attention)
    for forest in (plain, shared):
        expected = Ops.attention(q, q, q, forest, causal=True, scale=0.25)
        assert torch.equal(run(q, q, q, forest, causal=True, scale=0.25), expected)
