"""``Embedder``: texts, pictures, videos and mixtures of them in, vectors out."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from .arguments import listed, many, whole
from .errors import BatchError
from .inputs import parse_item
from .metrics import Metrics
from .prompt import Prompt
from .quant import Quantization
from .request import Answer, Terms, Usage
from .runtime import (
    EMPTY,
    UNLIMITED,
    Encoded,
    InputOptions,
    OnError,
    Priority,
    Runtime,
    check_choice,
    check_instruction,
    check_runtime,
    warn_if_truncated,
    warn_of_truncation,
)
from .vectors import VECTOR_TYPES, VectorType, check_dimensions, convert, cut, similarity


class Embedder:
    """A Qwen3-VL-Embedding model. Thread-safe; a context manager that closes itself.

    An *input* is a string, a ``PIL.Image``, or a dict with any of ``text``, ``image``, ``video``
    (each one value or a list), ``instruction``, ``fps`` and ``max_frames``. An image is a path,
    URL, data URI, bytes, ``PIL.Image`` or NumPy array ``[H, W, 3]`` uint8; a video is a path, URL,
    data URI, bytes or a list of images.

    Make one with :meth:`from_pretrained`.
    """

    def __init__(self, runtime: Runtime, default_instruction: str | None = None) -> None:
        self._runtime = check_runtime(runtime, "Embedder")
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
        max_length: int = 8192,
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
    ) -> Embedder:
        """Load a model.

        Args:
            model: a folder with a checkpoint, or a hub id such as
                ``Qwen/Qwen3-VL-Embedding-2B``.
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
            dtype: ``auto`` (that of the checkpoint), ``float32``, ``bfloat16`` or ``float16``.
            backend: ``auto``, ``native`` (the CPU kernels), ``reference`` or ``triton``;
                ``auto`` is ``native`` on a CPU and the reference on a GPU.
            quantization: quantise while loading: ``int8``, ``int4``, ``fp8``, or a
                :class:`qvlfast.Quantization` that says more, such as int4 weights alone; None
                keeps what is stored.
            default_instruction: for inputs that name none; None is the model's own,
                ``Represent the user's input.``
            max_length: the most tokens an input may have.
            truncate: cut the text of longer inputs, with a warning; otherwise they are errors.
            min_pixels, max_pixels: pictures are resized to have this many pixels.
            total_pixels: the most that the frames of a video have together, two counted as one; of
                a file only where its prompt would be too long.
            fps: frames a second that are sampled from video files.
            max_frames: the most frames sampled from a video.
            allow_media_domains: hosts that media may be fetched from; a leading dot admits
                subdomains. Empty: no URL is ever fetched.
            batch_tokens, batch_patches: the most one forward pass holds.
            share_prefixes: compute common beginnings, equal inputs and equal pictures of a batch
                once; vectors are the same to rounding.
            cache_bytes: memory for keys and values of beginnings that come again in later
                batches, such as an instruction or a rerank query, and, a sixteenth of it, for
                answers to inputs that come again; 0 keeps none. Needs ``share_prefixes``.
            vision_cache_bytes: memory for what the vision tower made of pictures; 0 keeps none.
            queue_tokens: waiting work from which on new requests are refused with
                :class:`QueueFull`, in tokens; None takes all. Calls of this class wait instead.
            deterministic: promise equal bits for an input alone, in any batch and order, with
                sharing and caches on or off. Costs nothing on the native backend, which always
                does so; others refuse.
            cuda_graphs: replay short batches of text as CUDA graphs, padded and unshared, where
                the backend is ``triton`` on a GPU; False launches each kernel. See docs/gpu.md.
            revision: branch, tag or commit, for a hub id.
            local_files_only: never download.

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
            reranker=False,
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

    @property
    def dimensions(self) -> int:
        """Length of a full vector."""
        return self._runtime.config.text.hidden_size

    @property
    def backend(self) -> str:
        """Name of the backend that runs the model."""
        return self._runtime.model.ops.name

    def encode(
        self,
        inputs: Any,
        instruction: str | None = None,
        *,
        dimensions: int | None = None,
        normalize: bool = True,
        output: VectorType = "float32",
        batch_tokens: int | None = None,
        show_progress: bool | None = None,
        convert_to: Literal["numpy", "torch"] = "numpy",
        on_error: OnError = "raise",
        details: bool = False,
        priority: Priority = "normal",
        client: Hashable = None,
        timeout: float | None = None,
        vision_cache: bool = True,
    ) -> Any:
        """Embed one input, or a list of them.

        Args:
            inputs: one input or an iterable of inputs.
            instruction: for inputs that do not carry their own.
            dimensions: keep only the first values of each vector (Matryoshka).
            normalize: scale vectors to unit length.
            output: the type of the vectors, see :func:`qvlfast.vectors.convert`.
            batch_tokens: a lower budget than that of ``from_pretrained``.
            show_progress: None shows a bar on a terminal when the work takes long.
            convert_to: numpy array or torch tensor.
            on_error: ``raise`` answers the good items, then raises one :class:`BatchError`;
                ``return`` returns an :class:`Encoded`.
            details: return an :class:`Encoded` with tokens, truncation and scales.
            priority: ``interactive`` passes what other threads have under way, ``bulk`` lets
                everything else pass; see docs/scheduler.md.
            client: whose turn it takes; None: each call is a client of its own.
            timeout: seconds for the whole call; items not answered by then fail with
                :class:`DeadlineError`, and cost nothing if they have not begun.
            vision_cache: pictures, and answers to inputs with pictures, may be taken from a cache
                and kept.

        Returns:
            ``[N, D]`` in the order of ``inputs``, ``[D]`` for a single input; or :class:`Encoded`.

        Raises:
            BatchError: some items failed, and ``on_error`` is ``raise``.
        """
        form = _Form(dimensions, normalize, output, convert_to, on_error, details)
        self._check(form)
        check_instruction(instruction)
        single, items = listed(inputs)
        outcomes = self._runtime.run(
            (self._request(item, instruction) for item in items),
            total=len(items),
            show_progress=show_progress,
            terms=Terms.make(
                priority=priority,
                client=client,
                timeout=timeout,
                batch_tokens=batch_tokens,
                vision_cache=vision_cache,
                size=form.size(self.dimensions),
            ),
        )
        gathered = _Gathered(len(items), form.size(self.dimensions) or self.dimensions)
        for outcome in outcomes:
            gathered.add(outcome)
        return self._finish(gathered, form, single)

    async def encode_async(
        self,
        inputs: Any,
        instruction: str | None = None,
        *,
        dimensions: int | None = None,
        normalize: bool = True,
        output: VectorType = "float32",
        batch_tokens: int | None = None,
        convert_to: Literal["numpy", "torch"] = "numpy",
        on_error: OnError = "raise",
        details: bool = False,
        priority: Priority = "normal",
        client: Hashable = None,
        timeout: float | None = None,
        vision_cache: bool = True,
    ) -> Any:
        """:meth:`encode` for a coroutine: other tasks go on meanwhile, and cancelling this one
        gives up its work."""
        form = _Form(dimensions, normalize, output, convert_to, on_error, details)
        self._check(form)
        check_instruction(instruction)
        single, items = listed(inputs)
        outcomes = self._runtime.run_async(
            (self._request(item, instruction) for item in items),
            terms=Terms.make(
                priority=priority,
                client=client,
                timeout=timeout,
                batch_tokens=batch_tokens,
                vision_cache=vision_cache,
                size=form.size(self.dimensions),
            ),
        )
        gathered = _Gathered(len(items), form.size(self.dimensions) or self.dimensions)
        async with aclosing(outcomes):
            async for outcome in outcomes:
                gathered.add(outcome)
        return self._finish(gathered, form, single)

    def encode_iter(
        self,
        inputs: Iterable[Any],
        instruction: str | None = None,
        *,
        dimensions: int | None = None,
        normalize: bool = True,
        output: VectorType = "float32",
        batch_tokens: int | None = None,
        on_error: OnError = "raise",
        details: bool = False,
        priority: Priority = "normal",
        client: Hashable = None,
        vision_cache: bool = True,
    ) -> Iterator[Any]:
        """Embed an endless or huge iterable in bounded memory.

        What a generator yields is copied when it is taken, so it may use an array, a picture or a
        dict again. That reads a picture that was opened and not yet loaded: files are read in
        parallel if their paths are yielded.

        Yields:
            For each input in order its vector ``[D]``; with ``details`` an :class:`Encoded` of it
            alone. With ``on_error="return"`` a failed item yields its exception instead; with
            ``raise`` the first one is raised.
        """
        form = _Form(dimensions, normalize, output, "numpy", on_error, details)
        self._check(form)
        check_instruction(instruction)
        requests = (self._request(item, instruction) for item in many("inputs", inputs))
        terms = Terms.make(
            priority=priority,
            client=client,
            timeout=None,
            batch_tokens=batch_tokens,
            vision_cache=vision_cache,
            size=form.size(self.dimensions),
        )
        warned = details  # whoever asked for them is told of each item
        for index, outcome in enumerate(self._runtime.run(requests, terms=terms)):
            if isinstance(outcome, Answer):
                if outcome.usage.truncated_tokens and not warned:
                    warned = True
                    warn_of_truncation(index)
                vectors, scales = convert(form.finished(outcome.value[None]), output)
                usage: list[Usage | None] = [outcome.usage]
                yield Encoded(vectors[0], usage, {}, scales) if details else vectors[0]
            elif on_error == "raise":
                raise outcome
            else:
                yield outcome

    def encode_query(self, inputs: Any, instruction: str | None = None, **options: Any) -> Any:
        """:meth:`encode` for queries: pass the task as ``instruction``."""
        return self.encode(inputs, instruction, **options)

    def encode_document(self, inputs: Any, instruction: str | None = None, **options: Any) -> Any:
        """:meth:`encode` for documents."""
        return self.encode(inputs, instruction, **options)

    def similarity(self, a: Any, b: Any, output: VectorType = "float32") -> NDArray[np.float32]:
        """Cosine of every pair, ``[N, M]``; ``output`` is the type that both were encoded to."""
        return similarity(a, b, output)

    def process(self, inputs: Sequence[Mapping[str, Any]], normalize: bool = True) -> torch.Tensor:
        """The method of the official script: dicts in, a float32 tensor ``[N, D]`` out."""
        items = list(many("inputs", inputs))
        vectors: torch.Tensor = self.encode(items, normalize=normalize, convert_to="torch")
        return vectors

    def metrics(self) -> Metrics:
        """What waits, what was computed and saved, where the time went."""
        return self._runtime.metrics()

    def close(self) -> None:
        """Finish what was accepted and stop the threads. Calling it again does nothing."""
        self._runtime.close()

    def __enter__(self) -> Embedder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _request(self, value: Any, instruction: str | None) -> Callable[[], Prompt]:
        return partial(self._prepare, value, instruction or self._default_instruction)

    def _prepare(self, value: Any, instruction: str | None) -> Prompt:
        options = self._runtime.options
        item = parse_item(value)
        instruction = item.instruction or instruction
        embed = partial(self._runtime.prompter.embed, instruction=instruction)
        media = self._runtime.load_media(item, lambda: embed(EMPTY, (), UNLIMITED))
        return embed(item, media, options.max_length, options.truncate)

    def _check(self, form: _Form) -> None:
        check_choice("output", form.output, VECTOR_TYPES)
        check_choice("convert_to", form.convert_to, ("numpy", "torch"))
        check_choice("on_error", form.on_error, ("raise", "return"))
        size = self.dimensions if form.dimensions is None else whole("dimensions", form.dimensions)
        if size > self.dimensions:
            raise ValueError(
                f"dimensions is {size}: this model's vectors have {self.dimensions} values"
            )
        check_dimensions(size, form.output)

    def _finish(self, gathered: _Gathered, form: _Form, single: bool) -> Any:
        """What :meth:`encode` returns or raises."""
        usage, errors = gathered.usage, gathered.errors
        warn_if_truncated(usage, stacklevel=4)
        stored, scales = convert(form.finished(gathered.rows), form.output)
        vectors: Any = stored[0] if single else stored
        if form.convert_to == "torch":
            vectors = torch.from_numpy(vectors)
        encoded = Encoded(vectors, usage, errors, scales)
        result = encoded if form.details or form.on_error == "return" else vectors
        if errors and form.on_error == "raise":
            if single:
                raise errors[0]
            raise BatchError(result, errors)
        return result


@dataclass(frozen=True)
class _Form:
    """In what form a call wants its vectors; see :meth:`Embedder.encode`."""

    dimensions: int | None
    normalize: bool
    output: VectorType
    convert_to: Literal["numpy", "torch"]
    on_error: OnError
    details: bool

    def size(self, full: int) -> int | None:
        """What the model is asked for: so many values, of unit length; None: all, as they are."""
        return (self.dimensions or full) if self.normalize else None

    def finished(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """What is left to do for rows that came so."""
        return rows if self.normalize else cut(rows, self.dimensions, normalize=False)


class _Gathered:
    """The outcomes of a call, in order: rows ``[N, D]`` that start as NaN, usage and errors."""

    def __init__(self, count: int, width: int) -> None:
        self.rows = np.full((count, width), np.nan, dtype=np.float32)
        self.usage: list[Usage | None] = []
        self.errors: dict[int, Exception] = {}

    def add(self, outcome: Answer | Exception) -> None:
        index = len(self.usage)
        if isinstance(outcome, Answer):
            self.rows[index] = outcome.value
            self.usage.append(outcome.usage)
        else:
            self.errors[index] = outcome
            self.usage.append(None)
