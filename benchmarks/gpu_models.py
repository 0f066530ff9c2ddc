"""The whole model against transformers, on the device of benchmarks.gpu and with random weights.

transformers makes the weights; its state dict is loaded as if it were a checkpoint. Text goes in
as made-up ids, pictures as made-up pixels.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.checkpoints import SHAPES, Shape, config_json
from qvlfast.batch import Batch, Cut, pack
from qvlfast.checkpoint import Checkpoint
from qvlfast.config import ModelConfig, PixelConfig, load_config
from qvlfast.dispatch import choose_ops
from qvlfast.graphs import BUCKETS, graphs_for
from qvlfast.memory import peak_activations
from qvlfast.model import Model
from qvlfast.pixels import Patches
from qvlfast.prompt import Prompt
from qvlfast.quant import Quantization
from qvlfast.stand_in import Setup, stand_in_prompt
from qvlfast.weights import load_weights

if TYPE_CHECKING:
    from benchmarks.gpu import Clock, Row

# Random weights pass rounding on undamped: what holds a trained model holds these by far less.
_LEAST_COSINE = {"float": 0.99, "int8": 0.9, "fp8": 0.8}
# 1 - cosine: blocks of another number of rows add in another order.
_REPLAY = 1e-3
_DRY = Shape(
    hidden=64, layers=3, ffn=96, heads=2, kv_heads=1, vocab=2000, vision_hidden=32, vision_depth=4,
    vision_ffn=48, positions=64,
)  # fmt: skip


class StateDict(Checkpoint):
    """Tensors that are in memory already, under their published names."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.folder = Path("the state dict of transformers")
        self._tensors = dict(tensors)
        self.shapes = {name: tuple(t.shape) for name, t in tensors.items()}
        codes = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
        self.dtypes = {name: codes[t.dtype] for name, t in tensors.items()}

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]


def inputs(config: ModelConfig, *, dry: bool) -> Iterator[tuple[str, list[Prompt]]]:
    """Name and prompts of each case."""
    rng = np.random.default_rng(0)

    def text(length: int) -> Prompt:
        prompt = stand_in_prompt(config, length)
        prompt.ids[:] = rng.integers(0, 1000, length)
        prompt.positions[:] = np.arange(length)
        return prompt

    shapes = ((1, 12), (3, 9)) if dry else ((1, 32), (1, 128), (1, 512), (8, 128), (64, 32))
    for count, length in shapes:
        yield f"text {count}x{length}", [text(length) for _ in range(count)]
    merge, start, tail = config.vision.spatial_merge_size, 3, 5
    for side in (2,) if dry else (16, 32):
        visual = side * side
        prompt = text(start + visual + tail)
        # time, row and column as the design of positions has them
        rows, columns = np.mgrid[:side, :side].reshape(2, -1)
        prompt.ids[start : start + visual] = config.image_token_id
        prompt.positions[:, start : start + visual] = start + np.stack((0 * rows, rows, columns))
        prompt.positions[:, start + visual :] = start + side + np.arange(tail)
        grid = (1, side * merge, side * merge)
        width = config.vision.in_channels * config.vision.patch_size**2
        pixels = rng.integers(0, 256, (grid[1] * grid[2], width), dtype=np.uint8)
        yield (
            f"picture {grid[1] * config.vision.patch_size}px",
            [
                Prompt(
                    prompt.ids,
                    prompt.positions,
                    (Patches(pixels, grid, visual),),
                    np.arange(start, start + visual, dtype=np.int32),
                )
            ],
        )


def peer_call(peer: Any, prompts: list[Prompt], device: torch.device) -> Callable[[], Tensor]:
    """transformers on the same ids and pixels, all prompts of one length; the last hidden state."""
    ids = torch.from_numpy(np.stack([p.ids for p in prompts]).astype(np.int64)).to(device)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "use_cache": False}
    media = [m for p in prompts for m in p.media]
    if media:
        pixels = torch.from_numpy(np.concatenate([m.pixels for m in media])).to(device)
        still = pixels.view(len(pixels), 3, 1, -1).expand(-1, -1, 2, -1).reshape(len(pixels), -1)
        options["pixel_values"] = ((still.float() / 255 - 0.5) / 0.5).to(peer.dtype)
        options["image_grid_thw"] = torch.tensor([m.grid for m in media], device=device)
        token = peer.config.image_token_id
        options["mm_token_type_ids"] = (ids == token).int()

    @torch.inference_mode()
    def run() -> Tensor:
        hidden: Tensor = peer(input_ids=ids, **options).last_hidden_state[:, -1]
        return hidden

    return run


def model_rows(clock: Clock, *, dry: bool, fp8: bool) -> list[Row]:
    """All whole-model rows; one that says so if transformers is not there."""
    from benchmarks.gpu import Row

    try:
        from transformers import AutoConfig, AutoModel
    except ImportError:
        return [Row("model", "", "", "", "skipped", note="transformers is not installed")]
    shape = _DRY if dry else SHAPES["2b"]
    dtype = torch.float32 if dry else torch.bfloat16
    name = str(dtype).removeprefix("torch.")
    with tempfile.TemporaryDirectory() as folder:
        document = config_json(shape, name, "rope_parameters", tied=True)
        if dry:  # the real ids are beyond a small vocabulary
            document |= {"image_token_id": 1990, "video_token_id": 1991}
            document |= {"vision_start_token_id": 1992, "vision_end_token_id": 1993}
        (Path(folder) / "config.json").write_text(json.dumps(document))
        config = load_config(Path(folder))
        torch.manual_seed(0)
        with clock.device, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # As the published checkpoints are read: in the dtype that they are stored in.
            peer = AutoModel.from_config(AutoConfig.from_pretrained(folder), dtype=dtype).eval()
    state = StateDict(peer.state_dict())
    rows = []
    for form in (None, "int8", "fp8") if fp8 else (None, "int8"):
        rows += _with_format(clock, config, state, peer, dtype, form, dry=dry)
    return rows


def _with_format(
    clock: Clock,
    config: ModelConfig,
    state: StateDict,
    peer: Any,
    dtype: torch.dtype,
    form: str | None,
    *,
    dry: bool,
) -> list[Row]:
    from benchmarks.gpu import Row

    device, name = clock.device, str(dtype).removeprefix("torch.")
    plan = Quantization.parse(form)
    label = f"{name} {form}" if form else name
    ops = choose_ops("triton", device, dtype, plan)
    model = Model(
        config,
        load_weights(
            state, config, PixelConfig((0.5,) * 3, (0.5,) * 3), ops, dtype=dtype, device=device,
            answer_ids=None, quantization=plan,
        ),
        ops,
    )  # fmt: skip
    graphs = graphs_for(model.hidden, device, ops.name, max(b.tokens for b in BUCKETS))
    rows = []
    for case, prompts in inputs(config, dry=dry):
        base = ("model", "forward", case, label)
        if clock.left < 0:
            rows.append(Row(*base, "skipped", note="out of time"))
            continue
        batch = pack(prompts, config.vision.spatial_merge_size, device).batch
        theirs = peer_call(peer, prompts, device)
        truth = theirs().float()
        with _peak(device) as peak:
            got = model.forward(batch)
        cosine = float(F.cosine_similarity(got, truth).min())
        bound = 1 - _LEAST_COSINE[form or "float"]
        good = 1 - cosine <= bound
        ours = clock.microseconds(partial(model.forward, batch))
        taken = clock.microseconds(theirs)
        note = _memory(config, plan, dtype, batch, peak) if peak else ""
        rows.append(
            Row(
                "model",
                "forward",
                case,
                label,
                "ok" if good else "failed",
                error=1 - cosine,
                tolerance=bound,
                ours_us=ours,
                peer="transformers",
                peer_us=taken,
                ratio=taken / ours,
                note=note,
            )
        )
        if batch.vision is None:
            # Nothing is captured on a CPU.
            hidden, whole = graphs or model.hidden, Cut(None, np.arange(len(batch.read)))

            def run(batch: Batch = batch, hidden: Any = hidden, whole: Cut = whole) -> Tensor:
                return model.head(hidden(batch), [whole])[0]

            replayed = run()
            apart = 1 - float(F.cosine_similarity(replayed.float(), got.float()).min())
            quick = clock.microseconds(run)
            rows.append(
                Row(
                    "model",
                    "graphs",
                    case,
                    label,
                    "ok" if apart <= _REPLAY else "failed",
                    error=apart,
                    tolerance=_REPLAY,
                    ours_us=quick,
                    peer="without graphs",
                    peer_us=ours,
                    ratio=ours / quick,
                    note="" if device.type == "cuda" else "nothing is captured on a CPU",
                )
            )
    return rows


@contextlib.contextmanager
def _peak(device: torch.device) -> Iterator[list[int]]:
    """The bytes allocated at once, beyond those before; nothing on a CPU."""
    found: list[int] = []
    if device.type != "cuda":
        yield found
        return
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield found
    torch.cuda.synchronize()
    found.append(torch.cuda.max_memory_allocated() - before)


def _memory(
    config: ModelConfig,
    plan: Quantization | None,
    dtype: torch.dtype,
    batch: Batch,
    peak: list[int],
) -> str:
    setup = Setup(
        dtype,
        "triton",
        lambda n: plan.format if plan is not None and plan.covers(n) else "float",
        weight_only=plan is not None and plan.weight_only,
    )
    patches = 0 if batch.vision is None else len(batch.vision.stills)
    said = peak_activations(config, setup, tokens=len(batch.ids), patches=patches)
    return f"peak {peak[0] / 2**20:.1f} MiB, planned {said / 2**20:.1f} with the inputs"
