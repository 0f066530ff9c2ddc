"""What ``qvlfast warmup`` walks, what it refuses, and that nothing is left to compile after it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from qvlfast.kernels.attention import attention_config
from qvlfast.kernels.configs import KINDS, TARGETS, gemm_config

from qvlfast.cli import main
from qvlfast.config import load_config
from qvlfast.warmup import _LENGTHS, batches, compile_model

ROOT = Path(__file__).resolve().parents[1]


def test_the_batches_have_every_class_of_rows(tiny_checkpoint: Path) -> None:
    found = list(batches(load_config(tiny_checkpoint)))
    tokens = {len(batch.ids) for batch in found}
    reads = {len(batch.read) for batch in found}
    for target in TARGETS:
        for kind in KINDS[:-1]:
            for n, k in ((2048, 2048), (6144, 2048), (2048, 6144)):
                every = {gemm_config(kind, target, m, n, k) for m in range(1, 2000)}
                assert every == {gemm_config(kind, target, m, n, k) for m in tokens}
                assert every == {gemm_config(kind, target, m, n, k) for m in reads}
        for group in (1, 2, 4, 8):
            every = {
                attention_config(target, torch.bfloat16, 128, group * i) for i in range(1, 999)
            }
            own = {attention_config(target, torch.bfloat16, 128, group * i) for i in _LENGTHS}
            assert every == own
    assert any((batch.forest.parent >= 0).any() for batch in found)
    stills = [b for b in found if b.vision is not None and len(b.vision.stills)]
    videos = [b for b in found if b.vision is not None and len(b.vision.videos)]
    assert len(stills) == 4 and len(videos) == 1


def test_where_there_is_no_gpu(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["warmup", str(tiny_checkpoint)]) == 2
    assert "nothing to warm up. To compile for a GPU elsewhere" in capsys.readouterr().err
    assert main(["warmup", str(tiny_checkpoint), "--target", "sm_75"]) == 2
    assert "'sm_75' is unknown" in capsys.readouterr().err


def test_the_interpreter_compiles_nothing(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["warmup", str(tiny_checkpoint), "--target", "sm_80"]) == 2
    assert "TRITON_INTERPRET=1 is set, which compiles nothing" in capsys.readouterr().err


SCRIPT = """
import json, sys
import numpy as np, torch
from pathlib import Path
from qvlfast.batch import Cut, pack
from qvlfast.config import load_config
from qvlfast.stand_in import META, Setup, shortened, stand_in_prompt, stand_in_weights
from qvlfast.model import Model
from qvlfast.backends.triton import TritonOps
from qvlfast.kernels.ahead import compiling_for
from qvlfast.warmup import compile_model

config = load_config(Path(sys.argv[1]))
setup = Setup(torch.bfloat16, "triton", lambda n: "int8" if "layers" in n else "float")
made = compile_model(config, setup, "sm_80", reranker=False)
small, rng = shortened(config), np.random.default_rng()
def prepare(parts, bias, *, rows, gated): return TritonOps.prepare(parts, bias, gated=gated)
with compiling_for("sm_80") as compiler:
    model = Model(small, stand_in_weights(small, setup, prepare), TritonOps(META))
    for _ in range(30):
        prompts = []
        for _ in range(rng.integers(1, 40)):
            h, w = 2 * rng.integers(1, 12, 2)
            kind = rng.integers(0, 8)
            grid = (int(kind == 7) + 1, int(h), int(w)) if kind > 5 else (0, 0, 0)
            tokens = int(rng.integers(1, 300))
            prompts.append(stand_in_prompt(config, tokens, grid, is_video=kind == 7))
        model.forward(pack(prompts, 2, META, share=bool(rng.integers(2))).batch)
        hidden = torch.empty(9, small.text.hidden_size, device=META, dtype=torch.bfloat16)
        size = [None, int(rng.integers(2, small.text.hidden_size + 1))][rng.integers(2)]
        model.head(hidden, [Cut(size, np.arange(rng.integers(1, 10)))])
extra = {op: len(new) for op, new in compiler.compiled.items()}
print(json.dumps([made, extra]))
"""


@pytest.mark.slow
def test_nothing_is_left_to_compile(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Random batches of every kind launch no kernel that the walk has not compiled."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tiny_checkpoint)],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    made, extra = json.loads(done.stdout.splitlines()[-1])
    assert made["linear_int8"] >= 3 and made["attention"] >= 3 and made["patch_embed"] >= 2
    assert {op: count for op, count in extra.items() if count > made.get(op, 0)} == {}


def test_an_operand_that_is_refused_is_named(tiny_checkpoint: Path) -> None:
    from qvlfast.errors import BackendError
    from qvlfast.stand_in import Setup

    with pytest.raises(BackendError, match="backend 'triton' refuses compiling"):
        compile_model(load_config(tiny_checkpoint), Setup(torch.bfloat16, "triton"), "sm_90")
