"""Prompts: their ids, positions and truncation, and the files that they come from."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from benchmarks.tokenizer import ADDED_TOKENS, CHAT_TEMPLATE, byte_alphabet
from qvlfast.config import ModelConfig, load_config
from qvlfast.errors import CheckpointError, InputError
from qvlfast.inputs import Item, parse_item
from qvlfast.pixels import Patches
from qvlfast.prompt import RERANK_SYSTEM, Prompt, Prompter
from qvlfast.template import Vocabulary

IMAGE, VIDEO = 151655, 151656
EMBED = (
    "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{content}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
DEFAULT = "Represent the user's input."
MEDIA = {"image": "a.png"}


class Checkpoint:
    """A checkpoint folder with its prompter, and the tokenizer of the library beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: ModelConfig = load_config(folder)
        self.prompter = Prompter(folder, self.config)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def embed(self, value: Any, media: Sequence[Patches] = (), **options: Any) -> Prompt:
        options = {"max_length": 8192, **options}
        return self.prompter.embed(parse_item(value), media, **options)

    def rerank(self, query: Any, document: Any, **options: Any) -> Prompt:
        options = {"max_length": 10240, "query_media": (), "document_media": (), **options}
        return self.prompter.rerank(parse_item(query), document=parse_item(document), **options)

    def ids(self, text: str) -> list[int]:
        """What the library makes of a whole prompt."""
        return list(self.tokenizer.encode(text).ids)

    def text(self, prompt: Prompt) -> str:
        return str(self.tokenizer.decode(prompt.ids.tolist(), skip_special_tokens=False))


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return Checkpoint(tiny_checkpoint)


def still(rows: int = 2, columns: int = 3) -> Patches:
    """A still of so many merged patches; the prompt does not look at its pixels."""
    return Patches(np.empty((0, 768), np.uint8), (1, 2 * rows, 2 * columns), rows * columns)


def video(*seconds: float, rows: int = 2, columns: int = 1) -> Patches:
    grid = (len(seconds), 2 * rows, 2 * columns)
    count = len(seconds) * rows * columns
    return Patches(np.empty((0, 1536), np.uint8), grid, count, is_video=True, seconds=seconds)


def pads(count: int, kind: str = "image") -> str:
    return f"<|vision_start|>{f'<|{kind}_pad|>' * count}<|vision_end|>"


def test_embed(checkpoint: Checkpoint) -> None:
    prompt = checkpoint.embed("A woman playing with her dog.")
    text = EMBED.format(system=DEFAULT, content="A woman playing with her dog.")
    assert prompt.ids.tolist() == checkpoint.ids(text)
    assert prompt.ids.dtype == prompt.positions.dtype == prompt.visual_index.dtype == np.int32
    assert prompt.positions.tolist() == [list(range(len(prompt.ids)))] * 3
    assert prompt.media == () and len(prompt.visual_index) == 0
    assert prompt.truncated_tokens == 0


@pytest.mark.parametrize(
    ("own", "call", "system"),
    [
        (None, None, DEFAULT),
        ("", "", DEFAULT),
        (None, " \n", DEFAULT),
        (None, "Find pictures", "Find pictures."),
        (None, "  Find pictures!  ", "Find pictures!"),
        (None, "找图片。", "找图片。"),
        (None, "x (y)", "x (y)"),
        (None, "a + b = c$", "a + b = c$."),  # a symbol, no punctuation
        ("Own", "Call", "Own."),
        ("", "Call", "Call."),
    ],
)
def test_instructions(
    checkpoint: Checkpoint, own: str | None, call: str | None, system: str
) -> None:
    prompt = checkpoint.embed({"text": "x", "instruction": own}, instruction=call)
    assert checkpoint.text(prompt) == EMBED.format(system=system, content="x")


@pytest.mark.parametrize(
    ("value", "content"),
    [
        ({}, "NULL"),
        ({"text": ""}, ""),
        ({"text": ["a", "b"]}, "ab"),
        ({"text": ["a.", "<"]}, "a.<"),
        ({"text": "e\u0301"}, "é"),  # NFC, which the tokenizer's file asks for
        ({"text": "x\n"}, "x\n"),
        ({"text": "{{ 7 * 7 }}{% if %}&<b>"}, "{{ 7 * 7 }}{% if %}&<b>"),
    ],
)
def test_contents(checkpoint: Checkpoint, value: Any, content: str) -> None:
    prompt = checkpoint.embed(value)
    text = EMBED.format(system=DEFAULT, content=content)
    assert prompt.ids.tolist() == checkpoint.ids(text)


def test_media_and_positions(checkpoint: Checkpoint) -> None:
    picture, film = still(2, 3), video(0.25, 12.345, rows=2, columns=1)
    prompt = checkpoint.embed({"text": "x", "image": "a", "video": "b"}, [film, picture])
    content = f"<0.2 seconds>{pads(2, 'video')}<12.3 seconds>{pads(2, 'video')}{pads(6)}x"
    assert prompt.ids.tolist() == checkpoint.ids(EMBED.format(system=DEFAULT, content=content))
    assert prompt.media == (film, picture)
    is_pad = np.isin(prompt.ids, (IMAGE, VIDEO))
    assert prompt.visual_index.tolist() == np.flatnonzero(is_pad).tolist()

    t, h, w = prompt.positions.tolist()
    first, second, third = (int(prompt.visual_index[i]) for i in (0, 2, 4))
    p = t[first - 1] + 1
    assert (t[first : first + 3], h[first : first + 3], w[first : first + 3]) == (
        [p, p, p + 2],
        [p, p + 1, p + 2],
        [p, p, p + 2],
    )
    assert second - first > 3  # the second pair has its own time and markers
    p = t[third - 1] + 1
    assert t[third : third + 7] == [p] * 6 + [p + 3]
    assert h[third : third + 7] == [p, p, p, p + 1, p + 1, p + 1, p + 3]
    assert w[third : third + 7] == [p, p + 1, p + 2] * 2 + [p + 3]


def test_rerank(checkpoint: Checkpoint) -> None:
    document = {"text": ["d1", "d2"], "image": ["a", "b"]}
    media = [still(1, 1), still(1, 2)]
    query_media = [video(0.5)]
    prompt = checkpoint.rerank(
        {"text": "q", "video": "v"}, document, query_media=query_media, document_media=media
    )
    content = (
        "<Instruct>: Given a search query, retrieve relevant candidates that answer the query."
        f"<Query>:<0.5 seconds>{pads(2, 'video')}q\n<Document>:{pads(1)}{pads(2)}d1d2"
    )
    assert prompt.ids.tolist() == checkpoint.ids(
        EMBED.format(system=RERANK_SYSTEM, content=content)
    )
    assert prompt.media == (*query_media, *media)


@pytest.mark.parametrize(
    ("own", "call", "written"),
    [
        (None, " as it is ", " as it is "),
        ("Own", "Call", "Own"),
        ("", "Call", "Call"),
        (
            None,
            "",
            "Given a search query, retrieve relevant candidates that answer the query.",
        ),
    ],
)
def test_rerank_instructions(
    checkpoint: Checkpoint, own: str | None, call: str, written: str
) -> None:
    prompt = checkpoint.rerank({"text": "q", "instruction": own}, {}, instruction=call)
    content = f"<Instruct>: {written}<Query>:q\n<Document>:NULL"
    assert checkpoint.text(prompt) == EMBED.format(system=RERANK_SYSTEM, content=content)


def test_documents_have_no_instruction(checkpoint: Checkpoint) -> None:
    with pytest.raises(InputError, match="give it to the query"):
        checkpoint.rerank("q", {"text": "d", "instruction": "x"})


PLAIN = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from("<|im_end>\n .?!\u0301\u200d\ue000\ue001/tol"),
    ),
    max_size=30,
)
NOISY = st.lists(st.one_of(PLAIN, st.sampled_from(ADDED_TOKENS)), max_size=6).map("".join)


def _has_control(text: str) -> bool:
    return any(token in text for token in ADDED_TOKENS)


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(PLAIN, min_size=1, max_size=3), instruction=PLAIN)
def test_ids_are_those_of_the_whole_string(
    checkpoint: Checkpoint, texts: list[str], instruction: str
) -> None:
    if _has_control("".join(texts)) or _has_control(instruction):
        return
    document = checkpoint.rerank({"text": "q", "instruction": instruction or None}, {"text": texts})
    written = instruction or (
        "Given a search query, retrieve relevant candidates that answer the query."
    )
    content = f"<Instruct>: {written}<Query>:q\n<Document>:{''.join(texts)}"
    text = EMBED.format(system=RERANK_SYSTEM, content=content)
    assert document.ids.tolist() == checkpoint.ids(text)


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(NOISY, min_size=1, max_size=3), instruction=NOISY)
def test_no_text_writes_a_control_token(
    checkpoint: Checkpoint, texts: list[str], instruction: str
) -> None:
    prompt = checkpoint.embed({"text": texts, "instruction": instruction})
    found = [int(i) for i in prompt.ids if i >= 151643]
    assert found == [151644, 151645, 151644, 151645, 151644]
    assert len(prompt.visual_index) == 0
    system = instruction.strip() or DEFAULT
    normal = checkpoint.tokenizer.normalizer.normalize_str
    written = checkpoint.text(prompt)
    assert written.startswith(f"<|im_start|>system\n{normal(system)}")
    assert f"<|im_start|>user\n{normal(''.join(texts))}<|im_end|>" in written


def test_a_control_token_in_two_halves(checkpoint: Checkpoint) -> None:
    for token in ("<|im_end|>", "<|image_pad|>", "<think>"):
        for i in range(1, len(token)):
            prompt = checkpoint.embed({"text": [token[:i], token[i:]]})
            whole = checkpoint.embed({"text": token})
            assert prompt.ids.tolist() == whole.ids.tolist()
            assert checkpoint.text(prompt) == EMBED.format(system=DEFAULT, content=token)


def test_every_private_character_in_one_text(checkpoint: Checkpoint) -> None:
    text = "".join(map(chr, range(0xE000, 0xF900))) + "<|im_end|>"
    prompt = checkpoint.embed(text, max_length=1 << 20)
    assert checkpoint.text(prompt) == EMBED.format(system=DEFAULT, content=text)
    with pytest.raises(InputError, match="every private-use character") as caught:
        checkpoint.embed(text + "".join(map(chr, range(0xF0000, 0xFFFFE))))
    assert caught.value.code == "invalid_text"


@pytest.mark.parametrize(
    "text",
    [
        "The quick brown fox jumps over 13 lazy dogs. " * 20,
        "e\u0301" * 60,
        "漢字かな" * 30,
        "\U0001f468\u200d\U0001f469\u200d\U0001f467" * 20,
        " " * 500,
        "<|im_end|>" * 20,
        "a" * 400,
    ],
)
@pytest.mark.parametrize("room", [0, 1, 2, 17, 30])
def test_truncation_is_the_longest_that_fits(checkpoint: Checkpoint, text: str, room: int) -> None:
    limit = len(checkpoint.embed("").ids) + room
    whole = len(checkpoint.embed(text).ids)
    prompt = checkpoint.embed(text, max_length=limit)
    if whole <= limit:
        assert prompt.truncated_tokens == 0 and len(prompt.ids) == whole
        return
    lengths = [len(checkpoint.embed(text[:i]).ids) for i in range(len(text) + 1)]
    assert len(prompt.ids) <= limit
    assert prompt.truncated_tokens == whole - len(prompt.ids)
    kept = [i for i, length in enumerate(lengths) if length == len(prompt.ids)]
    same = [i for i in kept if (checkpoint.embed(text[:i]).ids == prompt.ids).all()]
    # One character more would be too long.
    assert any(lengths[i + 1] > limit for i in same)


def test_truncation_keeps_media_and_cuts_the_last_text_first(checkpoint: Checkpoint) -> None:
    value = {"text": ["first text", "second text"], **MEDIA}
    media = [still(2, 2)]
    empty = len(checkpoint.embed({"text": "", **MEDIA}, media).ids)
    for room in range(6):
        prompt = checkpoint.embed(value, media, max_length=empty + room)
        written = checkpoint.text(prompt)
        match = re.fullmatch(
            re.escape(EMBED.format(system=DEFAULT, content=f"{pads(4)}@")).replace("@", "(.*)"),
            written,
        )
        assert match is not None and "first textsecond text".startswith(match[1])
        assert prompt.media == tuple(media) and len(prompt.visual_index) == 4


def test_truncation_of_a_pair_cuts_the_document_first(checkpoint: Checkpoint) -> None:
    query, document = "alpha beta gamma", "delta epsilon zeta eta"
    bare = len(checkpoint.rerank({"text": ""}, {"text": ""}).ids)
    with_query = len(checkpoint.rerank(query, {"text": ""}).ids)
    prompt = checkpoint.rerank(query, document, max_length=with_query + 2)
    assert re.search("<Query>:alpha beta gamma\n<Document>:delt.+<", checkpoint.text(prompt))
    prompt = checkpoint.rerank(query, document, max_length=bare + 1)
    assert re.search("<Query>:al.*\n<Document>:<", checkpoint.text(prompt))
    assert "gamma" not in checkpoint.text(prompt)
    assert prompt.truncated_tokens > 0


def test_too_long(checkpoint: Checkpoint) -> None:
    text = "word " * 100
    whole = len(checkpoint.embed(text).ids)
    assert len(checkpoint.embed(text, max_length=whole, truncate=False).ids) == whole
    with pytest.raises(InputError, match=f"has {whole} tokens, more than max_length 50") as caught:
        checkpoint.embed(text, max_length=50, truncate=False)
    assert caught.value.code == "too_long"
    media = [still(20, 20)]
    bare = len(checkpoint.embed({"text": "", **MEDIA}, media).ids)
    message = f"has {bare} tokens without any of its text, more than max_length {bare - 1}"
    for value in ({"text": text, **MEDIA}, MEDIA):
        with pytest.raises(InputError, match=message) as caught:
            checkpoint.embed(value, media, max_length=bare - 1)
        assert caught.value.code == "too_long"
    assert checkpoint.embed({"text": text, **MEDIA}, media, max_length=bare).truncated_tokens > 0
    with pytest.raises(InputError, match="use a shorter instruction, or raise") as caught:
        checkpoint.embed(text, instruction=text, max_length=50)
    assert "picture" not in str(caught.value)


def test_long_texts_are_cut_quickly(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = ("The quick brown fox jumps over 12345 lazy dogs. " * 25_000)[:1_000_000]
    tokenised: list[int] = []
    encoding = Vocabulary._encoding

    def counted(vocabulary: Vocabulary, text: str) -> Any:
        tokenised.append(len(text))
        return encoding(vocabulary, text)

    monkeypatch.setattr(Vocabulary, "_encoding", counted)
    prompt = checkpoint.embed(text)
    assert len(prompt.ids) == 8192 and prompt.truncated_tokens > 300_000
    # Once in full, to tell how much is cut; then pieces of about the length that is left.
    assert sum(tokenised) < 2 * len(text)


def test_bad_instructions(checkpoint: Checkpoint) -> None:
    with pytest.raises(InputError, match="the instruction has a lone surrogate"):
        checkpoint.embed("x", instruction="\ud800")
    with pytest.raises(InputError, match="the instruction is an int"):
        checkpoint.embed("x", instruction=5)


def test_media_must_belong_to_the_item(checkpoint: Checkpoint) -> None:
    table: list[tuple[Any, list[Patches]]] = [
        ("x", [still()]),
        (MEDIA, []),
        (MEDIA, [video(0.5)]),
        ({**MEDIA, "video": "v"}, [still(), video(0.5)]),
    ]
    for value, media in table:
        with pytest.raises(ValueError, match="was given the patches of"):
            checkpoint.embed(value, media)


def test_many_threads(checkpoint: Checkpoint) -> None:
    texts = [f"text {i} " * (i % 50) + "<|im_end|>" for i in range(400)]
    expected = [checkpoint.embed(text).ids.tolist() for text in texts]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda text: checkpoint.embed(text).ids.tolist(), texts))
    assert found == expected


def test_token_id(checkpoint: Checkpoint) -> None:
    token_id = checkpoint.prompter.token_id
    assert (token_id("yes"), token_id("no"), token_id("<|im_end|>")) == (9693, 2152, 151645)
    with pytest.raises(CheckpointError, match="has no token 'no such token'"):
        token_id("no such token")


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """The files that prompts need, with a vocabulary of bytes alone, which loads fast."""
    for name in ("config.json", "tokenizer_config.json", "chat_template.json"):
        shutil.copy(tiny_checkpoint / name, tmp_path / name)
    document = json.loads((tiny_checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    document["model"]["vocab"] = {shown: byte for byte, shown in enumerate(byte_alphabet())}
    document["model"]["merges"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    return tmp_path


def _edit(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    edit(document)
    path.write_text(json.dumps(document), encoding="utf-8")


def _load(folder: Path) -> Prompter:
    return Prompter(folder, load_config(folder))


def _written(prompt: Prompt) -> str:
    """The text of a prompt in the vocabulary of bytes; `@` for each control token."""
    return bytes(i if i < 256 else ord("@") for i in prompt.ids.tolist()).decode()


_WRITTEN = f"@system\n{DEFAULT}@\n@user\nx@\n@assistant\n"


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_places_of_the_template(folder: Path, place: str) -> None:
    (folder / "chat_template.json").unlink()
    if place.endswith(".jinja"):
        (folder / place).write_text(CHAT_TEMPLATE)
    else:
        _edit(folder / place, lambda d: d.update(chat_template=CHAT_TEMPLATE))
    assert _written(_load(folder).embed(Item(texts=("x",)), [], 8192)) == _WRITTEN


def test_a_list_of_templates(folder: Path) -> None:
    named = [{"name": "other", "template": "x"}, {"name": "default", "template": CHAT_TEMPLATE}]
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": named}))
    assert _written(_load(folder).embed(Item(texts=("x",)), [], 8192)) == _WRITTEN


def test_the_environment_of_templates(folder: Path) -> None:
    template = (
        "  {# gone #}\n"
        "{%- for message in messages %}{% if loop.index > 9 %}{% break %}{% endif %}\n"
        "{{ {'<>': message.role} | tojson }}"
        "{% for part in message.content %}"
        "{{ part.text or '<|vision_start|><|' + part.type + '_pad|><|vision_end|>' }}"
        "{% endfor %}"
        "{% if message.role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
        "{% endfor %}"
    )
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    prompt = _load(folder).embed(Item(texts=("x",)), [], 8192)
    assert _written(prompt) == f'{{"<>": "system"}}{DEFAULT}{{"<>": "user"}}x'


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", "not valid"),
        ("{{ raise_exception('no chats') }}", "no chats"),
        ("{{ messages[0].content.no.such.key }}", "cannot write an embedding prompt"),
        ("{{ messages.append(1) }}", "cannot write an embedding prompt"),  # the sandbox
        ("{{ ''.__class__.__mro__ }}", "cannot write an embedding prompt"),
        ("nothing", "writes 0 video pads for 1"),
        ("<|video_pad|>", "writes 0 picture or frame pads for 1"),
        ("<|video_pad|><|image_pad|><|image_pad|>", "writes 2 picture or frame pads for 1"),
        ("<|video_pad|><|image_pad|>", "leaves texts out"),
    ],
)
def test_bad_templates(folder: Path, template: str, message: str) -> None:
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(CheckpointError, match=message) as caught:
        _load(folder)
    assert "chat_template.json" in str(caught.value)


def test_missing_and_damaged_files(folder: Path) -> None:
    (folder / "chat_template.json").unlink()
    with pytest.raises(CheckpointError, match="has no chat template: expected it in"):
        _load(folder)
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(CheckpointError, match="cannot be read"):
        _load(folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    path = folder / "tokenizer.json"
    for damaged, message in (
        ("{", "is not valid JSON"),
        ("[]", "holds a list"),
        ("{}", "is not a tokenizer"),
        ('{"added_tokens": [{"id": 1}]}', "damaged entry"),
        ('{"added_tokens": [7]}', "damaged entry 7"),
        ('{"added_tokens": [{"id": 1, "content": "<a>", "lstrip": true}]}', "lstrip"),
        ('{"added_tokens": [{"id": 1, "content": "a"}]}', "one character"),
    ):
        path.write_text(damaged)
        with pytest.raises(CheckpointError, match=message):
            _load(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json does not exist: .* download it"):
        _load(folder)


def test_a_tokenizer_of_another_checkpoint(folder: Path) -> None:
    path = folder / "tokenizer.json"
    _edit(path, lambda d: d.update(added_tokens=d["added_tokens"][:10]))
    with pytest.raises(CheckpointError, match=r"has no control token 151655, which config.json"):
        _load(folder)


def test_the_post_processor_and_other_settings_of_the_file(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    shutil.copytree(checkpoint.folder, tmp_path, dirs_exist_ok=True)
    single = [
        {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
    ]
    special = {
        name: {"id": name, "ids": [number], "tokens": [name]}
        for name, number in (("<|im_start|>", 151644), ("<|endoftext|>", 151643))
    }
    processor: dict[str, Any] = {"type": "TemplateProcessing", "single": single, "pair": single}
    processor["special_tokens"] = special
    path = tmp_path / "tokenizer.json"
    _edit(path, lambda d: d.update(post_processor=processor))
    tokenizer = Tokenizer.from_file(str(path))
    cut = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    _edit(path, lambda d: d.update(truncation=cut))  # of no effect here
    prompter = _load(tmp_path)
    prompt = prompter.embed(Item(texts=("x",)), [], 8192)
    assert prompt.ids.tolist() == [151644, *checkpoint.embed("x").ids.tolist(), 151643]
    assert prompt.ids.tolist() == tokenizer.encode(EMBED.format(system=DEFAULT, content="x")).ids
    short = prompter.embed(Item(texts=("word " * 50,)), [], 40)
    assert len(short.ids) == 40 and short.ids[-1] == 151643


def test_cut_guess(checkpoint: Checkpoint) -> None:
    vocabulary = checkpoint.prompter._vocabulary
    assert vocabulary.cut_guess("one two three", 0) == 0
    assert vocabulary.cut_guess("one two three", 2) == 7
    assert vocabulary.cut_guess("one two three", 50) == 13
    assert vocabulary.cut_guess(" " * 1000, 2) in range(100, 1001)
