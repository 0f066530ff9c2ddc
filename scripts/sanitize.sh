#!/usr/bin/env bash
# csrc under sanitizers: the extension with address and undefined-behaviour checks and the tests of
# tests/test_native.py, then the thread pool with the thread sanitizer. Usage: sanitize.sh PYTHON
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
cxx=${CXX:-g++}
out=build/sanitize
rm -rf "$out"
mkdir -p "$out/qvlfast"
common=(-std=c++17 -g -O1 -fno-omit-frame-pointer -Wall -Wextra -Werror -pthread)

echo "== address and undefined-behaviour sanitizers"
suffix=$("$python" -c "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))")
includes=$("$python" -m pybind11 --includes)
# shellcheck disable=SC2086 # several -I words
"$cxx" "${common[@]}" -fsanitize=address,undefined -fno-sanitize-recover=all -fPIC -shared \
    -fvisibility=hidden $includes csrc/*.cpp -o "$out/qvlfast/_C$suffix"
# A package of its own, so that the ordinary build beside the sources is not the one tested.
touch "$out/qvlfast/__init__.py"
cp tests/test_native.py "$out/"
# libstdc++ beside libasan: else the latter does not find the functions of exceptions to wrap.
preload="$("$cxx" -print-file-name=libasan.so) $("$cxx" -print-file-name=libstdc++.so)"
(
    cd "$out"
    export PYTHONPATH=. LD_PRELOAD=$preload ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
    "$python" -c "from qvlfast import _C; assert 'sanitize' in _C.__file__, _C.__file__"
    # capture=sys: the sanitizers write to the file descriptor, and pytest would keep that.
    "$python" -m pytest -q --capture=sys -c /dev/null --rootdir=. -p no:cacheprovider test_native.py
)

echo "== thread sanitizer"
"$cxx" "${common[@]}" -fsanitize=thread tests/native/native_test.cpp \
    $(ls csrc/*.cpp | grep -v module.cpp) -o "$out/native_test"
TSAN_OPTIONS=halt_on_error=1 "$out/native_test"
