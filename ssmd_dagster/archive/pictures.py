"""Small SVG charts: lanes over time, a strip of intervals, ranges on a logarithmic axis, bars. No scripts, no fonts, no network.

Each is one self-contained picture that follows the reader's light or dark theme, names its series in words beside the colours,
and tells exact numbers in its tooltips. Not here: where the numbers come from (`report`).
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from typing import NamedTuple

WIDTH = 960
_LEFT, _RIGHT, _TOP, _AXIS = 112, 28, 8, 26
_PLOT = WIDTH - _LEFT - _RIGHT
_NS = 1_000_000_000
_STEPS_S = (1, 2, 5, 10, 15, 30, 60, 300, 600, 1_800, 3_600, 7_200, 14_400, 21_600, 43_200, 86_400)
_MAX_TICKS = 9
_HEAD = 17
"""Pixels above a lane's highest point, for the words that say how high it is."""
_MIN_MARK = 2.5
"""Pixels; what is shorter is drawn this wide, since an interval of a second that nobody sees is no picture."""

# Okabe and Ito's colours, lightened or darkened until each stands out from its surface at 3:1.
_STYLE = """
.p{--s:#fff;--i:#1f2328;--m:#59636e;--g:#d9dee4;--c0:#0072b2;--c1:#a34f00;--c2:#007a5a;--c3:#9c4f7c;--c4:#5a5f66;
--ok:#9db8ab;--bad:#c8281e;--heal:#0072b2;--rep:#b27a00;font:12px system-ui,sans-serif}
@media(prefers-color-scheme:dark){.p{--s:#15191f;--i:#e8ebef;--m:#9aa5b1;--g:#343b45;--c0:#56b4e9;--c1:#f0a04b;--c2:#3fc49a;
--c3:#dd9ec3;--c4:#a8afb8;--ok:#3f5a4e;--bad:#ff6b5e;--heal:#56b4e9;--rep:#f0c04b}}
.p .bg{fill:var(--s)}.p text{fill:var(--i)}.p .m{fill:var(--m)}.p .g{stroke:var(--g);stroke-width:1}
.p .e{text-anchor:end}.p .c{text-anchor:middle}.p .b{font-weight:600}
.p .lost{fill:var(--bad);opacity:.3}.p .shut{fill:var(--g)}
"""
_SERIES = tuple(f"var(--c{index})" for index in range(5))
_STATES = {
    "present": "var(--ok)",
    "closed": "var(--g)",
    "healed": "var(--heal)",
    "repaired": "var(--rep)",
    "missing": "var(--bad)",
}


class Lane(NamedTuple):
    """One series over time: `counts` of equal stretches that fill the axis.

    `holes` are `(from_ns, to_ns, words)`, `closed` likewise where there was nothing to record.
    """

    name: str
    counts: Sequence[int]
    holes: Sequence[tuple[int, int, str]] = ()
    closed: Sequence[tuple[int, int, str]] = ()


class Stretch(NamedTuple):
    """An interval of a strip: its `state` is present, closed, missing, healed or repaired; `words` are for the tooltip."""

    from_ns: int
    to_ns: int
    state: str
    words: str


class Range(NamedTuple):
    """A distribution by its quantiles p5, p50, p95 and p99, all above zero."""

    name: str
    quantiles: tuple[float, ...]
    words: str


class Bar(NamedTuple):
    """A named quantity; `words` stand behind the bar."""

    name: str
    value: int
    words: str


def data_uri(svg: str) -> str:
    """Return a picture as an address that an `<img>`, or Markdown, can hold."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def markdown(pictures: Mapping[str, str]) -> str:
    """Return pictures as Markdown, each under its name."""
    return "\n\n".join(f"**{name}**\n\n![{name}]({data_uri(svg)})" for name, svg in pictures.items())


def lanes(title: str, open_ns: int, close_ns: int, series: Sequence[Lane], unit: str) -> str:
    """Draw series one above the other, each on a scale of its own: they may differ a thousandfold."""
    height, gap = 58, 12
    bottom = _TOP + len(series) * (height + gap)
    parts = [_time_grid(open_ns, close_ns, bottom)]
    for index, lane in enumerate(series):
        top = _TOP + index * (height + gap)
        most = max([*lane.counts, 1])
        colour = _SERIES[index % len(_SERIES)]
        for kind, stretches in (("shut", lane.closed), ("lost", lane.holes)):
            for from_ns, to_ns, words in stretches:
                left, width = _span(from_ns, to_ns, open_ns, close_ns)
                parts.append(_rect(left, top, width, height, f'class="{kind}"', words))
        step = _PLOT / max(len(lane.counts), 1)
        path = [f"M{_LEFT},{top + height}"]
        for at, count in enumerate(lane.counts):
            if at == 0 or count != lane.counts[at - 1]:
                path.append(f"V{top + height - (height - _HEAD) * count / most:.1f}")
            if at + 1 == len(lane.counts) or count != lane.counts[at + 1]:
                path.append(f"H{_LEFT + (at + 1) * step:.1f}")
        path.append(f"V{top + height}Z")
        total = sum(lane.counts)
        tip = f"{lane.name}: {total:,} in all, at most {most if total else 0:,} {unit}"
        parts.append(
            f'<path d="{"".join(path)}" fill="{colour}" fill-opacity=".35" stroke="{colour}" stroke-width="1.2" '
            f'stroke-linejoin="round"><title>{escape(tip)}</title></path>'
        )
        parts.append(_text(0, top + 24, lane.name, "b"))
        parts.append(_text(0, top + 41, f"{total:,}", "m"))
        parts.append(_text(_LEFT + _PLOT, top + 11, f"peak {most if total else 0:,} {unit}", "e m"))
        parts.append(_line(_LEFT, top + height, _LEFT + _PLOT, top + height))
    return _picture(title, bottom + _AXIS, parts)


def strip(title: str, open_ns: int, close_ns: int, rows: Sequence[tuple[str, Sequence[Stretch]]]) -> str:
    """Draw one band a row, coloured by state, with a legend of the states that occur."""
    height, gap = 24, 10
    bottom = _TOP + len(rows) * (height + gap)
    parts = [_time_grid(open_ns, close_ns, bottom)]
    seen: set[str] = set()
    for index, (name, stretches) in enumerate(rows):
        top = _TOP + index * (height + gap)
        parts.append(_text(0, top + 16, name, "b"))
        for stretch in sorted(stretches, key=lambda one: list(_STATES).index(one.state)):  # the worst on top
            seen.add(stretch.state)
            left, width = _span(stretch.from_ns, stretch.to_ns, open_ns, close_ns)
            parts.append(_rect(left, top, width, height, f'fill="{_STATES[stretch.state]}"', stretch.words))
    x = float(_LEFT)
    for state in (state for state in _STATES if state in seen):
        parts.append(_rect(x, bottom + _AXIS + 2, 12, 12, f'rx="2" fill="{_STATES[state]}"', ""))
        parts.append(_text(x + 18, bottom + _AXIS + 12, state, "m"))
        x += 34 + 7 * len(state)
    return _picture(title, bottom + _AXIS + 22, parts)


def ranges(title: str, series: Sequence[Range], unit: str) -> str:
    """Draw distributions on a logarithmic axis: a line from p5 to p99, thick up to p95, a dot at the median."""
    height = 40
    bottom = _TOP + len(series) * height
    lowest = math.floor(math.log10(min([one.quantiles[0] for one in series], default=1)))
    highest = max(math.ceil(math.log10(max([one.quantiles[-1] for one in series], default=10))), lowest + 1)

    def x(value: float) -> float:
        return _LEFT + _PLOT * (math.log10(value) - lowest) / (highest - lowest)

    parts = []
    for power in range(lowest, highest + 1):
        parts.append(_line(x(10.0**power), _TOP, x(10.0**power), bottom))
        parts.append(_text(x(10.0**power), bottom + 16, f"{10.0**power:g} {unit}", "c m"))
    for index, one in enumerate(series):
        middle = _TOP + index * height + height / 2
        colour = _SERIES[index % len(_SERIES)]
        tip = f"<title>{escape(one.words)}</title>"
        p5, p50, p95, p99 = one.quantiles
        for left, right, thick in ((p5, p99, 2), (p5, p95, 8)):
            parts.append(
                f'<line x1="{x(left):.1f}" x2="{max(x(right), x(left) + 1):.1f}" y1="{middle}" y2="{middle}" stroke="{colour}" '
                f'stroke-width="{thick}" stroke-linecap="round">{tip}</line>'
            )
        parts.append(
            f'<circle cx="{x(p50):.1f}" cy="{middle}" r="6" fill="{colour}" stroke="var(--s)" stroke-width="2">{tip}</circle>'
        )
        parts.append(_text(0, middle + 4, one.name, "b"))
    return _picture(title, bottom + _AXIS, parts)


def bars(title: str, series: Sequence[Bar]) -> str:
    """Draw horizontal bars, longest first as given; names stand on the bars' own lines, so that long ones fit."""
    height = 34
    most = max([one.value for one in series], default=1) or 1
    parts = []
    for index, one in enumerate(series):
        top = _TOP + index * height
        parts.append(_text(0, top + 12, one.name, "b"))
        parts.append(_text(WIDTH, top + 12, one.words, "e m"))
        width = max(WIDTH * one.value / most, 1)
        parts.append(_rect(0, top + 17, width, 8, f'rx="3" fill="{_SERIES[0]}"', f"{one.name}: {one.words}"))
    return _picture(title, _TOP + len(series) * height + 4, parts)


def _picture(title: str, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="p" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" '
        f'height="{height:.0f}" role="img" aria-label="{escape(title, quote=True)}"><style>{_STYLE}</style>'
        f'<rect class="bg" width="{WIDTH}" height="{height:.0f}"/>{"".join(parts)}</svg>'
    )


def _time_grid(open_ns: int, close_ns: int, bottom: float) -> str:
    """Draw lines and labels at round times, UTC."""
    seconds = max((close_ns - open_ns) / _NS, 1)
    step = next((step for step in _STEPS_S if seconds / step <= _MAX_TICKS), _STEPS_S[-1])
    parts = []
    words = "%H:%M" if step >= 60 else "%H:%M:%S"
    first = -(-open_ns // (step * _NS)) * step
    for at_s in range(first, close_ns // _NS + 1, step):
        x = _LEFT + _PLOT * (at_s * _NS - open_ns) / (close_ns - open_ns)
        parts.append(_line(x, _TOP, x, bottom))
        parts.append(_text(x, bottom + 16, datetime.fromtimestamp(at_s, UTC).strftime(words), "c m"))
    parts.append(_text(0, bottom + 16, "UTC", "m"))
    return "".join(parts)


def _span(from_ns: int, to_ns: int, open_ns: int, close_ns: int) -> tuple[float, float]:
    """Return left edge and width of an interval, wide enough to be seen and inside the plot."""
    scale = _PLOT / (close_ns - open_ns)
    left = (max(from_ns, open_ns) - open_ns) * scale
    width = max((min(to_ns, close_ns) - open_ns) * scale - left, _MIN_MARK)
    return _LEFT + min(left, _PLOT - width), width


def _text(x: float, y: float, text: str, classes: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{classes}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="g" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _rect(x: float, y: float, width: float, height: float, attributes: str, words: str) -> str:
    title = f"<title>{escape(words)}</title>" if words else ""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.2f}" height="{height}" {attributes}>{title}</rect>'
