"""`qvlfast._C`: patches against a plain reference, threads, forks, and the two variables."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvlfast import _C

ISAS = ("scalar", "avx2", "avx512", "amx")


def reference_patches(frames: np.ndarray, patch: int, temporal: int, merge: int) -> np.ndarray:
    """The definition, one patch at a time. uint8 [T, H, W, 3] to [N, K]."""
    total, height, width, _ = frames.shape
    depth = 1 if total == 1 else temporal
    side = patch * merge
    rows = []
    for t in range(0, total, depth):
        for top in range(0, height, side):
            for left in range(0, width, side):
                for y in range(top, top + side, patch):
                    for x in range(left, left + side, patch):
                        cube = frames[t : t + depth, y : y + patch, x : x + patch]
                        rows.append(cube.transpose(3, 0, 1, 2).reshape(-1))
    return np.stack(rows)


def random_frames(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("QVLFAST_")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@settings(max_examples=150, deadline=None)
@given(
    frames=st.sampled_from([1, 2, 4, 6, 12]),
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    patch=st.sampled_from([1, 3, 8, 14, 16, 17, 32, 33]),
    temporal=st.sampled_from([1, 2]),
    merge=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_patches_equal_reference(
    frames: int, rows: int, columns: int, patch: int, temporal: int, merge: int, seed: int
) -> None:
    pixels = random_frames((frames, rows * patch * merge, columns * patch * merge, 3), seed)
    got = _C.extract_patches(pixels, patch, temporal, merge)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, reference_patches(pixels, patch, temporal, merge))


@pytest.mark.parametrize("frames", [1, 2, 4, 6])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_patches_of_a_large_picture(frames: int, threads: int) -> None:
    before = _C.num_threads()
    pixels = random_frames((frames, 7 * 32, 33 * 32, 3))
    _C.set_num_threads(threads)
    try:
        got = _C.extract_patches(pixels, 16, 2, 2)
    finally:
        _C.set_num_threads(before)
    np.testing.assert_array_equal(got, reference_patches(pixels, 16, 2, 2))


def test_the_last_frame_of_a_buffer_is_not_read_past() -> None:
    pixels = random_frames((3, 32, 32, 3))[2:]
    np.testing.assert_array_equal(
        _C.extract_patches(pixels, 16, 2, 2), reference_patches(pixels, 16, 2, 2)
    )


def test_read_only_frames_are_accepted() -> None:
    pixels = random_frames((1, 32, 32, 3))
    pixels.flags.writeable = False
    assert _C.extract_patches(pixels, 16, 2, 2).shape == (4, 768)


@pytest.mark.parametrize("dtype", [np.float32, np.int8, np.uint16, np.bool_])
def test_wrong_dtype(dtype: type) -> None:
    with pytest.raises(TypeError, match=f"must be uint8, got {np.dtype(dtype)}"):
        _C.extract_patches(np.zeros((1, 32, 32, 3), dtype), 16, 2, 2)


def test_not_an_array() -> None:
    with pytest.raises(TypeError):
        _C.extract_patches([[[[0, 0, 0]]]], 1, 1, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((32, 32, 3), r"\[T, H, W, 3\], got shape \(32, 32, 3\)"),
        ((1, 3, 32, 32), r"got shape \(1, 3, 32, 32\)"),
        ((1, 32, 32, 4), r"got shape \(1, 32, 32, 4\)"),
        ((0, 32, 32, 3), "T=0"),
        ((3, 32, 32, 3), "T=3 must be 1 or a multiple of temporal=2"),
        ((1, 48, 32, 3), r"H=48 must be a positive multiple of patch\*merge=16\*2"),
        ((1, 32, 33, 3), r"W=33 must be a positive multiple of patch\*merge=16\*2"),
        ((1, 0, 32, 3), "H=0"),
        ((1, 32, 0, 3), "W=0"),
    ],
)
def test_wrong_shape(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _C.extract_patches(np.zeros(shape, np.uint8), 16, 2, 2)


@pytest.mark.parametrize("name", ["patch", "temporal", "merge"])
@pytest.mark.parametrize("value", [0, -1])
def test_wrong_number(name: str, value: int) -> None:
    arguments = {"patch": 16, "temporal": 2, "merge": 2} | {name: value}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got {value}"):
        _C.extract_patches(np.zeros((1, 32, 32, 3), np.uint8), **arguments)


@pytest.mark.parametrize("name", ["patch", "merge"])
def test_a_number_too_large_for_its_product(name: str) -> None:
    arguments = {"patch": 16, "temporal": 2, "merge": 2} | {name: 2**62}
    with pytest.raises(ValueError, match="H=32 must be"):
        _C.extract_patches(np.zeros((1, 32, 32, 3), np.uint8), **arguments)


def test_wrong_strides() -> None:
    pixels = random_frames((2, 64, 64, 3))
    for view in (pixels[:, ::2, ::2], pixels[:, :32, :32], pixels[::-1], pixels.swapaxes(1, 2)):
        with pytest.raises(ValueError, match=r"C-contiguous, got strides \("):
            _C.extract_patches(view, 16, 2, 2)


def test_many_python_threads() -> None:
    shapes = [(1, 64, 640, 3), (4, 96, 320, 3), (2, 32, 32, 3), (1, 320, 320, 3)]
    cases = [random_frames(shape, seed) for seed, shape in enumerate(shapes)]
    wanted = [reference_patches(case, 16, 2, 2) for case in cases]

    def work(index: int) -> None:
        for step in range(40):
            chosen = (index + step) % len(cases)
            got = _C.extract_patches(cases[chosen], 16, 2, 2)
            np.testing.assert_array_equal(got, wanted[chosen])

    with ThreadPoolExecutor(12) as executor:
        list(executor.map(work, range(12)))


def test_threads_may_change_while_others_compute() -> None:
    before = _C.num_threads()
    pixels = random_frames((2, 192, 640, 3))
    wanted = reference_patches(pixels, 16, 2, 2)

    def work(index: int) -> None:
        for step in range(60):
            if index == 0:
                _C.set_num_threads(1 + step % 6)
            np.testing.assert_array_equal(_C.extract_patches(pixels, 16, 2, 2), wanted)

    try:
        with ThreadPoolExecutor(4) as executor:
            list(executor.map(work, range(4)))
    finally:
        _C.set_num_threads(before)


FORK = """
import os, sys, threading, warnings
import numpy as np
from qvlfast import _C
warnings.simplefilter("ignore", DeprecationWarning)  # Python's own, on forks beside threads
_C.set_num_threads(3)
pixels = np.random.default_rng(0).integers(0, 256, (2, 640, 640, 3), dtype=np.uint8)
wanted = _C.extract_patches(pixels, 16, 2, 2)
stop = threading.Event()
def busy():
    while not stop.is_set():
        _C.extract_patches(pixels, 16, 2, 2)
threads = [threading.Thread(target=busy) for _ in range(2)]
for thread in threads:
    thread.start()
for _ in range(20):
    child = os.fork()
    if child == 0:
        same = all((_C.extract_patches(pixels, 16, 2, 2) == wanted).all() for _ in range(3))
        os._exit(0 if same and _C.num_threads() == 3 else 1)
    if os.waitpid(child, 0)[1] != 0:
        stop.set()
        sys.exit("a child failed")
stop.set()
for thread in threads:
    thread.join()
assert (_C.extract_patches(pixels, 16, 2, 2) == wanted).all()
print("ok")
"""


def test_forked_children_get_their_own_pool() -> None:
    done = run_python(FORK)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


def test_features_are_named_and_boolean() -> None:
    features = _C.cpu_features()
    assert {"avx2", "bmi1", "bmi2", "avx512_vnni", "amx_int8", "neon", "i8mm"} <= features.keys()
    assert all(type(value) is bool for value in features.values())
    assert not (features["neon"] and features["avx2"])


@pytest.mark.parametrize("wanted", ISAS)
def test_isa_is_forced_or_refused(wanted: str) -> None:
    best = run_python("from qvlfast import _C; print(_C.isa())").stdout.strip()
    done = run_python("from qvlfast import _C; print(_C.isa())", QVLFAST_ISA=wanted)
    if ISAS.index(wanted) <= ISAS.index(best):
        assert (done.returncode, done.stdout.strip()) == (0, wanted), done.stderr
    else:
        assert done.returncode != 0
        assert f"ValueError: QVLFAST_ISA={wanted} is more than this processor has" in done.stderr
        assert f"the best here is {best}" in done.stderr


def test_an_unknown_isa_is_refused_each_time_it_is_used() -> None:
    code = """
import numpy as np
from qvlfast import _C
for use in (_C.isa, _C.isa, lambda: _C.extract_patches(np.zeros((1, 32, 32, 3), "u1"), 16, 2, 2)):
    try:
        use()
    except ValueError as error:
        print(error)
"""
    done = run_python(code, QVLFAST_ISA="sse9")
    line = "QVLFAST_ISA=sse9 is unknown; use scalar, avx2, avx512 or amx\n"
    assert (done.returncode, done.stdout) == (0, 3 * line), done.stderr


@pytest.mark.parametrize("isa", ["scalar", ""])
def test_patches_are_the_same_for_every_isa(isa: str) -> None:
    code = """
import sys, numpy as np
from qvlfast import _C
pixels = np.random.default_rng(0).integers(0, 256, (2, 96, 96, 3), dtype=np.uint8)
print(_C.extract_patches(pixels, 16, 2, 2).tobytes().hex())
"""
    pixels = random_frames((2, 96, 96, 3))
    done = run_python(code, QVLFAST_ISA=isa)
    assert done.stdout.strip() == reference_patches(pixels, 16, 2, 2).tobytes().hex(), done.stderr


@pytest.mark.parametrize("threads", ["1", "3", "1024"])
def test_threads_of_the_environment(threads: str) -> None:
    done = run_python("from qvlfast import _C; print(_C.num_threads())", QVLFAST_THREADS=threads)
    assert (done.returncode, done.stdout.strip()) == (0, threads), done.stderr


@pytest.mark.parametrize("threads", ["0", "-1", "1025", "two", "2x", "9" * 30])
def test_wrong_threads_of_the_environment(threads: str) -> None:
    done = run_python("from qvlfast import _C; print(_C.num_threads())", QVLFAST_THREADS=threads)
    assert done.returncode != 0
    assert f"must be a whole number in 1..1024, got '{threads}'" in done.stderr


def test_threads_follow_the_affinity_mask() -> None:
    code = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from qvlfast import _C
print(_C.num_threads())
"""
    assert run_python(code).stdout.strip() == "1"


@pytest.mark.parametrize("n", [0, -1, 1025])
def test_wrong_number_of_threads(n: int) -> None:
    with pytest.raises(ValueError, match=f"must be in 1..1024, got {n}"):
        _C.set_num_threads(n)
