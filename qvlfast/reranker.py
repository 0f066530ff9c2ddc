"""``Reranker``: a query and documents in, relevance scores out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .engine import Answer, Usage
from .errors import BatchError, InputError
from .inputs import Item, parse_item
from .pixels import Patches
from .prompt import Prompt
from .quant import Quantization
from .runtime import (
    EMPTY,
    UNLIMITED,
    Encoded,
    InputOptions,
    OnError,
    Runtime,
    check_choice,
    warn_if_truncated,
)

_PROCESS_KEYS = ("instruction", "query", "documents", "fps", "max_frames")


class Reranker:
    """A Qwen3-VL-Reranker model. Thread-safe; a context manager that closes itself.

    Queries and documents are inputs as :class:`qvlfast.Embedder` takes them. A score is the
    probability, from 0 to 1, that the document meets the query.

    Make one with :meth:`from_pretrained`.
    """

    def __init__(self, runtime: Runtime, default_instruction: str | None = None) -> None:
        self._runtime = runtime
        self._default_instruction = default_instruction

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        backend: str = "auto",
        quantization: str | Quantization | None = None,
        default_instruction: str | None = None,
        max_length: int = 10_240,
        truncate: bool = True,
        min_pixels: int = 4096,
        max_pixels: int = 1_843_200,
        total_pixels: int = 7_864_320,
        fps: float = 1.0,
        max_frames: int = 64,
        allow_media_domains: Sequence[str] = (),
        batch_tokens: int = 16_384,
        batch_patches: int = 16_384,
        share_prefixes: bool = True,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> Reranker:
        """Load a model; the arguments are those of :meth:`qvlfast.Embedder.from_pretrained`.

        ``max_length`` counts the whole prompt: instruction, query and document. The model's own
        default instruction is ``Given a search query, retrieve relevant candidates that answer
        the query.``

        Raises:
            CheckpointError: the checkpoint is missing, damaged or of another kind.
            BackendError: the device or backend does not exist here.
        """
        runtime = Runtime.load(
            model,
            InputOptions.make(
                max_length=max_length,
                truncate=truncate,
                min_pixels=min_pixels,
                max_pixels=max_pixels,
                total_pixels=total_pixels,
                fps=fps,
                max_frames=max_frames,
                allow_media_domains=allow_media_domains,
            ),
            reranker=True,
            device=device,
            dtype=dtype,
            backend=backend,
            quantization=quantization,
            batch_tokens=batch_tokens,
            batch_patches=batch_patches,
            share_prefixes=share_prefixes,
            revision=revision,
            local_files_only=local_files_only,
        )
        return cls(runtime, default_instruction)

    def rank(
        self,
        query: Any,
        documents: Sequence[Any],
        instruction: str | None = None,
        *,
        top_k: int | None = None,
        return_documents: bool = False,
        batch_tokens: int | None = None,
        show_progress: bool | None = None,
        on_error: OnError = "raise",
    ) -> list[dict[str, Any]]:
        """Score every document against one query; best first.

        Args:
            query: one input. An empty one (``None``, ``""`` or ``{}``) gives an empty list.
            documents: inputs.
            instruction: what counts as relevant; the query's own ``instruction`` comes first.
            top_k: return only the best.
            return_documents: put the document itself into its result.
            on_error: ``raise`` scores the good documents, then raises one :class:`BatchError`;
                ``return`` puts failed ones last, with score NaN and an ``error``.

        Returns:
            A dict for each document: ``index`` in ``documents``, ``score``, and on request
            ``document``; with ``on_error="return"`` also ``error`` where it failed.

        Raises:
            InputError: the query itself is at fault.
            BatchError: some documents failed, and ``on_error`` is ``raise``.
        """
        check_choice("on_error", on_error, ("raise", "return"))
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k is {top_k}: use a positive number, or None for all")
        documents = list(documents)
        if _is_empty(query) or not documents:
            return []
        query_item = parse_item(query)
        query_media = self._query_media(query_item, instruction)
        requests = (
            partial(self._prepare, query_item, query_media, document, instruction)
            for document in documents
        )
        scored = self._score(requests, len(documents), show_progress, batch_tokens)
        order = np.argsort(-scored.vectors, kind="stable")  # NaN sorts last
        results = []
        for index in order.tolist()[:top_k]:
            result: dict[str, Any] = {"index": index, "score": float(scored.vectors[index])}
            if return_documents:
                result["document"] = documents[index]
            if index in scored.errors:
                result["error"] = scored.errors[index]
            results.append(result)
        if scored.errors and on_error == "raise":
            raise BatchError(results, scored.errors)
        return results

    def predict(
        self,
        pairs: Any,
        instruction: str | None = None,
        *,
        batch_tokens: int | None = None,
        show_progress: bool | None = None,
        on_error: OnError = "raise",
        details: bool = False,
    ) -> Any:
        """Score (query, document) pairs.

        Args:
            pairs: a list of pairs, or one pair as a tuple.
            instruction: what counts as relevant; a query's own ``instruction`` comes first.
            on_error, details: as in :meth:`qvlfast.Embedder.encode`; the scores are the
                ``vectors`` of the result.

        Returns:
            Scores ``[N]`` float32 in the order of ``pairs``; a float for one pair.

        Raises:
            BatchError: some pairs failed, and ``on_error`` is ``raise``.
        """
        check_choice("on_error", on_error, ("raise", "return"))
        single = isinstance(pairs, tuple) and len(pairs) == 2
        items = [pairs] if single else list(pairs)
        requests = (partial(self._prepare_pair, pair, instruction) for pair in items)
        scored = self._score(requests, len(items), show_progress, batch_tokens)
        scores = float(scored.vectors[0]) if single else scored.vectors
        result = scored if details or on_error == "return" else scores
        if scored.errors and on_error == "raise":
            if single:
                raise scored.errors[0]
            raise BatchError(result, scored.errors)
        return result

    def process(self, inputs: Mapping[str, Any]) -> list[float]:
        """The method of the official script.

        Args:
            inputs: ``query`` and ``documents`` (dicts), and if wanted ``instruction``, ``fps``
                and ``max_frames``.

        Returns:
            The score of each document in order; an empty list without query or documents.
        """
        unknown = [key for key in inputs if key not in _PROCESS_KEYS]
        if unknown:
            raise InputError(
                "invalid_type", f"unknown keys {unknown}; allowed are {', '.join(_PROCESS_KEYS)}"
            )
        query, documents = inputs.get("query"), inputs.get("documents") or []
        if _is_empty(query) or not documents:
            return []
        sampling = {k: inputs[k] for k in ("fps", "max_frames") if inputs.get(k) is not None}
        pairs = [(_with(query, sampling), _with(document, sampling)) for document in documents]
        scores: NDArray[np.float32] = self.predict(pairs, inputs.get("instruction"))
        return [float(score) for score in scores]

    def close(self) -> None:
        """Finish what was accepted and stop the threads. Calling it again does nothing."""
        self._runtime.engine.close()

    def __enter__(self) -> Reranker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _score(
        self,
        requests: Iterable[Callable[[], Prompt]],
        total: int,
        show_progress: bool | None,
        batch_tokens: int | None,
    ) -> Encoded:
        scores = np.full(total, np.nan, dtype=np.float32)
        usage: list[Usage | None] = [None] * total
        errors: dict[int, Exception] = {}
        outcomes = self._runtime.run(
            requests, total=total, show_progress=show_progress, batch_tokens=batch_tokens
        )
        for index, outcome in enumerate(outcomes):
            if isinstance(outcome, Answer):
                scores[index] = outcome.value
                usage[index] = outcome.usage
            else:
                errors[index] = outcome
        warn_if_truncated(usage, stacklevel=4)
        return Encoded(scores, usage, errors)

    def _prepare_pair(self, pair: Any, instruction: str | None) -> Prompt:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise InputError(
                "invalid_type", f"a pair is {type(pair).__name__}, expected (query, document)"
            )
        query = parse_item(pair[0])
        return self._prepare(query, self._query_media(query, instruction), pair[1], instruction)

    def _query_media(self, query: Item, instruction: str | None) -> list[Patches]:
        instruction = self._instruction(query, instruction)
        rest = partial(self._prompt, EMPTY, (), EMPTY, (), instruction, UNLIMITED)
        return self._runtime.load_media(query, rest)

    def _instruction(self, query: Item, instruction: str | None) -> str | None:
        return query.instruction or instruction or self._default_instruction

    def _prompt(
        self,
        query: Item,
        query_media: Sequence[Patches],
        document: Item,
        document_media: Sequence[Patches],
        instruction: str | None,
        max_length: int,
    ) -> Prompt:
        return self._runtime.prompter.rerank(
            query,
            query_media,
            document,
            document_media,
            max_length,
            self._runtime.options.truncate,
            instruction,
        )

    def _prepare(
        self, query: Item, query_media: list[Patches], document: Any, instruction: str | None
    ) -> Prompt:
        item = parse_item(document)
        if item.instruction is not None:
            raise InputError(
                "invalid_value", "a document has no instruction: give it to the call or the query"
            )
        instruction = self._instruction(query, instruction)
        bare = replace(query, texts=("",))
        rest = partial(self._prompt, bare, query_media, EMPTY, (), instruction, UNLIMITED)
        media = self._runtime.load_media(item, rest)
        max_length = self._runtime.options.max_length
        return self._prompt(query, query_media, item, media, instruction, max_length)


def _is_empty(query: Any) -> bool:
    return query is None or (isinstance(query, str | Mapping) and not query)


def _with(value: Any, sampling: Mapping[str, Any]) -> Any:
    return {**sampling, **value} if isinstance(value, Mapping) else value
