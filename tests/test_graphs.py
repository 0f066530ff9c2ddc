"""Buckets of CUDA graphs, padding, and the choice of flash-attn; what runs on a GPU is marked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from qvlfast.batch import Batch, pack
from qvlfast.checkpoint import Checkpoint
from qvlfast.config import load_config, load_pixel_config
from qvlfast.dispatch import choose_ops
from qvlfast.flash import Call, choose_attention, describe, flash_first
from qvlfast.graphs import Bucket, Graphs, choose_bucket, pad
from qvlfast.memory import stand_in_prompt
from qvlfast.model import Model
from qvlfast.ops import Forest, Ops
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


def test_on_a_cpu_or_switched_off_nothing_is_captured(tiny_checkpoint: Path) -> None:
    model = load(tiny_checkpoint, CPU, "reference", torch.float32)
    batch = texts(model, 5, 8)
    seen: list[Batch] = []

    def forward(given: Batch) -> torch.Tensor:
        seen.append(given)
        return model.forward(given)

    for enabled in (False, True):
        Graphs(forward, enabled=enabled)(batch)
    assert seen == [batch, batch]


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
