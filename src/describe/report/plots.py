"""Plots as SVG inside the page: text stays text, colors are those of the page's light or dark scheme (style.py)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 520, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 20, 20, 44  # margins of the plotted area


class Curve(NamedTuple):
    """points: (x, y), x ascending. kind: the class that gives its color: raw, caption, generated."""

    name: str
    kind: str
    points: Sequence[tuple[float, float]]


class Axes:
    """From values to places in the drawing."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float]) -> None:
        self.left, self.right = min(xs, default=0.0), max(xs, default=0.0)
        if self.right == self.left:
            self.right = self.left + 1
        self.top = max(ys, default=0) * 1.06 or 1.0

    def x(self, value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - self.left) / (self.right - self.left)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / self.top

    def draw(self, x_label: str, y_label: str, percent: bool = False) -> str:
        """Grid, ticks and labels."""
        parts = []
        bottom = HEIGHT - BOTTOM
        for tick in ticks(0, self.top, 4):
            y = self.y(tick)
            parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
            text = f"{100 * tick:.3g} %" if percent else short(tick)
            parts.append(f'<text class="tick end" x="{LEFT - 7}" y="{y + 4:.1f}">{text}</text>')
        for tick in ticks(self.left, self.right, 6):
            x = self.x(tick)
            parts.append(f'<path class="mark" d="M{x:.1f} {bottom}v4"/>')
            parts.append(f'<text class="tick middle" x="{x:.1f}" y="{bottom + 18}">{short(tick)}</text>')
        parts.append(f'<path class="axis" d="M{LEFT} {bottom}H{WIDTH - RIGHT}"/>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(f'<text class="label middle" x="{middle:.0f}" y="{HEIGHT - 6}">{escape(x_label)}</text>')
        parts.append(f'<text class="label" x="4" y="12">{escape(y_label)}</text>')
        return "".join(parts)


def draw_curves(
    curves: Sequence[Curve],
    x_label: str,
    y_label: str,
    title: str,
    steps: bool = False,
    line: tuple[float, str] | None = None,
) -> str:
    """Lines over x, or filled outlines of histograms (`steps`: each point is the left border of a bin, y a share).

    title: for those who do not see the drawing. line: (x, label), a vertical mark.
    """
    xs = [x for curve in curves for x, _ in curve.points] + ([line[0]] if line else [])
    axes = Axes(xs, [y for curve in curves for _, y in curve.points])
    parts = [axes.draw(x_label, y_label, percent=steps)]
    for curve in curves:
        if not curve.points:
            continue
        places = [(axes.x(x), axes.y(y)) for x, y in curve.points]
        if steps:
            outline = f"M{places[0][0]:.1f} {axes.y(0):.1f}" + "".join(f"V{y:.1f}H{x:.1f}" for x, y in _borders(places))
            parts.append(f'<path class="area {curve.kind}" d="{outline}V{axes.y(0):.1f}Z"/>')
            parts.append(f'<path class="line {curve.kind}" d="{outline}"/>')
        else:
            outline = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
            parts.append(f'<path class="line {curve.kind}" d="M{outline}"/>')
            if len(places) == 1:
                parts.append(
                    f'<circle class="dot {curve.kind}" cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="3"/>'
                )
    if line:
        x = axes.x(line[0])
        end = x > WIDTH * 0.6
        parts.append(f'<path class="limit" d="M{x:.1f} {TOP - 4}V{HEIGHT - BOTTOM}"/>')
        place = f'class="label limit-text{" end" if end else ""}" x="{x + (-6 if end else 6):.1f}" y="{TOP + 8}"'
        parts.append(f"<text {place}>{escape(line[1])}</text>")
    return _frame("".join(parts), title)


def _borders(places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """(right border, height) of each bin; the last is as wide as the one before it."""
    width = places[-1][0] - places[-2][0] if len(places) > 1 else 8.0
    rights = [x for x, _ in places[1:]] + [min(places[-1][0] + width, WIDTH - RIGHT)]
    return [(right, y) for right, (_, y) in zip(rights, places)]


def draw_bars(bars: Sequence[tuple[float, float]], x_label: str, y_label: str, title: str) -> str:
    """Upright bars of a share of all: (x, share); x are whole numbers."""
    xs = [x for x, _ in bars] or [0]
    axes = Axes([min(xs) - 0.6, max(xs) + 0.6], [y for _, y in bars])
    width = 0.82 * (axes.x(1) - axes.x(0))
    parts = [axes.draw(x_label, y_label, percent=True)]
    for x, share in bars:
        place = f'x="{axes.x(x) - width / 2:.1f}" y="{axes.y(share):.1f}" width="{width:.1f}"'
        height = max(0.0, HEIGHT - BOTTOM - axes.y(share))
        parts.append(
            f'<rect class="bar" {place} height="{height:.1f}"><title>{x:g}: {100 * share:.1f} %</title></rect>'
        )
    return _frame("".join(parts), title)


def _frame(content: str, title: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{content}</svg>'


def ticks(low: float, high: float, number: int) -> list[float]:
    """About `number` round values between two others."""
    span = (high - low) / max(1, number)
    power = 10.0 ** math.floor(math.log10(span))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= span * 0.999)
    if high - low >= number:
        step = max(1.0, round(step))
    return [
        round(place * step, 10) for place in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def short(value: float) -> str:
    """A number for a tick: 1200 -> 1.2k."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"
