#!/usr/bin/env bash
# csrc under sanitizers: the extension with address and undefined-behaviour checks and the tests of
# its parts; the same with AVX-512 and AMX emulated, so that those kernels are checked on every
# processor; then the thread pool with the thread sanitizer. Usage: sanitize.sh PYTHON
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
cxx=${CXX:-g++}
out=build/sanitize
rm -rf "$out"
common=(-std=c++17 -g -O1 -fno-omit-frame-pointer -Wall -Wextra -Werror -pthread)
checked=(-fsanitize=address,undefined -fno-sanitize-recover=all)
suffix=$("$python" -c "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))")
read -ra includes <<<"$("$python" -m pybind11 --includes)"

# extension FOLDER FLAG...: csrc as a package of its own in FOLDER, so that the ordinary build beside
# the sources is not the one tested. One compiler a core.
extension() {
    local folder=$1
    shift
    mkdir -p "$folder/qvlfast"
    touch "$folder/qvlfast/__init__.py"
    printf '%s\n' csrc/*.cpp | xargs -P "$(nproc)" -I{} sh -c \
        'source=$1 folder=$2; shift 2; exec "$@" -c "$source" -o "$folder/$(basename "$source").o"' \
        sh {} "$folder" "$cxx" "${common[@]}" -fPIC -fvisibility=hidden "$@" "${includes[@]}"
    "$cxx" "${common[@]}" -shared "$@" "$folder"/*.o -o "$folder/qvlfast/_C$suffix"
}

# run FOLDER ARGUMENT...: pytest there. libstdc++ beside libasan: else the latter does not find the
# functions of exceptions to wrap. capture=sys: the sanitizers write to the file descriptor, and
# pytest would keep that.
preload="$("$cxx" -print-file-name=libasan.so) $("$cxx" -print-file-name=libstdc++.so)"
run() {
    local folder=$1
    shift
    cp tests/test_native.py tests/test_native_ops.py tests/test_native_limits.py "$folder/"
    (
        cd "$folder"
        export PYTHONPATH=. LD_PRELOAD=$preload
        export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
        "$python" -c "from qvlfast import _C; assert 'sanitize' in _C.__file__, _C.__file__"
        "$python" -m pytest -q --capture=sys -c /dev/null --rootdir=. -p no:cacheprovider "$@"
    )
}

echo "== address and undefined-behaviour sanitizers"
extension "$out/plain" "${checked[@]}"
run "$out/plain" test_native.py test_native_ops.py test_native_limits.py

echo "== the same with AVX-512 and AMX emulated"
# Vectors of 64 bytes are passed in memory then, which the compiler remarks on.
extension "$out/emulated" "${checked[@]}" -DQVLFAST_EMULATE -Wno-psabi
run "$out/emulated" test_native_ops.py -k "avx512 or amx or refused or exponentials"
run "$out/emulated" test_native_limits.py

echo "== thread sanitizer"
read -ra sources <<<"$(find csrc -name '*.cpp' ! -name 'module.cpp' ! -name 'bind_*' | tr '\n' ' ')"
"$cxx" "${common[@]}" -fsanitize=thread tests/native/native_test.cpp "${sources[@]}" \
    -o "$out/native_test"
TSAN_OPTIONS=halt_on_error=1 "$out/native_test"
