"""From a parsed input and its patches to the ids and positions that the model reads.

A prompt is one string when it is tokenised: pieces of text merge across the seams between a
caller's texts and the template. Pads are the exception; the string holds one for a picture or
frame pair, and it is repeated as often as there are merged patches once it is an id.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .config import ModelConfig
from .errors import CheckpointError, InputError
from .inputs import Item, check_text
from .pixels import Patches
from .template import Template, Vocabulary

EMBED_INSTRUCTION = "Represent the user's input."
RERANK_SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".'
)
RERANK_INSTRUCTION = "Given a search query, retrieve relevant candidates that answer the query."


@dataclass(frozen=True, eq=False)
class Prompt:
    """One prompt of T tokens.

    Attributes:
        ids: int32 [T].
        positions: int32 [3, T], the time, height and width of each token for the rope.
        media: the pictures and videos, in the order of their pads in ``ids``.
        visual_index: int32 [V], where the pads are in ``ids``, ascending; V is the sum of
            ``num_tokens`` over ``media``.
        truncated_tokens: how many tokens shorter than the whole input this is.
    """

    ids: np.ndarray
    positions: np.ndarray
    media: tuple[Patches, ...]
    visual_index: np.ndarray
    truncated_tokens: int = 0

    @property
    def digest(self) -> bytes:
        """A cryptographic hash of the ids and of the media and their places: equal only for prompts
        that the model cannot tell apart."""
        whole = hashlib.blake2b(digest_size=32)
        parts = (self.ids.tobytes(), self.visual_index.tobytes(), *(m.digest for m in self.media))
        for part in parts:
            whole.update(len(part).to_bytes(8, "little"))
            whole.update(part)
        return whole.digest()


@dataclass(frozen=True)
class _Text:
    """A piece of the user's message; only what the caller wrote may be cut."""

    text: str
    cuttable: bool = True


@dataclass(frozen=True)
class _Draft:
    """A conversation before it is written out."""

    system: str
    parts: tuple[_Text | Patches, ...]

    def caller_text(self) -> str:
        """What the caller wrote and may be cut, in the order of the prompt."""
        return "".join(p.text for p in self.parts if isinstance(p, _Text) and p.cuttable)

    def cut(self, characters: int) -> _Draft:
        """The same with only the first ``characters`` characters of what the caller wrote."""
        left = characters
        parts: list[_Text | Patches] = []
        for part in self.parts:
            kept = part
            if isinstance(part, _Text) and part.cuttable:
                kept = _Text(part.text[:left])
                left -= len(kept.text)
            parts.append(kept)
        return _Draft(self.system, tuple(parts))


@dataclass(frozen=True)
class _Tokens:
    """Ids with one pad for each picture or frame pair.

    ``pads`` are the places of those pads in ``ids``, ``blocks`` the rows and columns of merged
    patches that each stands for, ``media`` the pictures and videos in that order.
    """

    ids: list[int]
    pads: list[int]
    blocks: list[tuple[int, int]]
    media: tuple[Patches, ...]

    @property
    def length(self) -> int:
        return len(self.ids) + sum(rows * columns - 1 for rows, columns in self.blocks)


class Prompter:
    """Writes the prompts of one checkpoint. Thread-safe.

    Raises:
        CheckpointError: the tokenizer or the chat template is missing, damaged, or does not fit
            ``config.json``.
    """

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self._template = Template(folder)
        self._vocabulary = Vocabulary(folder)
        self._check_ids(config.text.vocab_size)
        self._merge = config.vision.spatial_merge_size
        token = self._vocabulary.token
        self._image_pad = token(config.image_token_id)
        self._video_pad = token(config.video_token_id)
        self._start = token(config.vision_start_token_id)
        self._end = token(config.vision_end_token_id)
        pad = re.escape(self._video_pad)
        self._video = re.compile(f"{re.escape(self._start)}{pad}{re.escape(self._end)}|{pad}")
        self._check_template()

    def token_id(self, token: str) -> int:
        """Id of one entry of the vocabulary.

        Raises:
            CheckpointError: there is none.
        """
        return self._vocabulary.token_id(token)

    def embed(
        self,
        item: Item,
        media: Sequence[Patches],
        max_length: int,
        truncate: bool = True,
        instruction: str | None = None,
    ) -> Prompt:
        """The prompt of an embedding.

        Args:
            media: the patches of ``item.videos``, then those of ``item.images``.
            max_length: the most tokens of the prompt.
            truncate: cut the texts of a longer prompt, the end of the last one first.
            instruction: for items that do not bring their own.

        Raises:
            InputError: ``too_long``, where cutting is off or the texts are not what is long;
                ``invalid_text`` in the instruction.
        """
        system = _punctuated(_instruction(item, instruction))
        draft = _Draft(system, tuple(_content(item, media)))
        return self._write(draft, max_length, truncate)

    def rerank(
        self,
        query: Item,
        query_media: Sequence[Patches],
        document: Item,
        document_media: Sequence[Patches],
        max_length: int,
        truncate: bool = True,
        instruction: str | None = None,
    ) -> Prompt:
        """The prompt that asks whether a document answers a query.

        Arguments and errors are those of :meth:`embed`; the instruction is the query's. What is
        cut first is the document's text from its end, then the query's.
        """
        if document.instruction is not None:
            raise InputError(
                "invalid_value", "a document has no `instruction` of its own: give it to the query"
            )
        chosen = _instruction(query, instruction) or RERANK_INSTRUCTION
        parts = (
            _Text(f"<Instruct>: {chosen}", cuttable=False),
            _Text("<Query>:", cuttable=False),
            *_content(query, query_media),
            _Text("\n<Document>:", cuttable=False),
            *_content(document, document_media),
        )
        return self._write(_Draft(RERANK_SYSTEM, parts), max_length, truncate)

    def _write(self, draft: _Draft, max_length: int, truncate: bool) -> Prompt:
        tokens = self._tokenise(draft)
        whole = tokens.length
        if whole > max_length:
            tokens = self._fit(draft, whole, max_length, truncate)
        return self._expand(tokens, truncated=whole - tokens.length)

    def _fit(self, draft: _Draft, whole: int, max_length: int, truncate: bool) -> _Tokens:
        """The longest prompt within the limit: one more character of text would pass it."""
        if not truncate:
            raise InputError(
                "too_long",
                f"the prompt has {whole} tokens, more than max_length {max_length}: shorten the "
                "input, raise max_length or allow truncation",
            )
        best = self._tokenise(draft.cut(0))
        if best.length > max_length:
            raise InputError(
                "too_long",
                f"the prompt has {best.length} tokens without any of its text, more than "
                f"max_length {max_length}: use {_advice(draft)}, or raise max_length",
            )
        # `good` characters fit, `bad` do not. Widen from a guess, then halve.
        text = draft.caller_text()
        good, bad = 0, len(text)
        guess = self._vocabulary.cut_guess(text, max_length - best.length)
        probe, step = min(max(guess, 1), bad - 1), 1
        while good + 1 < bad:
            tokens = self._tokenise(draft.cut(probe))
            if tokens.length <= max_length:
                good, best = probe, tokens
            else:
                bad = probe
            if good and bad < len(text):
                probe = (good + bad) // 2
            else:
                probe = min(probe + step, bad - 1) if good else max(probe - step, 1)
                step *= 2
        return best

    def _tokenise(self, draft: _Draft) -> _Tokens:
        vocabulary = self._vocabulary
        texts = [p.text for p in draft.parts if isinstance(p, _Text)]
        marker = vocabulary.marker([draft.system, *texts])
        user = [_part(part, vocabulary, marker) for part in draft.parts]
        system = [_part(_Text(draft.system), vocabulary, marker)]
        rendered = self._template.render(
            [{"role": "system", "content": system}, {"role": "user", "content": user}]
        )
        videos = [p for p in draft.parts if isinstance(p, Patches) and p.is_video]
        images = [p for p in draft.parts if isinstance(p, Patches) and not p.is_video]
        self._check_pads(len(self._video.findall(rendered)), len(videos), "video")
        rest = iter(videos)
        rendered = self._video.sub(lambda _: self._frames(next(rest)), rendered)

        # One entry for each pad that must come: whose it is, and whether it is the first of it.
        queues = {
            self._image_pad: [(image, True) for image in images],
            self._video_pad: [(v, pair == 0) for v in videos for pair in range(v.grid[0])],
        }
        pieces = vocabulary.split(rendered)
        for pad, queue in queues.items():
            self._check_pads(pieces[1::2].count(pad), len(queue), "picture or frame")
            queue.reverse()
        ids = list(vocabulary.prefix)
        pads: list[int] = []
        blocks: list[tuple[int, int]] = []
        media: list[Patches] = []
        for i, piece in enumerate(pieces):
            if i % 2 == 0:
                ids.extend(vocabulary.ids(piece.replace(marker, "")))
                continue
            if piece in queues:
                owner, first = queues[piece].pop()
                pads.append(len(ids))
                blocks.append((owner.grid[1] // self._merge, owner.grid[2] // self._merge))
                if first:
                    media.append(owner)
            ids.append(vocabulary.control[piece])
        ids.extend(vocabulary.suffix)
        return _Tokens(ids, pads, blocks, tuple(media))

    def _frames(self, video: Patches) -> str:
        """What replaces the pad of a video, and the markers around it (transformers 4.57)."""
        frame = f"{self._start}{self._video_pad}{self._end}"
        return "".join(f"<{seconds:.1f} seconds>{frame}" for seconds in video.seconds)

    def _expand(self, tokens: _Tokens, truncated: int) -> Prompt:
        """Repeat the pads, and number the tokens."""
        repeats = np.ones(len(tokens.ids), np.int64)
        advance = np.ones(len(tokens.ids), np.int64)
        is_pad = np.zeros(len(tokens.ids), bool)
        if tokens.pads:
            repeats[tokens.pads] = [rows * columns for rows, columns in tokens.blocks]
            # What follows a block goes on after its longer side.
            advance[tokens.pads] = [max(block) for block in tokens.blocks]
            is_pad[tokens.pads] = True
        starts = np.cumsum(advance) - advance
        positions = np.tile(np.repeat(starts, repeats), (3, 1))  # [3, T]
        visual_index = np.flatnonzero(np.repeat(is_pad, repeats))
        if tokens.pads:
            inside = [np.indices(block).reshape(2, -1) for block in tokens.blocks]
            positions[1:, visual_index] += np.concatenate(inside, axis=1)  # [2, V]
        return Prompt(
            ids=np.repeat(np.asarray(tokens.ids, np.int32), repeats),
            positions=positions.astype(np.int32),
            media=tokens.media,
            visual_index=visual_index.astype(np.int32),
            truncated_tokens=truncated,
        )

    def _check_pads(self, found: int, expected: int, kind: str) -> None:
        if found != expected:
            raise CheckpointError(
                f"{self._template.path}: the chat template writes {found} {kind} pads for "
                f"{expected}: use the files of a Qwen3-VL-Embedding or Qwen3-VL-Reranker "
                "checkpoint"
            )

    def _check_ids(self, vocab_size: int) -> None:
        """Every id must have a row in the table of embeddings."""
        vocabulary = self._vocabulary
        ids = vocabulary.all_ids()
        bad = [i for i in (min(ids), max(ids)) if not 0 <= i < vocab_size] if ids else []
        if bad:
            raise CheckpointError(
                f"{vocabulary.path} has the token id {bad[0]}, and `vocab_size` in config.json is "
                f"{vocab_size}: the two files are of different checkpoints, download both again"
            )

    def _check_template(self) -> None:
        """Write one prompt with everything in it, to fail at load and not at the first call."""
        nothing = np.empty((0, 0), np.uint8)
        merge = self._merge
        still = Patches(nothing, (1, merge, merge), 1)
        video = Patches(nothing, (2, merge, merge), 2, is_video=True, seconds=(0.5, 2.5))
        texts = (_Text("first text"), _Text("second text"))
        draft = _Draft("system text", (video, still, *texts))
        rendered = self._tokenise(draft)
        shorter = self._tokenise(_Draft("system text", (video, still, texts[0])))
        if rendered.length <= shorter.length:
            raise CheckpointError(
                f"{self._template.path}: the chat template leaves texts out: use the files of a "
                "Qwen3-VL-Embedding or Qwen3-VL-Reranker checkpoint"
            )


def _advice(draft: _Draft) -> str:
    """How to shorten a prompt that is too long without what may be cut of it."""
    media = any(isinstance(part, Patches) for part in draft.parts)
    return f"{'fewer or smaller pictures and videos, ' * media}a shorter instruction"


def _instruction(item: Item, instruction: str | None) -> str:
    if instruction is not None:
        check_text(instruction, "the instruction")
    return item.instruction or instruction or ""


def _punctuated(instruction: str) -> str:
    """The instruction as the reference writes it: stripped, with a full stop if it has none."""
    instruction = instruction.strip() or EMBED_INSTRUCTION
    return instruction if unicodedata.category(instruction[-1])[0] == "P" else f"{instruction}."


def _content(item: Item, media: Sequence[Patches]) -> list[_Text | Patches]:
    expected = (len(item.videos), len(item.images))
    videos = [m for m in media if m.is_video]
    if (len(videos), len(media) - len(videos)) != expected or list(media[: len(videos)]) != videos:
        raise ValueError(
            f"an item with {expected[0]} videos and {expected[1]} images was given the patches of "
            f"{len(videos)} and {len(media) - len(videos)}, or not the videos first"
        )
    return [*media, *(_Text(text) for text in item.texts)]


def _part(part: _Text | Patches, vocabulary: Vocabulary, marker: str) -> dict[str, Any]:
    """One part of a message, as templates expect it."""
    if isinstance(part, _Text):
        return {"type": "text", "text": vocabulary.guard(part.text, marker)}
    kind = "video" if part.is_video else "image"
    return {"type": kind, kind: ""}
