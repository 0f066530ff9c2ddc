#!/usr/bin/env bash
# The extension on lesser x86-64 processors, under qemu: an instruction that they lack would end the
# process. Haswell has AVX2 and no AVX-512, Nehalem neither. Usage: lesser_x86.sh PYTHON
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
qemu=qemu-x86_64

if [ "$(uname -m)" != x86_64 ]; then
    echo "== lesser x86-64 processors: not on $(uname -m)"
    exit 0
fi
if ! command -v "$qemu" >/dev/null; then
    if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
        echo "needs $qemu: apt-get install qemu-user" >&2
        exit 1
    fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq qemu-user
fi

# run CPU ISA: products, rounding, attention and the trained embedder, with the best that there is.
run() {
    echo "== $1: $2"
    # qemu remarks on features of the model that it does not have.
    "$qemu" -cpu "$1" "$python" -m pytest -q -c /dev/null --rootdir=tests -p no:cacheprovider \
        tests/test_native_ops.py -k "sums_are_exact or activations or depth or ropes or rounded" \
        2> >(grep -v "TCG doesn't support" >&2)
    "$qemu" -cpu "$1" "$python" - "$2" 2> >(grep -v "TCG doesn't support" >&2) <<'PYTHON'
import sys
from qvlfast import Embedder, _C
from qvlfast.gallery import EMBEDDER

assert _C.isa() == sys.argv[1], _C.isa()
for quantization in (None, "int8", "int4"):
    with Embedder.from_pretrained(EMBEDDER, device="cpu", quantization=quantization) as embedder:
        a, b, c = embedder.encode(["pizza", "pizza", "dog"])
    print(quantization, f"{a @ b:.5f} {a @ c:.5f}")
    assert a @ b > 0.9999 and a @ c < 0.9
PYTHON
}

run Haswell avx2
run Nehalem scalar
