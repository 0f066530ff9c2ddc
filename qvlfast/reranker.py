"""``Reranker``: a query and documents in, relevance scores out."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any

import torch

from .arguments import many
from .arguments import pairs as listed_pairs
from .errors import InputError
from .inputs import Item, parse_item
from .metrics import Metrics
from .pixels import Patches
from .prompt import Prompt
from .quant import Quantization
from .request import Terms
from .runtime import (
    EMPTY,
    UNLIMITED,
    InputOptions,
    OnError,
    Priority,
    Runtime,
    check_choice,
    check_instruction,
    check_runtime,
)
from .scores import Ranking, gather, predicted, ranked

_PROCESS_KEYS = ("instruction", "query", "documents", "fps", "max_frames")


class Reranker:
    """A Qwen3-VL-Reranker model. Thread-safe; a context manager that closes itself.

    Queries and documents are inputs as :class:`qvlfast.Embedder` takes them. A score is the
    probability, from 0 to 1, that the document meets the query.

    Make one with :meth:`from_pretrained`.
    """

    def __init__(self, runtime: Runtime, default_instruction: str | None = None) -> None:
        self._runtime = check_runtime(runtime, "Reranker")
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
        cache_bytes: int = 512 << 20,
        vision_cache_bytes: int = 256 << 20,
        queue_tokens: int | None = None,
        deterministic: bool = False,
        cuda_graphs: bool = True,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> Reranker:
        """Load a model; the arguments are those of :meth:`qvlfast.Embedder.from_pretrained`.

        ``max_length`` counts the whole prompt: instruction, query and document. The model's own
        default instruction is ``Given a search query, retrieve relevant candidates that answer
        the query.``

        Raises:
            CheckpointError: the checkpoint is missing, damaged or of another kind.
            BackendError: the device or backend does not exist here, or cannot be deterministic.
        """
        check_instruction(default_instruction)
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
            cache_bytes=cache_bytes,
            vision_cache_bytes=vision_cache_bytes,
            queue_tokens=queue_tokens,
            deterministic=deterministic,
            cuda_graphs=cuda_graphs,
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
        priority: Priority = "normal",
        client: Hashable = None,
        timeout: float | None = None,
        vision_cache: bool = True,
    ) -> list[dict[str, Any]]:
        """Score every document against one query; best first.

        Args:
            query: one input. An empty one (``None``, ``""`` or ``{}``) gives an empty list.
            documents: inputs.
            instruction: what counts as relevant; the query's own ``instruction`` comes first.
            top_k: return only the best, and those that failed.
            return_documents: put the document itself into its result.
            on_error: ``raise`` scores the good documents, then raises one :class:`BatchError`;
                ``return`` puts failed ones last, with score NaN and an ``error``.
            batch_tokens, show_progress, priority, client, timeout, vision_cache: as in
                :meth:`qvlfast.Embedder.encode`.

        Returns:
            A dict for each document: ``index`` in ``documents``, ``score``, and on request
            ``document``; with ``on_error="return"`` also ``error`` where it failed.

        Raises:
            InputError: the query itself is at fault.
            BatchError: some documents failed, and ``on_error`` is ``raise``.
        """
        form = Ranking(top_k, return_documents, on_error)
        check_instruction(instruction)
        documents = list(many("documents", documents))
        if _is_empty(query) or not documents:
            return []
        terms = Terms.make(
            priority=priority,
            client=client,
            timeout=timeout,
            batch_tokens=batch_tokens,
            vision_cache=vision_cache,
        )
        item = parse_item(query)
        media = self._query_media(item, instruction)
        outcomes = self._runtime.run(
            self._against(item, media, documents, instruction),
            total=len(documents),
            show_progress=show_progress,
            terms=terms,
        )
        return ranked(gather(list(outcomes)), documents, form)

    async def rank_async(
        self,
        query: Any,
        documents: Sequence[Any],
        instruction: str | None = None,
        *,
        top_k: int | None = None,
        return_documents: bool = False,
        batch_tokens: int | None = None,
        on_error: OnError = "raise",
        priority: Priority = "normal",
        client: Hashable = None,
        timeout: float | None = None,
        vision_cache: bool = True,
    ) -> list[dict[str, Any]]:
        """:meth:`rank` for a coroutine: other tasks go on meanwhile, and cancelling this one
        gives up its work."""
        form = Ranking(top_k, return_documents, on_error)
        check_instruction(instruction)
        documents = list(many("documents", documents))
        if _is_empty(query) or not documents:
            return []
        terms = Terms.make(
            priority=priority,
            client=client,
            timeout=timeout,
            batch_tokens=batch_tokens,
            vision_cache=vision_cache,
        )
        item = parse_item(query)
        media = await asyncio.to_thread(self._query_media, item, instruction)
        outcomes = self._runtime.run_async(
            self._against(item, media, documents, instruction), terms=terms
        )
        async with aclosing(outcomes):
            scored = gather([outcome async for outcome in outcomes])
        return ranked(scored, documents, form)

    def predict(
        self,
        pairs: Any,
        instruction: str | None = None,
        *,
        batch_tokens: int | None = None,
        show_progress: bool | None = None,
        on_error: OnError = "raise",
        details: bool = False,
        priority: Priority = "normal",
        client: Hashable = None,
        timeout: float | None = None,
        vision_cache: bool = True,
    ) -> Any:
        """Score (query, document) pairs.

        Args:
            pairs: a list of pairs, or one pair, as a tuple or a list.
            instruction: what counts as relevant; a query's own ``instruction`` comes first.
            batch_tokens, show_progress, on_error, details, priority, client, timeout, vision_cache:
                as in :meth:`qvlfast.Embedder.encode`; the scores are the ``vectors`` of the result.

        Returns:
            Scores ``[N]`` float32 in the order of ``pairs``; a float for one pair.

        Raises:
            BatchError: some pairs failed, and ``on_error`` is ``raise``.
        """
        check_choice("on_error", on_error, ("raise", "return"))
        check_instruction(instruction)
        single, items = listed_pairs(pairs)
        outcomes = self._runtime.run(
            (partial(self._prepare_pair, pair, instruction) for pair in items),
            total=len(items),
            show_progress=show_progress,
            terms=Terms.make(
                priority=priority,
                client=client,
                timeout=timeout,
                batch_tokens=batch_tokens,
                vision_cache=vision_cache,
            ),
        )
        return predicted(gather(list(outcomes)), single, on_error, details)

    async def predict_async(
        self,
        pairs: Any,
        instruction: str | None = None,
        *,
        batch_tokens: int | None = None,
        on_error: OnError = "raise",
        details: bool = False,
        priority: Priority = "normal",
        client: Hashable = None,
        timeout: float | None = None,
        vision_cache: bool = True,
    ) -> Any:
        """:meth:`predict` for a coroutine: other tasks go on meanwhile, and cancelling this one
        gives up its work."""
        check_choice("on_error", on_error, ("raise", "return"))
        check_instruction(instruction)
        single, items = listed_pairs(pairs)
        outcomes = self._runtime.run_async(
            (partial(self._prepare_pair, pair, instruction) for pair in items),
            terms=Terms.make(
                priority=priority,
                client=client,
                timeout=timeout,
                batch_tokens=batch_tokens,
                vision_cache=vision_cache,
            ),
        )
        async with aclosing(outcomes):
            scored = gather([outcome async for outcome in outcomes])
        return predicted(scored, single, on_error, details)

    def process(self, inputs: Mapping[str, Any]) -> list[float]:
        """The method of the official script.

        Args:
            inputs: ``query`` and ``documents`` (dicts), and if wanted ``instruction``, ``fps``
                and ``max_frames``.

        Returns:
            The score of each document in order; an empty list without query or documents.

        Raises:
            InputError: the query is at fault, or a key is unknown.
            BatchError: some documents failed.
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
        item, instruction = parse_item(_with(query, sampling)), inputs.get("instruction")
        media = self._query_media(item, instruction)
        sampled = [_with(document, sampling) for document in many("documents", documents)]
        outcomes = self._runtime.run(self._against(item, media, sampled, instruction))
        scores = predicted(gather(list(outcomes)), False, "raise", False)
        return [float(score) for score in scores]

    def metrics(self) -> Metrics:
        """What waits, what was computed and saved, where the time went."""
        return self._runtime.metrics()

    def close(self) -> None:
        """Finish what was accepted and stop the threads. Calling it again does nothing."""
        self._runtime.close()

    def __enter__(self) -> Reranker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _against(
        self,
        query: Item,
        query_media: list[Patches],
        documents: Sequence[Any],
        instruction: str | None,
    ) -> Iterator[Callable[[], Prompt]]:
        """The requests of one query and its documents."""
        return (
            partial(self._prepare, query, query_media, document, instruction)
            for document in documents
        )

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
