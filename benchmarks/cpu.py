"""Whole ``encode`` calls on the CPU against other engines.

    python -m benchmarks.cpu [--peer transformers|openvino] [--quantization none int8 int4]

All run the same checkpoint (random weights unless ``--model`` names one) on the same inputs with
the same threads. Rounds alternate between the peer and ours, one variant after the other, and the
medians of a case and of its ratios are kept, because machines are shared and their speed drifts.
Our time is that of the whole call, preprocessing included; the peer is handed our ids and pixels,
so its time is the forward pass alone. Each row carries the distance between the two unit vectors
beside its speed. Held to a lesser instruction set, both are: QVLFAST_ISA=avx2 goes with
ONEDNN_MAX_CPU_ISA=AVX2, ATEN_CPU_CAPABILITY=avx2 and MKL_ENABLE_INSTRUCTIONS=AVX2.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks.checkpoints import write_checkpoint
from qvlfast import _C, Embedder, Quantization
from qvlfast.prompt import Prompt

from .records import RESULTS, SETTLE, append, here


@dataclass(frozen=True)
class Row:
    """One line of the CSV; times are medians in seconds, ``speedup`` is peer over ours."""

    case: str
    tokens: int
    shape: str
    dtype: str
    quantization: str
    backend: str
    ours_s: float
    peer: str
    peer_s: float
    speedup: float
    distance: float
    rounds: int
    threads: int
    isa: str
    machine: str
    torch: str
    commit: str


def plan_of(form: str) -> Quantization | None:
    """``none``, a format, or with ``+vision`` one for the vision blocks too."""
    if form == "none":
        return None
    return Quantization(form.removesuffix("+vision"), vision=form.endswith("+vision"))


def text_of(embedder: Embedder, tokens: int, seed: int) -> str:
    """A text whose whole prompt has ``tokens`` tokens."""
    rng = np.random.default_rng(seed)
    empty = len(embedder._prepare("", None).ids)
    words = rng.choice(["river", "stone", "light", "green", "cloud", "paper"], tokens - empty)
    return " " + " ".join(words)


def picture(side: int) -> Image.Image:
    values = np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(values)


def cases(embedder: Embedder) -> dict[str, list[Any]]:
    texts = {"1x32": (1, 32), "1x128": (1, 128), "16x64": (16, 64), "4x512": (4, 512)}
    made: dict[str, list[Any]] = {
        f"text {name}": [text_of(embedder, length, i) for i in range(count)]
        for name, (count, length) in texts.items()
    }
    made["picture 512"] = [{"image": picture(512)}]
    made["picture 1024"] = [{"image": picture(1024)}]
    return made


class Peer(Protocol):
    """Another engine with the same weights."""

    name: str

    def inputs(self, prompts: Sequence[Prompt]) -> dict[str, torch.Tensor]:
        """Prompts of one length in its own form."""

    def encode(self, inputs: dict[str, torch.Tensor]) -> np.ndarray:
        """Unit vectors."""


class Transformers:
    """transformers' ``Qwen3VLModel`` with scaled-dot-product attention."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        import transformers

        self.name = f"transformers {transformers.__version__} sdpa"
        whole = transformers.Qwen3VLForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa"
        ).eval()
        self.model = whole.model
        self.answers = whole.lm_head.weight  # [vocabulary, hidden]

    def inputs(self, prompts: Sequence[Prompt]) -> dict[str, torch.Tensor]:
        """As the reference's processor lays them out."""
        ids = torch.from_numpy(np.stack([p.ids for p in prompts]).astype(np.int64))
        made = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        media = [m for p in prompts for m in p.media]
        if media:
            pixels = np.concatenate([m.pixels for m in media]).astype(np.float32) / 127.5 - 1
            still = pixels.reshape(len(pixels), 3, 1, -1).repeat(2, axis=2)
            made["pixel_values"] = torch.from_numpy(still.reshape(len(pixels), -1))
            made["image_grid_thw"] = torch.tensor([m.grid for m in media])
            is_pad = ids == self.model.config.image_token_id
            made["mm_token_type_ids"] = is_pad.to(torch.int32)
        return made

    @torch.inference_mode()
    def encode(self, inputs: dict[str, torch.Tensor]) -> np.ndarray:
        hidden = self.model(**inputs).last_hidden_state[:, -1]
        return F.normalize(hidden, dim=-1).float().numpy()


class OpenVino:
    """The text decoder alone, converted from transformers' and run by OpenVINO in bfloat16."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        import openvino
        import transformers

        self.name = f"OpenVINO {openvino.__version__.split('-')[0]}, decoder"
        model = transformers.Qwen3VLForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        ).model.language_model.eval()

        class Last(torch.nn.Module):
            """Without a cache, which the conversion would carry along."""

            def __init__(self) -> None:
                super().__init__()
                self.decoder = model

            def forward(self, ids: torch.Tensor) -> torch.Tensor:
                # A mask of its own: how transformers makes one cannot be converted.
                square = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool)
                mask = square.tril()[None, None].expand(ids.shape[0], 1, -1, -1)
                made = self.decoder(input_ids=ids, attention_mask=mask, use_cache=False)
                return F.normalize(made.last_hidden_state[:, -1], dim=-1)

        with torch.inference_mode():
            ids = torch.ones((2, 16), dtype=torch.int64)
            graph = openvino.convert_model(Last(), example_input=ids, input=[([-1, -1], np.int64)])
        precision = "bf16" if dtype == torch.bfloat16 else "f32"
        hints = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        self.compiled = openvino.Core().compile_model(graph, "CPU", hints)

    def inputs(self, prompts: Sequence[Prompt]) -> dict[str, torch.Tensor]:
        if any(prompt.media for prompt in prompts):
            raise SystemExit("the OpenVINO peer is the text decoder: use --only text")
        return {"ids": torch.from_numpy(np.stack([p.ids for p in prompts]).astype(np.int64))}

    def encode(self, inputs: dict[str, torch.Tensor]) -> np.ndarray:
        return np.asarray(self.compiled([inputs["ids"].numpy()])[0])


PEERS: dict[str, Callable[[Path, torch.dtype], Peer]] = {
    "transformers": Transformers,
    "openvino": OpenVino,
}


def seconds(work: Callable[[Any], Any], argument: Any) -> float:
    time.sleep(SETTLE)
    start = time.perf_counter()
    work(argument)
    return time.perf_counter() - start


def run(
    peer: Peer,
    embedders: dict[str, Embedder],
    shape: str,
    dtype: str,
    rounds: int,
    only: str,
) -> list[Row]:
    """The cases whose name holds ``only``, each with every one of ``embedders``, by its
    quantisation."""
    rows = []
    first = next(iter(embedders.values()))
    for name, items in cases(first).items():
        if only not in name:
            continue
        inputs = peer.inputs([first._prepare(item, None) for item in items])
        theirs = peer.encode(inputs)  # a warm-up, as the next
        vectors = {form: embedder.encode(items) for form, embedder in embedders.items()}
        peer_times: list[float] = []
        times: dict[str, list[float]] = {form: [] for form in embedders}
        for _ in range(rounds):
            peer_times.append(seconds(peer.encode, inputs))
            for form, embedder in embedders.items():
                times[form].append(seconds(embedder.encode, items))
        for form, embedder in embedders.items():
            ratios = [b / a for a, b in zip(times[form], peer_times, strict=True)]
            row = Row(
                case=name,
                tokens=inputs[next(iter(inputs))].numel(),
                shape=shape,
                dtype=dtype,
                quantization=form,
                backend=embedder.backend,
                ours_s=round(statistics.median(times[form]), 4),
                peer=peer.name,
                peer_s=round(statistics.median(peer_times), 4),
                speedup=round(statistics.median(ratios), 3),
                distance=float(f"{np.linalg.norm(vectors[form] - theirs, axis=1).max():.2e}"),
                rounds=rounds,
                **here(),
            )
            rows.append(row)
            print(
                f"{name:12} {form:5} {row.ours_s:9.3f} s  peer {row.peer_s:9.3f} s  "
                f"{row.speedup:6.2f} ×  distance {row.distance:.1e}",
                flush=True,
            )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="2b", help="random weights of this shape")
    parser.add_argument("--model", type=Path, help="a checkpoint folder instead")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument(
        "--quantization", nargs="+", default=["none", "int8", "int4"], metavar="FORMAT"
    )
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--peer", default="transformers", choices=sorted(PEERS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu.csv")
    options = parser.parse_args(arguments)
    torch.set_num_threads(_C.num_threads())
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        model = options.model
        if model is None:
            model = write_checkpoint(Path(scratch) / "model", options.shape, dtype="bfloat16")
        embedders = {
            form: stack.enter_context(
                Embedder.from_pretrained(
                    model,
                    dtype=options.dtype,
                    backend=options.backend,
                    quantization=plan_of(form),
                    # The same inputs come again and again: nothing may be known from before.
                    cache_bytes=0,
                    vision_cache_bytes=0,
                )
            )
            for form in options.quantization
        }
        peer = PEERS[options.peer](model, getattr(torch, options.dtype))
        rows = run(peer, embedders, options.shape, options.dtype, options.rounds, options.only)
    append(rows, options.out)


if __name__ == "__main__":
    main()
