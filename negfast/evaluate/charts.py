"""Small charts as inline SVG: no library, no script, colours by CSS classes so that a page may be light or dark."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 230
LEFT, RIGHT, TOP, BOTTOM = 56, 18, 12, 42

Format = Callable[[float, float], str]  # (value, distance between ticks)


@dataclass(frozen=True)
class Line:
    """One line of a chart; ``faint`` is background to another."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: int = 0  # class c0..c4
    faint: bool = False
    dots: bool = False


def changes(lines: Sequence[Line], span: float = 0.0) -> bool:
    """Whether any of the lines goes up or down by more than a hundredth of the axis that `line_chart` gives them."""
    ranges = [[y for y in line.y if math.isfinite(y)] for line in lines]
    drawn = [y for ys in ranges for y in ys]
    axis = max(span, max(drawn) - min(drawn)) if drawn else span
    return any(max(ys) - min(ys) > axis / 100 for ys in ranges if ys)


def number(value: float, step: float = 0.001) -> str:
    """1,200 or 0.35: as many digits as tell values ``step`` apart; powers of ten where these are too many."""
    digits = next((d for d in range(6) if abs(round(step, d) - step) < step * 1e-6), 6)
    if digits == 6:
        return f"{value:.1e}" if value else "0"
    return f"{value:,.{digits}f}"


def percent(value: float, step: float = 0.001) -> str:
    return f"{number(value * 100, step * 100)} %"


def line_chart(
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    x_format: Format = number,
    y_format: Format = number,
    from_zero: bool = False,
    diagonal: bool = False,
    span: float = 0.0,
) -> str:
    """Lines over one pair of axes, with a legend where there is more than one name; ``diagonal`` draws y = x, ``span``
    is what the y axis covers at least, so that noise does not look like a trend."""
    points = [(x, y) for line in lines for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
    if not points:
        return '<p class="none">nothing to show</p>'
    zero = [0.0] if from_zero else []
    xs, ys = [x for x, _ in points] + (zero if diagonal else []), [y for _, y in points] + zero
    room = max(span - (max(ys) - min(ys)), 0.0) / 2
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys) - room, max(ys) + room)
    frame = _Frame(x_ticks, y_ticks)
    parts = [frame.grid(x_label, x_format, y_format)]
    if diagonal:
        low, high = max(x_ticks[0], y_ticks[0]), max(min(x_ticks[-1], y_ticks[-1]), max(x_ticks[0], y_ticks[0]))
        ends = f'x1="{frame.x(low)}" y1="{frame.y(low)}" x2="{frame.x(high)}" y2="{frame.y(high)}"'
        parts.append(f'<line class="diagonal" {ends}/>')
    for line in lines:
        parts.append(_line(frame, line))
    return _figure(parts, [(line.name, line.color) for line in lines if line.name and not line.faint], y_label)


def bar_chart(labels: Sequence[str], values: Sequence[float], x_label: str, y_label: str, color: int = 0) -> str:
    """A bar a label from zero up; the labels are tooltips."""
    if not values:
        return '<p class="none">nothing to show</p>'
    frame = _Frame([0.0, float(len(values))], ticks(0.0, max(values)))
    parts = [frame.grid(x_label, None, number)]
    width = (WIDTH - LEFT - RIGHT) / len(values)
    for i, (label, value) in enumerate(zip(labels, values, strict=True)):
        x, y = LEFT + i * width, frame.y(value)
        gap = width * 0.15 if width > 4 else 0
        parts.append(
            f'<rect class="bar c{color}" x="{x + gap:.1f}" y="{y}" width="{width - 2 * gap:.2f}" '
            f'height="{max(frame.y(0) - y, 0):.1f}"><title>{escape(label)}: {value:.4g}</title></rect>'
        )
    return _figure(parts, [], y_label)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from at most ``low`` to at least ``high``."""
    if high - low <= max(abs(low), abs(high), 0.1) * 1e-9:  # one value: give it room
        room = abs(low) * 0.1 if abs(low) > 1e-9 else 0.1
        low, high = low - room, high + room
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


@dataclass(frozen=True)
class _Frame:
    x_ticks: list[float]
    y_ticks: list[float]

    def x(self, value: float) -> float:
        share = (value - self.x_ticks[0]) / (self.x_ticks[-1] - self.x_ticks[0])
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        share = (value - self.y_ticks[0]) / (self.y_ticks[-1] - self.y_ticks[0])
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    def grid(self, x_label: str, x_format: Format | None, y_format: Format) -> str:
        out = []
        x_step, y_step = self.x_ticks[1] - self.x_ticks[0], self.y_ticks[1] - self.y_ticks[0]
        for value in self.y_ticks:
            y = self.y(value)
            out.append(f'<line class="grid" x1="{LEFT}" y1="{y}" x2="{WIDTH - RIGHT}" y2="{y}"/>')
            out.append(f'<text class="tick end" x="{LEFT - 6}" y="{y + 4}">{y_format(value, y_step)}</text>')
        for value in self.x_ticks if x_format else []:
            assert x_format is not None
            out.append(
                f'<text class="tick" x="{self.x(value)}" y="{HEIGHT - BOTTOM + 15}">{x_format(value, x_step)}</text>'
            )
        bottom = HEIGHT - BOTTOM
        out.append(f'<line class="axis" x1="{LEFT}" y1="{bottom}" x2="{WIDTH - RIGHT}" y2="{bottom}"/>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        out.append(f'<text class="label" x="{middle}" y="{HEIGHT - 8}">{escape(x_label)}</text>')
        return "".join(out)


def _line(frame: _Frame, line: Line) -> str:
    out, kind = [], f"c{line.color}{' faint' if line.faint else ''}"
    points = [(frame.x(x), frame.y(y)) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
    path = " ".join(f"{x},{y}" for x, y in points)
    out.append(f'<polyline class="line {kind}" points="{path}"/>')
    if line.dots:
        out += [f'<circle class="dot {kind}" cx="{x}" cy="{y}" r="3.2"/>' for x, y in points]
    return "".join(out)


def _figure(parts: Sequence[str], names: Sequence[tuple[str, int]], label: str) -> str:
    keys = "".join(f'<span><i class="key c{color}"></i>{escape(name)}</span>' for name, color in names)
    legend = f'<div class="legend">{keys}</div>' if len(names) > 1 else ""
    return (
        f'<div class="y-label">{escape(label)}</div>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>{legend}'
    )
