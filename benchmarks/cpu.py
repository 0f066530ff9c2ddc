"""Whole ``encode`` calls on the CPU against transformers: ``python -m benchmarks.cpu``.

Both run the same checkpoint (random weights unless ``--model`` names one) on the same inputs with
the same threads. Rounds alternate between the two, and the medians of a case and of its ratios are
kept, because machines are shared and their speed drifts. Our time is that of the whole call,
preprocessing included; the peer is handed our ids and pixels, so its time is the forward pass
alone. Each row carries the distance between the two unit vectors beside its speed.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks.checkpoints import write_checkpoint
from qvlfast import _C, Embedder
from qvlfast.prompt import Prompt

RESULTS = Path(__file__).parent / "results" / "cpu.csv"


@dataclass(frozen=True)
class Row:
    """One line of the CSV; times are medians in seconds, ``speedup`` is peer over ours."""

    case: str
    tokens: int
    shape: str
    dtype: str
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


class Peer:
    """transformers' ``Qwen3VLModel`` with scaled-dot-product attention."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        import transformers

        self.name = f"transformers {transformers.__version__}"
        self.model = transformers.Qwen3VLForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa"
        ).model.eval()

    def inputs(self, prompts: Sequence[Prompt]) -> dict[str, torch.Tensor]:
        """Prompts of one length, as the reference's processor lays them out."""
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


def seconds(work: Callable[[Any], Any], argument: Any) -> float:
    start = time.perf_counter()
    work(argument)
    return time.perf_counter() - start


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def machine() -> str:
    """The processor's name, as far as the system tells it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def run(model: Path, shape: str, dtype: str, rounds: int, only: str) -> list[Row]:
    rows = []
    peer = Peer(model, getattr(torch, dtype))
    with Embedder.from_pretrained(model, dtype=dtype) as embedder:
        for name, items in cases(embedder).items():
            if only not in name:
                continue
            inputs = peer.inputs([embedder._prepare(item, None) for item in items])
            ours, theirs = embedder.encode(items), peer.encode(inputs)  # warm-up
            times = [
                (seconds(embedder.encode, items), seconds(peer.encode, inputs))
                for _ in range(rounds)
            ]
            rows.append(
                Row(
                    case=name,
                    tokens=inputs["input_ids"].numel(),
                    shape=shape,
                    dtype=dtype,
                    backend=embedder.backend,
                    ours_s=round(statistics.median(a for a, _ in times), 4),
                    peer=peer.name,
                    peer_s=round(statistics.median(b for _, b in times), 4),
                    speedup=round(statistics.median(b / a for a, b in times), 3),
                    distance=float(f"{np.linalg.norm(ours - theirs, axis=1).max():.2e}"),
                    rounds=rounds,
                    threads=torch.get_num_threads(),
                    isa=_C.isa(),
                    machine=machine(),
                    torch=torch.__version__,
                    commit=commit(),
                )
            )
            print(rows[-1])
    return rows


def append(rows: Sequence[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="2b", help="random weights of this shape")
    parser.add_argument("--model", type=Path, help="a checkpoint folder instead")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        model = options.model
        if model is None:
            model = write_checkpoint(Path(scratch) / "model", options.shape, dtype="bfloat16")
        rows = run(model, options.shape, options.dtype, options.rounds, options.only)
    append(rows, options.out)


if __name__ == "__main__":
    main()
