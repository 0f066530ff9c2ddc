"""What ``verify`` accepts, and how it prints what it found."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Tolerance:
    """The most by which the two may differ.

    Attributes:
        distance: of unit vectors; d is a cosine of 1 − d²/2.
        score: of scores, which lie between 0 and 1.
    """

    distance: float
    score: float


# Two float32 implementations that sum in different orders differ by about 1e-5. 16-bit weights
# and activations put either one as far from the exact result as the two are from each other;
# with random weights, which are the worst case, that is a distance of 0.03 (bfloat16) and 0.004
# (float16). A wrong template, a missing instruction or a wrong resize shows as 0.2 and more.
TOLERANCES = {
    "float32": Tolerance(1e-4, 1e-4),
    "float16": Tolerance(0.02, 0.01),
    "bfloat16": Tolerance(0.1, 0.05),
}

# With the exact result known: how much further from it than transformers this package may be.
TRUTH_FACTOR = 1.5
TRUTH_SLACK = 1e-4


@dataclass
class Verdict:
    """Collects what failed."""

    failures: list[str]

    def check(self, name: str, passed: bool) -> str:
        """Remember a failure; returns the word to print."""
        if not passed:
            self.failures.append(name)
        return "ok" if passed else "FAILED"


def print_vectors(
    names: list[str],
    tokens: list[int],
    ours: NDArray[np.float32],
    theirs: NDArray[np.float32],
    tolerance: Tolerance,
    verdict: Verdict,
) -> None:
    """One line an input: how alike its two unit vectors ``[N, D]`` are."""
    print(f"  {'input':22}{'tokens':>7}{'cosine':>12}{'distance':>11}{'largest error':>15}")
    distances = np.linalg.norm(ours - theirs, axis=1)
    for i, name in enumerate(names):
        # Not a NaN, which compares as false.
        word = verdict.check(name, bool(distances[i] <= tolerance.distance))
        cosine = 1 - float(distances[i]) ** 2 / 2
        largest = float(np.abs(ours[i] - theirs[i]).max())
        print(f"  {name:22}{tokens[i]:7}{cosine:12.8f}{distances[i]:11.2e}{largest:15.2e}  {word}")
    print(
        f"  worst distance {distances.max():.2e}, allowed {tolerance.distance:g} "
        f"(cosine {1 - tolerance.distance**2 / 2:.8f})"
    )


def print_scores(
    names: list[str],
    tokens: list[int],
    ours: NDArray[np.float32],
    theirs: NDArray[np.float32],
    tolerance: Tolerance,
    verdict: Verdict,
) -> None:
    """One line a pair: its two scores."""
    print(f"  {'document':27}{'tokens':>7}{'here':>9}{'transformers':>14}{'difference':>12}")
    differences = np.abs(ours - theirs)
    for i, name in enumerate(names):
        word = verdict.check(name, bool(differences[i] <= tolerance.score))
        print(
            f"  {name:27}{tokens[i]:7}{ours[i]:9.5f}{theirs[i]:14.5f}{differences[i]:12.2e}  {word}"
        )
    print(f"  worst difference {differences.max():.2e}, allowed {tolerance.score:g}")


def print_truth(
    what: str,
    ours: NDArray[np.float32],
    theirs: NDArray[np.float32],
    exact: NDArray[np.float32],
    verdict: Verdict,
) -> None:
    """How far both are from float32 arithmetic on the same weights."""
    ours, theirs, exact = (x.reshape(len(x), -1) for x in (ours, theirs, exact))
    here = np.linalg.norm(ours - exact, axis=1)
    there = np.linalg.norm(theirs - exact, axis=1)
    passed = bool(here.mean() <= TRUTH_FACTOR * there.mean() + TRUTH_SLACK)
    word = verdict.check(f"{what} against float32", passed)
    print(
        f"  from float32 on the same weights: here mean {here.mean():.2e}, worst {here.max():.2e}; "
        f"transformers mean {there.mean():.2e}, worst {there.max():.2e}  {word}"
    )
