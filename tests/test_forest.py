"""The decoder over forests of segments: shared beginnings change nothing but the work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from qvlfast import Embedder
from qvlfast.batch import Batch, pack
from qvlfast.model import Model, drain
from qvlfast.model.text import text_forward
from qvlfast.model.vision import vision_forward
from qvlfast.ops import Forest
from qvlfast.prompt import Prompt
from tests.samples import picture

CPU = torch.device("cpu")
# The same sums in blocks of other sizes: see test_parity.test_any_order_and_grouping.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def embedder(tiny_checkpoint: Path) -> Embedder:
    return Embedder.from_pretrained(tiny_checkpoint)


def hidden(model: Model, batch: Batch) -> torch.Tensor:
    with torch.inference_mode():
        return model.forward(batch)


def segments(whole: Prompt, cuts: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """ids and positions of a prompt, cut at token indices."""
    bounds = [0, *cuts, len(whole.ids)]
    return [(whole.ids[a:b], whole.positions[:, a:b]) for a, b in pairwise(bounds)]


def join(pieces: Sequence[tuple[np.ndarray, np.ndarray]], parent: list[int], read: list[int]):
    forest = replace(
        Forest.plain([len(ids) for ids, _ in pieces]), parent=np.array(parent, dtype=np.int32)
    )
    ids = np.concatenate([ids for ids, _ in pieces]).astype(np.int64)
    positions = np.concatenate([p for _, p in pieces], axis=1).astype(np.int64)
    return Batch(
        ids=torch.from_numpy(ids),
        positions=torch.from_numpy(positions),
        forest=forest,
        read=np.array(read, dtype=np.int64),
        vision=None,
        visual_index=torch.empty(0, dtype=torch.int64),
        visual_rows=torch.empty(0, dtype=torch.int64),
    )


def common(*prompts: Prompt) -> int:
    """Length of the longest common beginning."""
    shortest = min(len(p.ids) for p in prompts)
    same = np.all([p.ids[:shortest] == prompts[0].ids[:shortest] for p in prompts], axis=0)
    return shortest if same.all() else int(np.argmin(same))


def test_tree_of_depth_three(embedder: Embedder) -> None:
    model = embedder._runtime.model
    texts = ["green apples grow here", "green apples fall", "green pears", "nothing alike"]
    prompts = [embedder._prepare(text, None) for text in texts]
    plain = hidden(model, pack(prompts, 2, CPU).batch)
    root = common(*prompts)
    green = common(*prompts[:3])
    apples = common(*prompts[:2])
    assert 0 < root < green < apples
    first = segments(prompts[0], [root, green, apples])
    tails = [
        segments(prompts[1], [apples])[1],
        segments(prompts[2], [green])[1],
        segments(prompts[3], [root])[1],
    ]
    pieces = [*first, *tails]
    # root ─ green ─ apples ─┬─ the end of text 0
    #      │       │         └─ the end of text 1
    #      │       └─ the end of text 2
    #      └─ the end of text 3
    parent = [-1, 0, 1, 2, 2, 1, 0]
    ends = np.cumsum([len(ids) for ids, _ in pieces]) - 1
    tree = hidden(model, join(pieces, parent, ends[3:].tolist()))
    assert sum(len(ids) for ids, _ in pieces) < sum(len(p.ids) for p in prompts)
    torch.testing.assert_close(tree, plain, atol=TOLERANCE, rtol=TOLERANCE)


def test_resident_beginnings(embedder: Embedder) -> None:
    """Keys and values of one batch stand in for tokens of the next, through two generations."""
    model = embedder._runtime.model
    weights, config = model.weights.text, model.config.text
    prompts = [embedder._prepare(f"{word} is what we look for", None) for word in ("red", "blue")]
    plain = hidden(model, pack(prompts, 2, CPU).batch)
    start = common(*prompts)
    beginning, *_ = segments(prompts[0], [start // 2, start])
    middle = segments(prompts[0], [start // 2, start])[1]
    ends = [segments(p, [start])[1] for p in prompts]
    with torch.inference_mode():
        first = join([beginning], [-1], [0])
        old = drain(
            text_forward(model.ops, weights, config, first, keep=[slice(0, len(beginning[0]))])
        ).kept
        lengths = [len(beginning[0]), len(middle[0]), *(len(ids) for ids, _ in ends)]
        forest = Forest(
            cu_q=np.cumsum([0, 0, *lengths[1:]]).astype(np.int32),
            cu_k=np.cumsum([0, *lengths]).astype(np.int32),
            parent=np.array([-1, 0, 1, 1], dtype=np.int32),
        )
        read = np.cumsum(lengths[1:])[1:] - 1
        batch = replace(join([middle, *ends], [-1, -1, -1], read.tolist()), forest=forest)
        out = drain(text_forward(model.ops, weights, config, batch, resident=old)).hidden
        pooled = model.ops.pool(out, weights.norm, config.norm_eps)
    torch.testing.assert_close(pooled, plain, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("fixture", ["tiny_checkpoint", "odd_checkpoint"])
def test_reading_tokens_anywhere(fixture: str, request: pytest.FixtureRequest) -> None:
    """Visual tokens too, and with as many deepstack levels as layers, where nothing is pruned."""
    embedder = Embedder.from_pretrained(request.getfixturevalue(fixture))
    model = embedder._runtime.model
    prompt = embedder._prepare({"image": picture(96, 64), "text": "and a text"}, None)
    batch = pack([prompt], 2, CPU).batch
    everything = replace(batch, read=np.arange(len(prompt.ids)))
    some = np.array([0, int(prompt.visual_index[1]), len(prompt.ids) - 2], dtype=np.int64)
    rows = hidden(model, replace(batch, read=some))
    torch.testing.assert_close(
        rows, hidden(model, everything)[some], atol=TOLERANCE, rtol=TOLERANCE
    )
    layers = replace(model.weights.text, layers=model.weights.text.layers[:2])
    with torch.inference_mode():
        visual, *deepstack = drain(
            vision_forward(model.ops, model.weights.vision, model.config.vision, batch.vision)
        )
        args = (model.ops, layers, model.config.text)
        few = drain(text_forward(*args, replace(batch, read=some), visual, deepstack))
        many = drain(text_forward(*args, everything, visual, deepstack))
    assert few.read is not None and few.read.tolist() == some.tolist()
    torch.testing.assert_close(few.hidden, many.hidden, atol=TOLERANCE, rtol=TOLERANCE)
