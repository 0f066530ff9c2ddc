"""What calls of a ``Reranker`` return or raise, from the outcomes of their requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arguments import whole
from .errors import BatchError
from .request import Answer, Usage
from .runtime import Encoded, OnError, check_choice, warn_if_truncated


@dataclass(frozen=True)
class Ranking:
    """In what form a call wants its ranking; see :meth:`Reranker.rank`."""

    top_k: int | None
    return_documents: bool
    on_error: OnError

    def __post_init__(self) -> None:
        check_choice("on_error", self.on_error, ("raise", "return"))
        if self.top_k is not None:
            whole("top_k", self.top_k)


def gather(outcomes: Sequence[Answer | Exception]) -> Encoded:
    """The scores of a call."""
    scores = np.full(len(outcomes), np.nan, dtype=np.float32)
    usage: list[Usage | None] = [None] * len(outcomes)
    errors: dict[int, Exception] = {}
    for index, outcome in enumerate(outcomes):
        if isinstance(outcome, Answer):
            scores[index] = outcome.value
            usage[index] = outcome.usage
        else:
            errors[index] = outcome
    warn_if_truncated(usage, stacklevel=4)
    return Encoded(scores, usage, errors)


def ranked(scored: Encoded, documents: Sequence[Any], form: Ranking) -> list[dict[str, Any]]:
    """What :meth:`Reranker.rank` returns or raises."""
    order = np.argsort(-scored.vectors, kind="stable").tolist()  # NaN sorts last
    good = len(order) - len(scored.errors)
    results = []
    for index in order[:good][: form.top_k] + order[good:]:
        result: dict[str, Any] = {"index": index, "score": float(scored.vectors[index])}
        if form.return_documents:
            result["document"] = documents[index]
        if index in scored.errors:
            result["error"] = scored.errors[index]
        results.append(result)
    if scored.errors and form.on_error == "raise":
        raise BatchError(results, scored.errors)
    return results


def predicted(scored: Encoded, single: bool, on_error: OnError, details: bool) -> Any:
    """What :meth:`Reranker.predict` returns or raises."""
    scores = float(scored.vectors[0]) if single else scored.vectors
    result = scored if details or on_error == "return" else scores
    if scored.errors and on_error == "raise":
        if single:
            raise scored.errors[0]
        raise BatchError(result, scored.errors)
    return result
