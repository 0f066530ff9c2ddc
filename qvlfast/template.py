"""The tokenizer and the chat template of a checkpoint folder.

Both are files of the checkpoint; nothing about the published models is written down here.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox
from tokenizers import Tokenizer

from .errors import CheckpointError, InputError

# Stretches of the template itself, instructions and frame times recur; documents do not.
_CACHED_CHARACTERS = 160
_CACHE_ENTRIES = 4096

# Private-use characters, which templates and control tokens do not hold.
_MARKERS = tuple(range(0xE000, 0xF900)) + tuple(range(0xF0000, 0xFFFFE))


class Template:
    """Renders conversations with the checkpoint's own Jinja template, as transformers does.

    Raises:
        CheckpointError: no template in the folder, or one that is not valid Jinja.
    """

    def __init__(self, folder: Path) -> None:
        path, source = _find_template(folder)
        self.path = path
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(
                f"{path}: the chat template is not valid ({error}): download it again"
            ) from None

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt of a conversation, up to where the model would answer.

        Raises:
            CheckpointError: the template refuses the conversation.
        """
        try:
            return self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True
            )
        except Exception as error:  # a template can raise whatever its expressions raise
            raise CheckpointError(
                f"{self.path}: the chat template cannot write an embedding prompt ({error}): use "
                "the files of a Qwen3-VL-Embedding or Qwen3-VL-Reranker checkpoint"
            ) from error


class Vocabulary:
    """``tokenizer.json`` with its control tokens under our control. Thread-safe.

    The library takes every control token that it finds in a text for one, whoever wrote it. So
    its tokenizer is built here without them, :meth:`guard` marks what callers wrote, and
    :meth:`split` finds the control tokens in what is left unmarked: the template's own.

    Attributes:
        control: id of every control (added) token.
        prefix, suffix: ids that the file's post-processor puts around a prompt.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "tokenizer.json"
        document = _read_json(self.path)
        self.control = _control_tokens(document, self.path)
        settings: dict[str, Any] = {"added_tokens": [], "truncation": None, "padding": None}
        try:
            self._tokenizer = Tokenizer.from_str(json.dumps({**document, **settings}))
        except Exception as error:  # the library raises bare exceptions for all its reasons
            raise CheckpointError(
                f"{self.path} is not a tokenizer that the tokenizers library reads ({error}): "
                "download it again, or update the library"
            ) from None
        names = sorted(self.control, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, names))})" if names else "(?!)()")
        self._firsts = sorted({name[0] for name in names})
        plain = self._tokenizer.encode("a", add_special_tokens=False).ids
        whole = self._tokenizer.encode("a", add_special_tokens=True).ids
        at = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
        self.prefix: tuple[int, ...] = tuple(whole[:at])
        self.suffix: tuple[int, ...] = tuple(whole[at + len(plain) :])
        self._cached = functools.lru_cache(_CACHE_ENTRIES)(self._encode)

    def all_ids(self) -> set[int]:
        """All that a prompt may have in it."""
        plain = self._tokenizer.get_vocab(with_added_tokens=False)
        return {*plain.values(), *self.control.values(), *self.prefix, *self.suffix}

    def token_id(self, token: str) -> int:
        """Id of one entry of the vocabulary, control token or not.

        Raises:
            CheckpointError: there is none.
        """
        found = self.control.get(token)
        found = self._tokenizer.token_to_id(token) if found is None else found
        if found is None:
            raise CheckpointError(f"{self.path} has no token {token!r}")
        return int(found)

    def token(self, token_id: int) -> str:
        """The control token with an id.

        Raises:
            CheckpointError: there is none.
        """
        for name, number in self.control.items():
            if number == token_id:
                return name
        raise CheckpointError(
            f"{self.path} has no control token {token_id}, which config.json names: the two files "
            "are of different checkpoints"
        )

    def marker(self, texts: Sequence[str]) -> str:
        """A character that is in none of the texts.

        Raises:
            InputError: the texts hold all the characters that could be one.
        """
        for code in _MARKERS:
            character = chr(code)
            if not any(character in text for text in texts):
                return character
        raise InputError(
            "invalid_text", "the texts hold every private-use character of Unicode: remove one"
        )

    def guard(self, text: str, marker: str) -> str:
        """Mark a text so that no part of it, nor of it and its neighbours, is a control token."""
        for first in self._firsts:
            text = text.replace(first, first + marker)
        return text

    def split(self, rendered: str) -> list[str]:
        """Alternating plain stretches (even places) and control tokens (odd places)."""
        return self._split.split(rendered)

    def ids(self, text: str) -> Sequence[int]:
        """Ids of one plain stretch."""
        if len(text) <= _CACHED_CHARACTERS:
            return self._cached(text) if text else ()
        return self._encode(text)

    def cut_guess(self, text: str, tokens: int) -> int:
        """How many characters of a text its first ``tokens`` tokens cover, at most all."""
        length = 8 * tokens + 1
        while True:
            head = text[:length]
            encoding = self._encoding(head)
            if len(encoding) > tokens or len(head) == len(text):
                break
            length *= 4
        if tokens == 0:
            return 0
        if len(encoding) <= tokens:
            return len(text)
        return int(encoding.token_to_chars(tokens - 1)[1])

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._encoding(text).ids)

    def _encoding(self, text: str) -> Any:
        # Unlike `encode`, this lets other threads run.
        return self._tokenizer.encode_batch([text], add_special_tokens=False)[0]


def _control_tokens(document: dict[str, Any], path: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for entry in document.get("added_tokens") or []:
        fields = entry if isinstance(entry, dict) else {}
        name, number = fields.get("content"), fields.get("id")
        if not isinstance(name, str) or not isinstance(number, int):
            raise CheckpointError(f"{path}: damaged entry {entry!r} in `added_tokens`")
        traits = [k for k in ("lstrip", "rstrip", "single_word") if fields.get(k)]
        if traits or len(name) < 2:
            raise CheckpointError(
                f"{path}: the added token {name!r} ({', '.join(traits) or 'one character'}) is of "
                "a kind that this package does not support"
            )
        found[name] = number
    return found


def _find_template(folder: Path) -> tuple[Path, str]:
    """The places of the template in the order in which transformers looks for it."""
    for name in ("chat_template.json", "chat_template.jinja", "tokenizer_config.json"):
        path = folder / name
        if not path.exists():
            continue
        if path.suffix == ".jinja":
            return path, _read_text(path)
        template = _read_json(path).get("chat_template")
        if isinstance(template, list):  # several, by name
            named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
            template = named.get("default")
        if isinstance(template, str):
            return path, template
    raise CheckpointError(
        f"{folder} has no chat template: expected it in chat_template.json, chat_template.jinja "
        "or tokenizer_config.json; download the checkpoint again"
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist: the checkpoint folder is incomplete, download it again"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): download it again") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:  # of JSON, of numbers; of its depth
        raise CheckpointError(f"{path} is not valid JSON ({error}): download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # Jinja's own filter escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
