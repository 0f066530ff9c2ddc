"""The inputs whose reference results are kept in this folder."""

# Letters of other alphabets look like Latin ones on purpose here.
# ruff: noqa: RUF001

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from tests.samples import MODES, Film, frames, picture

FOLDER = Path(__file__).parent
EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Still:
    """A picture; with ``file_format``, the bytes of a file that says it lies on its side."""

    width: int
    height: int
    mode: str = "RGB"
    seed: int = 0
    file_format: str = ""

    @property
    def name(self) -> str:
        return f"{self.width}x{self.height}-{self.mode}{self.file_format}"

    def build(self) -> PIL.Image.Image | bytes:
        image = picture(self.width, self.height, self.mode, seed=self.seed)
        if not self.file_format:
            return image
        exif = PIL.Image.Exif()
        exif[EXIF_ORIENTATION] = 6
        buffer = io.BytesIO()
        options: dict[str, Any] = {} if self.file_format == "GIF" else {"exif": exif}
        if self.file_format == "TIFF":
            # Pillow itself turns a TIFF, but not an uncompressed one that it opens by name.
            options["compression"] = "tiff_deflate"
        if self.mode == "P":
            options["transparency"] = 7
        image.save(buffer, self.file_format, **options)
        return buffer.getvalue()


@dataclass(frozen=True)
class FrameList:
    """A video as a list of pictures."""

    count: int
    width: int
    height: int
    seed: int = 0
    noise: int = 0

    @property
    def name(self) -> str:
        return f"{self.count}x{self.width}x{self.height}"

    def build(self) -> list[PIL.Image.Image]:
        return frames(self.count, self.width, self.height, seed=self.seed, noise=self.noise)


@dataclass(frozen=True)
class File:
    """A video file in this folder."""

    name: str

    def build(self) -> str:
        return str(FOLDER / self.name)


@dataclass(frozen=True)
class Input:
    """One input; None means that the caller does not give the key at all."""

    text: tuple[str, ...] | None = None
    image: tuple[Still, ...] | None = None
    video: tuple[FrameList | File, ...] | None = None
    instruction: str | None = None
    fps: float | None = None
    max_frames: int | None = None

    def build(self) -> dict[str, Any]:
        """The dict that a caller passes."""
        values = {
            "text": None if self.text is None else list(self.text),
            "image": None if self.image is None else [i.build() for i in self.image],
            "video": None if self.video is None else [v.build() for v in self.video],
            "instruction": self.instruction,
            "fps": self.fps,
            "max_frames": self.max_frames,
        }
        return {key: value for key, value in values.items() if value is not None}


FILMS = {
    "plain.mp4": Film(160, 96, 25, seed=1),
    "ntsc.mp4": Film(128, 128, 75, Fraction(30000, 1001), seed=2),
    "slow.mp4": Film(96, 64, 140, Fraction(2), seed=3),
    "two.mp4": Film(64, 64, 2, Fraction(24), seed=4),
    "three.mp4": Film(64, 64, 3, Fraction(1), seed=5),
    "seven.mp4": Film(98, 66, 7, Fraction(24), seed=6),
    "wide.mp4": Film(640, 64, 12, Fraction(5), seed=7),
    "full-colour.mp4": Film(160, 96, 12, Fraction(12), pixel_format="yuv444p", seed=8),
    "vp9.webm": Film(
        160, 96, 30, Fraction(15), "libvpx-vp9", seed=9, options=(("crf", "45"), ("b:v", "0"))
    ),
    "mpeg4.avi": Film(96, 96, 20, Fraction(10), "mpeg4", seed=10, options=(("qscale", "10"),)),
}

# (width, height)
_SIZES = (
    *((1, 1), (1, 200), (200, 1), (2, 400), (3, 3), (16, 16), (31, 33), (32, 32), (33, 31)),
    # Halves of 32, which Python rounds to even.
    *((48, 48), (48, 80), (80, 80), (112, 112), (144, 176), (240, 16)),
    *((64, 64), (65, 64), (63, 64), (100, 37), (37, 100), (300, 20), (640, 480), (481, 641)),
    *((1000, 31), (31, 1000), (8000, 41), (41, 8000), (1024, 768), (1920, 1080), (1080, 1920)),
    # Around the largest area, 1440 x 1280.
    *((1440, 1280), (1280, 1440), (1456, 1280), (1457, 1280), (1357, 1358), (1360, 1359)),
    *((2500, 1000), (701, 2999), (20000, 100), (3000, 2000)),
)
STILLS = (
    *(Still(w, h, seed=i) for i, (w, h) in enumerate(_SIZES)),
    *(Still(150, 70 + i, mode, seed=100 + i) for i, mode in enumerate(MODES)),
    *(Still(1500, 1450, mode, seed=120 + i) for i, mode in enumerate(("RGBA", "P", "L", "1"))),
    Still(90, 130, "RGB", 130, "PNG"),
    Still(90, 131, "RGBA", 131, "PNG"),
    Still(90, 132, "P", 132, "PNG"),
    Still(90, 133, "LA", 133, "PNG"),
    Still(90, 134, "L", 134, "TIFF"),
    Still(90, 135, "P", 135, "GIF"),
)

FRAME_LISTS = (
    FrameList(1, 200, 100, 1),
    FrameList(2, 64, 64, 2),
    FrameList(3, 320, 240, 3, noise=24),
    FrameList(4, 1000, 700, 4),
    FrameList(5, 100, 60, 5),
    FrameList(7, 30, 1500, 6),
    FrameList(8, 97, 161, 7, noise=24),
    FrameList(20, 800, 600, 8),
    FrameList(63, 240, 180, 9),
    FrameList(64, 480, 640, 10),
    FrameList(65, 96, 96, 11),
    FrameList(131, 128, 72, 12),
)

TEXTS = {
    "english": "A woman shares a joyful moment with her golden retriever on a sun-drenched beach.",
    "question": "What is the capital of France?",
    "contractions": "I'll say we've done it; they'd say it isn't DON'T.",
    "numbers": "In 2024, 1,234,567.89 people paid 42% more: 0x1F, 1e-9, ½, ², Ⅷ, ٣٤٥.",
    "spaces": "  two  leading,   three   between, trailing  ",
    "lines": "one\ntwo\r\nthree\n\n\nfour\n \n five\t\ttabs\n",
    "only-spaces": "   ",
    "only-newline": "\n",
    "empty": "",
    "one-letter": "a",
    "full-stop": ".",
    "code": "def f(x: int) -> int:\n    return x ** 2  # square\n\n\nif __name__ == 'm':\n\tf(3)",
    "json": '{"id": 7, "tags": ["a", "b"], "nested": {"null": null, "t": true}}',
    "html": '<p class="x">Tom &amp; Jerry</p><!-- <br/> -->',
    "url": "https://example.org/a/b.html?q=1&lang=de#top user@example.org C:\\temp\\x.txt",
    "angle": "<|im_start <| |> <im_end> < think > a.<b",
    "chinese": "一只金毛犬和它的主人在阳光明媚的海滩上玩耍,主人正在和狗击掌。",
    "traditional": "臺灣的夜市有很多好吃的東西,例如珍珠奶茶。",
    "japanese": "吾輩は猫である。名前はまだ無い。カタカナとひらがな、そして「漢字」。",
    "korean": "나는 오늘 친구와 함께 서울에서 맛있는 김치찌개를 먹었습니다.",
    "arabic": "مرحبا بالعالم، كيف حالكم اليوم؟ السَّلامُ عَلَيْكُم",
    "hebrew": "שלום עולם, מה שלומך היום?",
    "hindi": "नमस्ते दुनिया, आज मौसम बहुत अच्छा है।",
    "bengali": "আমার সোনার বাংলা, আমি তোমায় ভালোবাসি।",
    "tamil": "வணக்கம் உலகம், எப்படி இருக்கிறீர்கள்?",
    "thai": "สวัสดีชาวโลก วันนี้อากาศดีมาก",
    "russian": "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "greek": "Η γρήγορη καφέ αλεπού πηδάει πάνω από το τεμπέλικο σκυλί.",
    "german": "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. STRAẞE",
    "french": "Voix ambiguë d’un cœur qui, au zéphyr, préfère les jattes de kiwis.",
    "spanish": "¿Dónde está el baño? ¡El pingüino comió ñoquis!",
    "vietnamese": "Con sói và cô bé quàng khăn đỏ gặp nhau ở giữa khu rừng.",
    "turkish": "Pijamalı hasta yağız şoföre çabucak güvendi. İIıi",
    "swahili": "Habari ya asubuhi, rafiki yangu mpendwa?",
    "decomposed": "cafe\u0301 A\u030angstro\u0308m \u1112\u1161\u11ab\u1100\u1173\u11af ﬁ Å",
    "emoji": "👍🏽 👩‍👩‍👧‍👦 🇩🇪🇯🇵 ❤️‍🔥 🧑‍🚀text🙂🙃",
    "symbols": "∑∫√ ≤≥≠ → ⇒ ☃ ♞ ₿ € ¥ © ® ™ … — “quoted” «guillemets»",
    "control-bytes": "a\x00b\x07c\x1b[0m\x7f\u200b\u200d\ufeff\u2028\u2029\xa0end",
    "private-use": "\ue000\uf8ff\U000f0000\U0010fffd \ufffd",
    "mixed": "Hello, 世界! Привет мир — こんにちは 123 안녕 😀 naïve",
    "long-word": "ab" * 300,
    "long-text": "The quick brown fox jumps over the lazy dog. " * 60,
}

INSTRUCTIONS = {
    "stop": "Retrieve pictures relevant to the query.",
    "bare": "Retrieve pictures relevant to the query",
    "spaces": " \n Find the same product \t",
    "chinese": "检索相关图片",
    "chinese-stop": "检索相关图片。",
    "question": "Which one?",
    "bracket": "Classify (quickly)",
    "symbol": "Weigh in €",
    "blank": "  \n",
    "empty": "",
}

_CAT, _SCAN, _ICON = Still(300, 200, seed=200), Still(500, 700, "L", 201), Still(1, 1, "RGBA", 202)
_CLIP, _LIST = File("plain.mp4"), FrameList(5, 100, 60, 5)

EMBED: dict[str, Input] = {
    **{f"text-{name}": Input((text,)) for name, text in TEXTS.items()},
    **{f"instruction-{n}": Input(("a photo",), instruction=i) for n, i in INSTRUCTIONS.items()},
    "nothing": Input(),
    "empty-lists": Input((), (), ()),
    "empty-text-list": Input((), (_CAT,)),
    "seam-instruction": Input((".<",), instruction="Compare <"),
    "seam-texts": Input(("a", "b")),
    "seam-words": Input(("What is", " this", "?", "\n", "\n")),
    "seam-newlines": Input(("\n\nline",), instruction="x"),
    "seam-marks": Input(("cafe", "\u0301 ok")),
    "image": Input(image=(_CAT,)),
    "image-text": Input(("A cat.",), (_CAT,)),
    "image-empty-text": Input(("",), (_CAT,)),
    "images": Input(("three", "of them"), (_CAT, _SCAN, _ICON)),
    "same-image-twice": Input(None, (_CAT, _CAT)),
    "list": Input(video=(_LIST,)),
    "list-text": Input(("five frames",), None, (_LIST,), fps=4, max_frames=4),
    "list-one": Input(video=(FrameList(1, 200, 100, 1),)),
    "list-64": Input(video=(FrameList(64, 480, 640, 10),)),
    "list-131": Input(video=(FrameList(131, 128, 72, 12),)),
    "everything": Input(("t1", "t2"), (_SCAN, _ICON), (_LIST, _CLIP), "Describe it"),
    **{f"file-{name}": Input(video=(File(name),)) for name in FILMS},
    "file-fps-4": Input(("slow?",), video=(_CLIP,), fps=4),
    "file-fps-10": Input(video=(_CLIP,), fps=10),
    "file-fps-60": Input(video=(_CLIP,), fps=60),
    "file-fps-0.1": Input(video=(File("slow.mp4"),), fps=0.1),
    "file-fps-2.5": Input(video=(File("ntsc.mp4"),), fps=2.5),
    "file-frames-5": Input(video=(File("slow.mp4"),), max_frames=5),
    "file-frames-2": Input(video=(_CLIP,), max_frames=2),
    "file-frames-16": Input(video=(File("ntsc.mp4"),), fps=30, max_frames=16),
    "two-files": Input(video=(_CLIP, File("seven.mp4"))),
}

RERANK: dict[str, tuple[Input, Input]] = {
    "text": (Input(("capital of China",)), Input(("Beijing is the capital of China.",))),
    "instruction": (Input(("q",), instruction=" keep this as it is "), Input(("d",))),
    "chinese": (Input(("海滩上的狗",), instruction="判断是否相关"), Input(("一只金毛犬。",))),
    "query-image": (Input(image=(_CAT,)), Input(("a cat",))),
    "document-image": (Input(("a cat",)), Input(image=(_CAT,))),
    "both-images": (Input(("this?",), (_CAT,)), Input(("that", "!"), (_SCAN, _ICON))),
    "document-list": (Input(("a walk",)), Input(("clip",), None, (_LIST,))),
    "document-file": (Input(("a walk",), fps=2), Input(None, None, (_CLIP,), fps=8)),
    "everything": (Input(("q",), (_CAT,), (_LIST,)), Input(("d",), (_ICON,), (_CLIP,))),
    "empty-document": (Input(("q",)), Input()),
    "newlines": (Input(("q\n",)), Input(("\nd\n",))),
    "emoji": (Input(("🙂?",)), Input(("👩‍👩‍👧‍👦.",))),
}


def video_inputs(
    lists: Iterable[FrameList], files: Iterable[str], rates: Iterable[float] = (1, 4)
) -> dict[str, Input]:
    """One input for each list of frames, and for each file at each number of frames a second."""
    inputs = {frame_list.name: Input(video=(frame_list,)) for frame_list in lists}
    for file, fps in itertools.product(files, rates):
        inputs[f"{file}-{fps}"] = Input(video=(File(file),), fps=fps)
    return inputs


def sampled_rows(count: int, samples: int = 24) -> np.ndarray:
    """Indices of the patches that are kept, of ``count``: spread, the first and last among them."""
    return np.unique(np.linspace(0, count - 1, samples).astype(np.int64))
