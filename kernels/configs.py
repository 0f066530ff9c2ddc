"""Block sizes of the matrix products: a static table, and the pure function that reads it.

    python -m qvlfast.kernels.configs      print what every target gets for the model's shapes

The numbers come from reasoning, written beside them; registers and shared memory were read from
the machine code (benchmarks/results/aot.csv). Where measured.py has an entry, that goes first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .measured import PRODUCTS

TARGETS = ("sm_80", "sm_87", "sm_89", "sm_90", "sm_100", "sm_110", "sm_120")

# Multiprocessors of the largest common part of each, from the vendor's data sheets.
PROCESSORS = {
    "sm_80": 108,  # A100
    "sm_87": 16,  # Orin
    "sm_89": 128,  # 4090
    "sm_90": 132,  # H100
    "sm_100": 148,  # B200
    "sm_110": 20,  # Thor
    "sm_120": 170,  # 5090
}


def nearest(target: str) -> str:
    """The one of :data:`TARGETS` whose blocks a GPU gets: itself, or the newest that is older, as
    sm_80 for sm_86 and sm_120 for sm_121. sm_80's fit into the shared memory of all.

    Raises:
        ValueError: all are newer.
    """
    known = [t for t in TARGETS if _number(t) <= _number(target)]
    if not known:
        raise ValueError(f"{target} is older than {TARGETS[0]}, with which the kernels begin")
    return known[-1]


def _number(target: str) -> int:
    return int(target.removeprefix("sm_"))


# Where tensor descriptors feed the matrix unit: on sm_80 to 89 there are none (they compile to
# plain loads), and sm_120 multiplies from registers, which cp.async serves as well.
DESCRIPTOR_TARGETS = ("sm_90", "sm_100", "sm_110")

INT4_ROWS = 64
"""The most int8 rows that are multiplied by 4 bits: above it a product is bound by arithmetic."""


@dataclass(frozen=True)
class GemmConfig:
    """How a product is cut.

    Attributes:
        m, n: rows and outputs of a program; a gated product reads 2n weight rows for n outputs.
        k: inputs at a time.
        split: programs that share one block, each with a part of the inputs.
        descriptors: loads go through tensor descriptors (TMA) instead of pointers.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    split: int = 1
    descriptors: bool = False

    @classmethod
    def of(cls, blocks: tuple[int, ...]) -> GemmConfig:
        """From m, n, k, warps and stages."""
        m, n, k, warps, stages = blocks
        return cls(m, n, k, warps, stages)


# (kind, target or *, most rows) → blocks. A product of few rows is bound by reading the weight:
# narrow blocks make enough programs, and 4 stages of a deep k keep loads in flight; k halves from
# one kind to the next as a value grows from 1 to 4 bytes. One of many rows is bound by arithmetic:
# 128 × 128 is the largest block whose 3 stages (96 KB) fit every target; sm_90 and sm_100 have
# 227 KB and wider matrix units, which want 256 columns. float32 multiplies on the plain units, so
# its blocks are small enough for registers. The other entries for single targets are where the
# machine code of the general one spilled a few registers.
_MANY = 1 << 31
_TABLE: dict[tuple[str, str, int], GemmConfig] = {
    ("float32", "*", 16): GemmConfig(16, 64, 32, warps=4, stages=2),
    ("float32", "*", _MANY): GemmConfig(64, 64, 32, warps=8, stages=2),
    ("float16", "*", 16): GemmConfig(16, 64, 128, warps=8, stages=4),
    ("float16", "*", 64): GemmConfig(64, 64, 64, warps=4, stages=4),
    ("float16", "sm_100", 64): GemmConfig(64, 64, 64, warps=8, stages=4),
    ("float16", "*", _MANY): GemmConfig(128, 128, 64, warps=8, stages=3),
    ("float16", "sm_90", _MANY): GemmConfig(128, 256, 64, warps=8, stages=3),
    ("float16", "sm_100", _MANY): GemmConfig(128, 256, 64, warps=8, stages=3),
    ("int8", "*", 16): GemmConfig(16, 64, 256, warps=4, stages=4),
    ("int8", "*", 64): GemmConfig(64, 64, 128, warps=4, stages=4),
    ("int8", "*", _MANY): GemmConfig(128, 128, 128, warps=8, stages=3),
    ("fp8", "*", 16): GemmConfig(16, 64, 128, warps=4, stages=4),
    ("fp8", "*", 64): GemmConfig(64, 64, 128, warps=4, stages=4),
    ("fp8", "*", _MANY): GemmConfig(128, 128, 128, warps=8, stages=3),
    # e4m3 with a scale a block of 128 inputs: k may not be more, and no parts are added up later.
    ("fp8_blocks", "*", 16): GemmConfig(16, 64, 128, warps=4, stages=4),
    ("fp8_blocks", "*", 64): GemmConfig(64, 64, 128, warps=4, stages=4),
    ("fp8_blocks", "*", _MANY): GemmConfig(128, 128, 128, warps=8, stages=3),
    ("fp8_blocks", "sm_120", _MANY): GemmConfig(128, 64, 128, warps=8, stages=3),
    # k is that of one half: a byte holds two inputs, a group apart. See gemm_int4.py.
    ("int4", "*", 16): GemmConfig(16, 64, 64, warps=4, stages=4),
    ("int4", "*", 64): GemmConfig(64, 64, 64, warps=4, stages=4),
    ("int4", "sm_110", 64): GemmConfig(64, 64, 64, warps=8, stages=4),
    # The same weights by float rows, k again of one half. Of x a stage has both halves, in 16 bits:
    # of many rows k is 32, so that 3 stages and the widened block (76 KB) fit every target. Each
    # half has its own sums, so blocks are no larger, and the weight's bytes are read once for both.
    ("int4_float", "*", 16): GemmConfig(16, 64, 64, warps=4, stages=4),
    ("int4_float", "sm_80", 16): GemmConfig(16, 64, 64, warps=8, stages=4),
    ("int4_float", "*", 64): GemmConfig(64, 64, 64, warps=4, stages=3),
    ("int4_float", "sm_120", 64): GemmConfig(64, 64, 32, warps=4, stages=4),
    ("int4_float", "*", _MANY): GemmConfig(128, 128, 32, warps=8, stages=3),
}
KINDS = ("float32", "float16", "int8", "fp8", "fp8_blocks", "int4_float", "int4")


def gemm_config(
    kind: str,
    target: str,
    m: int,
    n: int,
    k: int,
    *,
    activation: str = "none",
    gated: bool = False,
    residual: bool = False,
) -> GemmConfig:
    """Blocks for an ``[m, k]`` by ``[n, k]`` product.

    Args:
        kind: of the operands, one of :data:`KINDS`; ``float16`` stands for bfloat16 too.
        target: ``sm_89`` and the like, or ``interpreter``, which pays by the program, so that
            blocks there are as large as NumPy handles well. See :func:`nearest` for others.
        n: outputs, after gating.
        activation, gated, residual: what follows the product; it needs registers too.
    """
    if target == "interpreter":
        most = 128 if kind == "int4" else 512
        bm, bn, bk = (min(most, max(16, 1 << max(size - 1, 0).bit_length())) for size in (m, n, k))
        return GemmConfig(bm, bn, bk, warps=4, stages=1)
    target = nearest(target)
    rows = row_class(kind, m)
    measured = PRODUCTS.get((kind, target, rows, gated))
    config = (
        GemmConfig.of(measured.blocks) if measured else reasoned(kind, target, rows, gated=gated)
    )
    return fitted(
        config, kind, target, m, n, k, activation=activation, gated=gated, residual=residual
    )


def row_class(kind: str, m: int) -> int:
    """The most rows that have the same blocks as ``m`` rows."""
    return next(r for r in (16, 64, _MANY) if m <= r and (kind, "*", r) in _TABLE)


def reasoned(kind: str, target: str, rows: int, *, gated: bool = False) -> GemmConfig:
    """The table's blocks of a class of rows, whether measured ones replace them or not."""
    config = _TABLE.get((kind, target, rows)) or _TABLE[kind, "*", rows]
    return replace(config, n=config.n // 2) if gated else config


def fitted(
    config: GemmConfig,
    kind: str,
    target: str,
    m: int,
    n: int,
    k: int,
    *,
    activation: str = "none",
    gated: bool = False,
    residual: bool = False,
) -> GemmConfig:
    """``config`` for one product: narrower where it must be, split, and with descriptors.

    Args:
        config: of the class of rows; the others are those of :func:`gemm_config`.
    """
    wide = config.n * (2 if gated else 1) >= 256
    if wide and (n < 1024 or activation == "gelu_erf" or residual):
        # Few columns of programs; erf's polynomials, or a block of the residual, do not fit in
        # registers beside the sums.
        config = replace(config, n=config.n // 2)
    if m <= 16 and kind not in ("float32", "fp8_blocks") and not gated:
        tiles = -(-m // config.m) * -(-n // config.n)
        config = replace(config, split=split_of(target, tiles, k // config.k))
    if m > 16 and target in DESCRIPTOR_TARGETS and kind not in ("float32", "int4", "int4_float"):
        config = replace(config, descriptors=True)
    return config


def split_of(target: str, tiles: int, steps: int) -> int:
    """Into how many parts to cut K, a power of two up to 8.

    As many as there are multiprocessors left for, and no part of less than 4 steps, below which
    it ends before its loads have come in.
    """
    split = 1
    while split < 8 and 2 * split * tiles <= PROCESSORS[target] and 2 * split * 4 <= steps:
        split *= 2
    return split


def main() -> None:
    """Print the table as it is used."""
    shapes = [
        ("q, o", 2048, 2048, False),
        ("k, v", 2048, 2048, False),
        ("gate, up", 6144, 2048, True),
        ("down", 2048, 6144, False),
        ("8B gate, up", 12288, 4096, True),
        ("8B down", 4096, 12288, False),
        ("8B fc1", 4304, 1152, False),
    ]
    print("target kind       rows  layer        m × n × k      warps stages split descriptors from")
    for target in TARGETS:
        for kind in KINDS:
            for m in (1, 64) if kind == "int4" else (1, 64, 4096):
                for layer, n, k, gated in shapes:
                    c = gemm_config(kind, target, m, n, k, gated=gated)
                    blocks = f"{c.m} × {c.n} × {c.k}"
                    measured = (kind, target, row_class(kind, m), gated) in PRODUCTS
                    print(
                        f"{target:6} {kind:10} {m:4}  {layer:12} {blocks:14} {c.warps:5} "
                        f"{c.stages:6} {c.split:5} {'yes' if c.descriptors else 'no':11} "
                        f"{'measurement' if measured else 'reasoning'}"
                    )


if __name__ == "__main__":
    main()
