"""Compile the Triton kernels that a service needs before it needs them.

The model's own code runs over tensors without storage, in batches that have every class of shapes
that the configs tell apart; the launches are compiled instead of run (``kernels/ahead.py``). So
neither a GPU nor the weights are needed, and the kernels are those that the same batches launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .batch import Batch, Cut, pack
from .config import ModelConfig
from .errors import BackendError
from .model import Model
from .ops import Linear, RowFormat, Weight
from .prompt import Prompt
from .stand_in import META, Setup, shortened, stand_in_prompt, stand_in_weights

# Tokens of a prompt on both sides of where the blocks of products (16, 64) and of attention (its
# tokens times the heads of a group: 16 to 128) change; the last has full blocks and long walks.
_LENGTHS = (1, 3, 6, 12, 17, 40, 65, 130, 700)
# As many prompts as there are read tokens in a batch: the rows of the last layer.
_COUNTS = (20, 70)


def batches(config: ModelConfig, *, pictures: bool = True) -> Iterator[Batch]:
    """Batches without storage, one for each class of shapes."""
    merge = config.vision.spatial_merge_size

    def packed(prompts: Sequence[Prompt]) -> Batch:
        return pack(prompts, merge, META, share=False).batch

    for length in _LENGTHS:
        yield packed([stand_in_prompt(config, length)])
    for count in _COUNTS:
        yield packed([stand_in_prompt(config, 9)] * count)
    # Two prompts with a common beginning: a forest with an edge.
    yield pack(_siblings(config), merge, META, share=True).batch
    if pictures:
        # In blocks; strides that are no multiple of 16 have kernels of their own.
        for height, width in ((1, 3), (2, 2), (8, 8), (24, 24)):
            yield packed([stand_in_prompt(config, 20, (1, height * merge, width * merge))])
        yield packed([stand_in_prompt(config, 20, (2, 2 * merge, 2 * merge), is_video=True)])


def compile_model(
    config: ModelConfig,
    setup: Setup,
    target: str,
    *,
    reranker: bool | None = None,
    pictures: bool = True,
    progress: Callable[[str], None] = lambda op: None,
) -> dict[str, int]:
    """Compile for ``target`` into Triton's cache.

    Args:
        setup: formats and dtype of the weights.
        target: ``sm_89`` and the like.
        reranker: for one, or for an embedder; None for both.
        progress: called with the op of each launch.

    Returns:
        op → kernels that differ.

    Raises:
        BackendError: Triton is missing, cannot compile here, or refuses an operand.
    """
    try:
        from .backends.triton import TritonOps
        from .kernels.ahead import compiling_for
        from .kernels.common import RefusalError
    except ImportError as error:
        raise BackendError(f"Triton is missing ({error}): pip install 'qvlfast[gpu]'") from None
    small = shortened(config)

    def prepare(
        parts: Sequence[Weight], bias: Tensor | None, *, rows: RowFormat, gated: bool
    ) -> Linear:
        return TritonOps.prepare(parts, bias, weight_only=setup.weight_only, gated=gated)

    try:
        with compiling_for(target, progress) as compiler:
            ops = TritonOps(META)
            like: Any = {"device": META, "dtype": setup.dtype}
            for head in (False, True) if reranker is None else (reranker,):
                weights = stand_in_weights(small, setup, prepare, reranker=head)
                model = Model(small, weights, ops)
                for batch in batches(small, pictures=pictures):
                    model.forward(batch)
                if not head:
                    for cut in _cuts(small.text.hidden_size):
                        model.head(torch.empty(2, small.text.hidden_size, **like), [cut])
    except RefusalError as error:
        raise BackendError(f"backend 'triton' refuses {error}") from error
    return {op: len(made) for op, made in sorted(compiler.compiled.items())}


def _cuts(full: int) -> Iterator[Cut]:
    """Whole vectors, and those cut to a multiple of 16 or to another size; of all or some reads."""
    for size in (None, full, full - 1):
        for count in (1, 2):
            yield Cut(size, np.arange(count))


def cache_folder() -> str:
    """Where Triton keeps what it compiled."""
    from .kernels.ahead import cache_folder as folder

    return folder()


def target_here(device: str) -> str:
    """The architecture of a CUDA device of this machine, such as ``sm_89``.

    Raises:
        BackendError: there is none.
    """
    if not torch.cuda.is_available():
        raise BackendError(
            f"device {device!r}: torch {torch.__version__} sees no CUDA GPU here, and a CPU has "
            "nothing to warm up. To compile for a GPU elsewhere give --target sm_87 or the like"
        )
    chosen: Any = torch.device("cuda" if device == "auto" else device)
    major, minor = torch.cuda.get_device_capability(chosen)
    return f"sm_{major}{minor}"


def _siblings(config: ModelConfig) -> list[Prompt]:
    one, other = stand_in_prompt(config, 40), stand_in_prompt(config, 40)
    other.ids[20:] = 1
    return [one, other]
