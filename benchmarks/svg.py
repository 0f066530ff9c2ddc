"""Charts of bars, or of points with intervals, as SVG: text, lines and rectangles only.

The same chart gives the same bytes anywhere. Nothing is embedded: widths of text are estimated for
a wide font, so that a narrower one leaves a little more room. Colours follow the reader's light or
dark scheme and, after Okabe and Ito, can be told apart by the colour-blind.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, EDGE = 860, 20
LABEL = 40  # characters in a line of a label
CHARACTER = 0.62  # of the size of the font
LINE, TICK = 14, 16
BAR, BETWEEN, APART = 11, 2, 10  # height of a bar, space below it, space between groups

STYLE = """<style>
text{font-family:system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif;font-size:12px}
text{fill:#1f2328}.page{fill:#ffffff}.soft{fill:#59636e;font-size:11px}
.value{font-size:10.5px;paint-order:stroke;stroke:#ffffff;stroke-width:3px}
.title{font-size:16px;font-weight:600}.head{font-weight:600}
.grid{stroke:#e3e7eb}.base{stroke:#8c959f}.mark{stroke:#59636e;stroke-dasharray:4 3}
.range{stroke:#59636e;stroke-width:1.2}
.c0{fill:#8c959f}.c1{fill:#0072b2}.c2{fill:#e69f00}.c3{fill:#009e73}.c4{fill:#cc79a7}
.c5{fill:#d55e00}.c6{fill:#56b4e9}
@media (prefers-color-scheme:dark){
text{fill:#e6edf3}.page{fill:#0d1117}.soft{fill:#9198a1}.value{stroke:#0d1117}
.grid{stroke:#262c36}.base{stroke:#656c76}.mark{stroke:#9198a1}.range{stroke:#9198a1}
.c1{fill:#3f9ee0}.c3{fill:#18b88a}
}
</style>
"""


@dataclass(frozen=True)
class Bar:
    """One value. With an interval it is drawn as a point in it."""

    series: str
    value: float
    text: str
    interval: tuple[float, float] | None = None


Groups = Mapping[str, Sequence[Bar]]  # by label


@dataclass(frozen=True)
class Scale:
    """An axis from the first to the last tick. Bars begin at ``base``; ``mark`` is a line."""

    ticks: tuple[float, ...]
    suffix: str = ""
    base: float = 0.0
    mark: float | None = None
    log: bool = False

    def part(self, value: float) -> float:
        """Where the value is, from 0 at the first tick to 1 at the last."""
        low, value, high = (
            math.log(v) if self.log else v for v in (self.ticks[0], value, self.ticks[-1])
        )
        return (value - low) / (high - low)


@dataclass(frozen=True)
class Column:
    title: str
    axis: str
    scale: Scale
    groups: Groups


@dataclass(frozen=True)
class Panel:
    """Columns side by side, which share their labels."""

    title: str
    columns: tuple[Column, ...]


@dataclass(frozen=True)
class Chart:
    """``series`` is all there may be, in the order of their colours; the legend has those used."""

    title: str
    series: tuple[str, ...]
    panels: tuple[Panel, ...]
    captions: tuple[str, ...]


def linear(values: Sequence[float], zero: bool = True, most: int = 5) -> tuple[float, ...]:
    """Round ticks around the values, from 0 on unless told otherwise; about ``most`` steps."""
    low, high = min(values), max(values)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    rough = max(high - low, 1e-9) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(i * step for i in range(first, max(last, first + 1) + 1))


def logarithmic(values: Sequence[float]) -> tuple[float, ...]:
    """1, 2, 5 and their tenfold, around the values and 1."""
    low, high = min(*values, 1.0), max(*values, 1.0)
    steps = [f * 10.0**p for p in range(-4, 7) for f in (1, 2, 5)]
    first = max(i for i, s in enumerate(steps) if s <= low * (1 + 1e-9))
    last = min(i for i, s in enumerate(steps) if s >= high * (1 - 1e-9))
    return tuple(steps[first : max(last, first + 1) + 1])


def _at(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _wide(string: str, size: float) -> float:
    return len(string) * size * CHARACTER


def _wrap(string: str, characters: int) -> list[str]:
    """Lines; words stay whole, so that they can be searched for."""
    return textwrap.wrap(string, characters, break_long_words=False, break_on_hyphens=False)


class _Page:
    """Collects elements; ``y`` is where the next one goes."""

    def __init__(self, colours: Mapping[str, int]) -> None:
        self.parts: list[str] = []
        self.y = 0.0
        self.colours = colours

    def text(self, x: float, y: float, string: str, kind: str = "", anchor: str = "start") -> None:
        css = f' class="{kind}"' if kind else ""
        side = "" if anchor == "start" else f' text-anchor="{anchor}"'
        body = escape(string, quote=False)
        self.parts.append(f'<text x="{_at(x)}" y="{_at(y)}"{css}{side}>{body}</text>')

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        self.parts.append(
            f'<line x1="{_at(x1)}" y1="{_at(y1)}" x2="{_at(x2)}" y2="{_at(y2)}" class="{kind}"/>'
        )

    def rectangle(self, x: float, y: float, width: float, height: float, series: str) -> None:
        self.parts.append(
            f'<rect x="{_at(x)}" y="{_at(y)}" width="{_at(width)}" height="{_at(height)}"'
            f' class="c{self.colours[series]}"/>'
        )

    def point(self, x: float, y: float, series: str) -> None:
        kind = f"c{self.colours[series]}"
        self.parts.append(f'<circle cx="{_at(x)}" cy="{_at(y)}" r="4" class="{kind}"/>')

    def paragraph(self, string: str, kind: str) -> None:
        for line in _wrap(string, int((WIDTH - 2 * EDGE) / (11 * CHARACTER))):
            self.y += LINE
            self.text(EDGE, self.y, line, kind)


def _legend(page: _Page, series: Sequence[str]) -> None:
    page.y += 20
    x = float(EDGE)
    for name in series:
        page.rectangle(x, page.y - 9, 10, 10, name)
        page.text(x + 15, page.y, name)
        x += 15 + _wide(name, 12) + 18


def _labels(panel: Panel) -> dict[str, int]:
    """Labels in the order of their first column, and how many bars each has in the fullest."""
    bars: dict[str, int] = {}
    for column in panel.columns:
        for label, group in column.groups.items():
            bars[label] = max(bars.get(label, 0), len(group))
    return bars


def _panel(page: _Page, panel: Panel, left: float) -> None:
    """``left`` is where the columns begin."""
    page.y += 26
    page.text(EDGE, page.y, panel.title, "head")
    wrapped = {label: _wrap(label, LABEL) for label in _labels(panel)}
    heights = {
        label: max(count * (BAR + BETWEEN) - BETWEEN, len(wrapped[label]) * LINE)
        for label, count in _labels(panel).items()
    }
    room = (WIDTH - EDGE - left) / len(panel.columns)
    named = any(column.title for column in panel.columns)
    top = page.y + (22 if named else 8)
    bottom = top + sum(heights.values()) + APART * len(heights)
    for i, column in enumerate(panel.columns):
        x = left + i * room
        if column.title:
            page.text(x, page.y + 17, column.title)
        _column(page, column, (x, room), (top, bottom), heights)
    y = top + APART / 2
    for label, height in heights.items():
        lines = wrapped[label]
        first = y + height / 2 - len(lines) * LINE / 2 + 10.5
        for i, line in enumerate(lines):
            page.text(left - 8, first + i * LINE, line, "", "end")
        y += height + APART
    page.y = bottom + TICK + LINE


def _column(
    page: _Page,
    column: Column,
    across: tuple[float, float],
    down: tuple[float, float],
    heights: Mapping[str, float],
) -> None:
    """One axis with its bars. Right of the axis is room for the longest value."""
    (x, room), (top, bottom), scale = across, down, column.scale
    texts = [_wide(bar.text, 10.5) for group in column.groups.values() for bar in group]
    width = room - max(texts) - 20

    def at(value: float) -> float:
        return x + width * scale.part(value)

    for tick in scale.ticks:
        page.line(at(tick), top, at(tick), bottom, "base" if tick == scale.base else "grid")
        page.text(at(tick), bottom + TICK - 3, f"{tick:g}{scale.suffix}", "soft", "middle")
    page.text(x, bottom + TICK + LINE - 2, column.axis, "soft")
    y = top + APART / 2
    values: list[tuple[float, float, str]] = []
    for label, height in heights.items():
        group = column.groups.get(label, ())
        start = y + (height - len(group) * (BAR + BETWEEN) + BETWEEN) / 2
        for i, bar in enumerate(group):
            above = start + i * (BAR + BETWEEN)
            end = _bar(page, bar, at, scale.base, above)
            values.append((end + 4, above + BAR / 2 + 3.8, bar.text))
        y += height + APART
    # Over the bars, and the values over it.
    if scale.mark is not None:
        page.line(at(scale.mark), top, at(scale.mark), bottom, "mark")
    for right, baseline, string in values:
        page.text(right, baseline, string, "value")


def _bar(page: _Page, bar: Bar, at: Callable[[float], float], base: float, y: float) -> float:
    """Returns where it ends on the right."""
    middle, end = y + BAR / 2, at(bar.value)
    if bar.interval is None:
        near, far = sorted((at(base), end))
        page.rectangle(near, y, far - near, BAR, bar.series)
    else:
        near, far = (at(v) for v in bar.interval)
        page.line(near, middle, far, middle, "range")
        page.point(end, middle, bar.series)
    return far


def render(chart: Chart) -> str:
    """The chart as an SVG file; an unknown series raises KeyError."""
    used = {
        bar.series
        for panel in chart.panels
        for column in panel.columns
        for group in column.groups.values()
        for bar in group
    }
    page = _Page({name: i for i, name in enumerate(chart.series)})
    page.y = 28
    page.text(EDGE, page.y, chart.title, "title")
    if len(used) > 1:
        _legend(page, [name for name in chart.series if name in used])
    lines = [
        line for panel in chart.panels for label in _labels(panel) for line in _wrap(label, LABEL)
    ]
    left = EDGE + 10 + max(_wide(line, 12) for line in lines)
    for panel in chart.panels:
        _panel(page, panel, left)
    page.y += 10
    for caption in chart.captions:
        page.paragraph(caption, "soft")
    size = f'{WIDTH}" height="{_at(page.y + 14)}'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{size}" role="img">\n'
    head += f"<title>{escape(chart.title, quote=False)}</title>\n{STYLE}"
    head += '<rect width="100%" height="100%" class="page"/>\n'
    return head + "\n".join(page.parts) + "\n</svg>\n"
