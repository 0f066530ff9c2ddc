#!/usr/bin/env bash
# csrc on aarch64: the tests without Python run under qemu; the whole extension is compiled and
# linked, and not run. Usage: aarch64.sh PYTHON
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
cxx=aarch64-linux-gnu-g++
qemu=qemu-aarch64
out=build/aarch64

if ! command -v "$cxx" >/dev/null || ! command -v "$qemu" >/dev/null; then
    if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
        echo "needs $cxx and $qemu: apt-get install g++-aarch64-linux-gnu qemu-user" >&2
        exit 1
    fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq g++-aarch64-linux-gnu qemu-user
fi

rm -rf "$out"
mkdir -p "$out/include"
common=(-std=c++17 -O3 -Wall -Wextra -Werror -fvisibility=hidden -pthread)

echo "== aarch64: csrc under qemu"
"$cxx" "${common[@]}" -DUNDER_QEMU tests/native/native_test.cpp $(ls csrc/*.cpp | grep -vE 'module|bind_') \
    -o "$out/native_test"
"$qemu" -L /usr/aarch64-linux-gnu "$out/native_test"

echo "== aarch64: the extension, compiled and linked"
# Python's headers are the same on both but for pyconfig.h, which holds nothing that differs between
# two 64-bit little-endian Linux systems. Debian's looks for it in a folder named after the machine.
config=$("$python" -c "import sysconfig; print(sysconfig.get_config_h_filename())")
version=$("$python" -c "import sys; print('python%d.%d' % sys.version_info[:2])")
mkdir -p "$out/include/aarch64-linux-gnu/$version"
real=$(find /usr/include/*-linux-gnu/"$version"/pyconfig.h 2>/dev/null | head -n 1 || true)
cp "${real:-$config}" "$out/include/aarch64-linux-gnu/$version/pyconfig.h"
includes=$("$python" -m pybind11 --includes)
# shellcheck disable=SC2086 # several -I words
"$cxx" "${common[@]}" -fPIC -shared -I"$out/include" $includes csrc/*.cpp -o "$out/_C.so"
file_type=$(aarch64-linux-gnu-readelf -h "$out/_C.so" | grep Machine)
echo "$file_type"
aarch64-linux-gnu-nm -D --defined-only "$out/_C.so" | grep PyInit__C >/dev/null
