"""Memory of the CPU backend: while weights are packed, and over many calls."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.checkpoints import write_checkpoint

MIB = 2**20

# Most anonymous memory before and after loading, and after each hundred calls, in bytes. Pages of
# mapped files are not counted: they leave as soon as something else wants the memory.
PROGRAM = """
import json, sys, threading, time
import numpy as np
from qvlfast import Embedder

most = 0

def watch():
    global most
    while True:
        text = open("/proc/self/status").read()
        most = max(most, 1024 * int(text.split("RssAnon:")[1].split()[0]))
        time.sleep(0.002)

folder, quantization, calls = sys.argv[1], sys.argv[2], int(sys.argv[3])
Embedder.from_pretrained(sys.argv[4], device="cpu").close()  # imports, tokenizer, thread pool
threading.Thread(target=watch, daemon=True).start()
time.sleep(0.1)
seen = [most]
form = None if quantization == "none" else quantization
embedder = Embedder.from_pretrained(folder, device="cpu", dtype="bfloat16", quantization=form)
time.sleep(0.1)
seen.append(most)
rng = np.random.default_rng(0)
for call in range(calls):
    embedder.encode(["word " * int(rng.integers(1, 60)) for _ in range(int(rng.integers(1, 5)))])
    if call % 100 == 99:
        seen.append(most)
print(json.dumps(seen))
"""


def peaks(folder: Path, quantization: str, calls: int, tiny: Path) -> list[int]:
    arguments = [str(folder), quantization, str(calls), str(tiny)]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(("quantization", "share"), [("none", 1.0), ("int8", 0.5), ("int4", 0.27)])
def test_loading_takes_the_packed_weights_and_one_shard(
    quantization: str, share: float, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """``share`` is the size of packed linears by that of bfloat16."""
    shape = {"hidden": 1024, "layers": 14, "ffn": 4096, "heads": 8, "kv_heads": 4, "vocab": 151936}
    folder = write_checkpoint(tmp_path / "model", shape, dtype="bfloat16", shards=3)
    shards = [path.stat().st_size for path in folder.glob("*.safetensors")]
    table = 2 * 151936 * 1024  # of the token embedding, which stays in the mapped file
    packed = share * (sum(shards) - table)
    before, after = peaks(folder, quantization, 0, tiny_checkpoint)
    allowed = 1.1 * packed + max(shards)
    assert after - before < allowed, f"{(after - before) / MIB:.0f} of {allowed / MIB:.0f} MiB"
    assert after - before > 0.5 * packed, "far less than the packed weights: nothing was measured"


@pytest.mark.slow
def test_a_thousand_calls_do_not_grow(tiny_checkpoint: Path) -> None:
    _, _, *later = peaks(tiny_checkpoint, "int8", 1000, tiny_checkpoint)
    # After the first hundreds every size of scratch memory and cache has been met; 8 MiB are what
    # malloc's arenas still move by.
    assert later[-1] - later[2] < 8 * MIB, [value // MIB for value in later]
