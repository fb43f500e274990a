"""The drawing at the top of README.md: two RWKV towers, how a block mixes tokens, and the loss.

python tests/bench/figures.py architecture     # figure/architecture.png

Coordinates are tenths of an inch, the origin is at the lower left. The background is opaque white, so that the picture
reads the same on light and dark pages.
"""

from __future__ import annotations

from pathlib import Path

SIZE = (112, 57)  # of the drawing, in tenths of an inch
IMAGE, TEXT, LOSS, INK, GREY, PALE = "#1f5f99", "#b35900", "#2a7f62", "#222222", "#6a6a6a", "#9a9a9a"
FILLS = {IMAGE: "#eaf2fa", TEXT: "#fdf2e6", LOSS: "#e9f5f0", PALE: "#f5f5f5"}
TEXTS = (
    ("raw", "IMG_2071 beach trip!"),
    ("synthetic", "a dog runs on the beach"),
    ("generated", "a brown dog runs along the surf"),
)


class Drawing:
    """A blank page with the few shapes that the picture is made of."""

    def __init__(self) -> None:
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(SIZE[0] / 10, SIZE[1] / 10), facecolor="white")
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, SIZE[0]), ylim=(0, SIZE[1]))
        self.axes.axis("off")

    def box(
        self, x: float, y: float, width: float, height: float, color: str, fill: str | None = None, **style
    ) -> None:
        """A rounded rectangle by its lower left corner."""
        from matplotlib.patches import FancyBboxPatch

        look = {"edgecolor": color, "facecolor": FILLS.get(color, "white") if fill is None else fill, "linewidth": 1.4}
        rounded = f"round,pad=0,rounding_size={style.pop('rounding', 1.0)}"
        self.axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=rounded, **look | style))

    def text(self, x: float, y: float, words: str, size: float = 11, color: str = INK, **style) -> None:
        self.axes.text(x, y, words, fontsize=size, color=color, **{"ha": "center", "va": "center"} | style)

    def arrow(self, start: tuple[float, float], end: tuple[float, float], color: str = INK, **style) -> None:
        from matplotlib.patches import FancyArrowPatch

        look = {"arrowstyle": "-|>", "mutation_scale": 13, "linewidth": 1.6, "shrinkA": 0, "shrinkB": 0}
        self.axes.add_patch(FancyArrowPatch(start, end, color=color, **look | style))

    def cell(self, x: float, y: float, side: float, color: str, fill: str) -> None:
        """A square by its lower left corner: a patch, a token, a score."""
        from matplotlib.patches import Rectangle

        self.axes.add_patch(Rectangle((x, y), side, side, edgecolor=color, facecolor=fill, linewidth=0.9))


def draw_architecture(path: Path) -> None:
    """Save the picture of the whole model."""
    page = Drawing()
    _draw_image(page, 42.5)
    _draw_texts(page, 14.5)
    _draw_tower(page, 30.5, IMAGE, "Image tower", "patch\nembedding\n+ position", "12 blocks", "mean over\npatches")
    _draw_tower(page, 2.5, TEXT, "Text tower", "token\nembedding", "6 blocks", "mean over\ntokens")
    _draw_grid_shift(page, 49.2, 42.5)
    _draw_row_shift(page, 49.2, 14.5)
    _draw_wkv(page, 57.8, 42.5, IMAGE)
    _draw_wkv(page, 57.8, 14.5, TEXT)
    _draw_loss(page, 92, 21)
    page.figure.savefig(path, dpi=160)


def _draw_image(page: Drawing, middle: float) -> None:
    """A dog on a beach, cut into patches."""
    side, sky, sea, sand, dog = 3.4, "#cfe3f5", "#7fb2dd", "#f0dfb8", "#8a5a33"
    rows = ([sky] * 4, [sky, sea, sea, sea], [sea, dog, dog, sand], [sand] * 4)
    for row, colors in enumerate(rows):
        for column, color in enumerate(colors):
            page.cell(6 + column * side, middle + (1 - row) * side, side, "white", color)
    page.text(12.8, middle + 9, "image, cut into patches", 11, IMAGE)
    page.arrow((20.4, middle), (26.4, middle), IMAGE)


def _draw_texts(page: Drawing, middle: float) -> None:
    """Three cards, one of them drawn."""
    page.text(12.3, middle + 12.2, "three texts per image,", 11, TEXT)
    page.text(12.3, middle + 9.9, "one drawn at random per step", 11, TEXT)
    for place, (name, words) in enumerate(TEXTS):
        drawn, bottom = name == "synthetic", middle + 3.3 - 5.6 * place
        style = {"linewidth": 2.0, "fill": "white"} if drawn else {"linewidth": 0.9, "fill": FILLS[PALE]}
        page.box(1, bottom, 22.6, 4.7, TEXT if drawn else PALE, **style)
        page.text(1.9, bottom + 3.35, name, 8.5, TEXT if drawn else GREY, ha="left", weight="bold")
        page.text(1.9, bottom + 1.35, words, 8.5, INK if drawn else GREY, ha="left")
    page.arrow((23.6, middle), (26.4, middle), TEXT)


def _draw_tower(page: Drawing, y: float, color: str, name: str, embed: str, blocks: str, pool: str) -> None:
    """The frame of a tower with what stands before and after its blocks; y: its lower end."""
    middle = y + 12
    page.box(26.8, y, 61.4, 24, color, "white", linewidth=1.8)
    page.text(28.2, y + 21.7, name, 14, color, ha="left", weight="bold")
    page.box(28.2, middle - 5, 11.4, 10, color)
    page.text(33.9, middle, embed, 10.5)
    page.arrow((39.6, middle), (42.6, middle), color)
    page.box(43.8, y + 1.4, 31.4, 19.2, color, "white", linewidth=1.0)  # the block behind the one in front
    page.box(42.8, y + 2.2, 31.4, 19.2, color)
    page.text(44, y + 19.6, blocks, 11, color, ha="left", weight="bold")
    page.box(43.8, middle - 7.6, 20.6, 13.6, color, "white", linewidth=1.0)
    page.text(54.1, middle + 4.7, "time mix", 10, color)
    page.arrow((64.4, middle), (66.6, middle), color)
    page.box(66.6, middle - 7.6, 6.8, 13.6, color, "white", linewidth=1.0)
    page.text(70, middle, "channel\nmix", 10, color)
    page.arrow((75.2, middle), (78, middle), color)
    page.box(78, middle - 5, 9.4, 10, color)
    page.text(82.7, middle, f"norm,\n{pool}", 10.5)


def _draw_grid_shift(page: Drawing, x: float, middle: float) -> None:
    """Image tokens look at four neighbours; x: of the center."""
    side = 2.5
    for row in (-1, 0, 1):
        for column in (-1, 0, 1):
            fill = IMAGE if row == column == 0 else "white"
            page.cell(x + (column - 0.5) * side, middle + (row - 0.5) * side, side, IMAGE, fill)
    for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1)):
        start = (x + dx * 1.15 * side, middle + dy * 1.15 * side)
        page.arrow(start, (x + dx * 0.5 * side, middle + dy * 0.5 * side), mutation_scale=9, linewidth=1.3)
    page.text(x, middle - 5.8, "shift: 4 directions", 8.5)
    page.arrow((x + 1.5 * side, middle), (57.4, middle), IMAGE, mutation_scale=9)


def _draw_row_shift(page: Drawing, x: float, middle: float) -> None:
    """Text tokens look at the one before and the one after."""
    side = 2.5
    for column in (-1, 0, 1):
        page.cell(x + (column - 0.5) * side, middle - side / 2, side, TEXT, "white" if column else TEXT)
    for way in (-1, 1):
        start, end = (x + way * 1.15 * side, middle), (x + way * 0.5 * side, middle)
        page.arrow(start, end, mutation_scale=9, linewidth=1.3)
    page.text(x, middle - 5.8, "shift: 2 directions", 8.5)
    page.arrow((x + 1.5 * side, middle), (57.4, middle), TEXT, mutation_scale=9)


def _draw_wkv(page: Drawing, x: float, middle: float, color: str) -> None:
    """A row of tokens, read from both ends."""
    side = 1.2
    for column in range(5):
        page.cell(x + column * side, middle - side / 2, side, color, "white")
    right = x + 5 * side
    page.arrow((x, middle + 1.9), (right, middle + 1.9), color, linewidth=2.2)
    page.arrow((right, middle - 1.9), (x, middle - 1.9), color, linewidth=2.2)
    page.text(x + 2.5 * side, middle - 4.3, "WKV", 8.5)
    page.text(x + 2.5 * side, middle - 5.8, "both ways", 8.5)


def _draw_loss(page: Drawing, x: float, y: float) -> None:
    """Scores of all images with all texts; x, y: lower left corner. The diagonal is right."""
    side, count = 3.0, 5
    for row in range(count):
        for column in range(count):
            own = row + column == count - 1
            page.cell(x + 1.5 + column * side, y + row * side, side, "white", LOSS if own else "#d5ebe2")
    center, top = x + 1.5 + count * side / 2, y + count * side
    page.text(x + 0.2, y + count * side / 2, "images of all ranks", 9.5, IMAGE, rotation=90)
    page.text(center, y - 1.5, "texts of all ranks", 9.5, TEXT)
    page.text(center, top + 3.6, "InfoNCE", 14, LOSS, weight="bold")
    page.text(center, top + 1.3, "over the global batch", 10, LOSS)
    bend = {"connectionstyle": "angle,angleA=0,angleB=90,rad=6"}
    page.arrow((87.4, 42.5), (center, top + 5), IMAGE, **bend)
    page.arrow((87.4, 14.5), (center, y - 2.8), TEXT, **bend)
    page.text(95, 43.9, "features", 10, IMAGE)
    page.text(95, 12.9, "features", 10, TEXT)
