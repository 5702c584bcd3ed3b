"""Draws what LoTRA does: a KAN layer, its tensor of coefficients, and the update by core and factors.

python examples/method_diagram.py
"""

from __future__ import annotations

import math
import sys
from itertools import product
from pathlib import Path

from command_line import exit_code, new_parser
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle
from reporting import write_atomically

FROZEN, TRAINED = "#c9d3df", "#f2a65a"
SHIFT = (0.45, 0.35)  # how far a unit of the third axis is drawn to the right and up


def box(axes: Axes, x: float, y: float, width: float, height: float, depth: float, color: str) -> None:
    """A cuboid whose front has its lower left corner at (x, y)."""
    right, up = depth * SHIFT[0], depth * SHIFT[1]
    style = {"edgecolor": "#444444", "linewidth": 1.0}
    top = [
        (x, y + height),
        (x + right, y + height + up),
        (x + width + right, y + height + up),
        (x + width, y + height),
    ]
    side = [(x + width, y), (x + width + right, y + up), (x + width + right, y + height + up), (x + width, y + height)]
    for corners, shade in ((top, 0.75), (side, 0.55)):
        axes.add_patch(Polygon(corners, facecolor=color, alpha=shade, **style))
    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, **style))


def sheet(axes: Axes, x: float, y: float, width: float, height: float) -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=TRAINED, edgecolor="#444444", linewidth=1.0))


SHAPES = (
    lambda t: math.sin(3 * t),
    lambda t: 1.6 * math.exp(-4 * t * t) - 0.8,
    math.tanh,
    lambda t: math.sin(5 * t) * t,
)


def layer(axes: Axes, x: float, y: float, width: float, height: float) -> None:
    """Two inputs, two outputs, and a curve on each edge."""
    ends = (y, y + height)
    for (start, end), shape in zip(product(ends, ends), SHAPES, strict=True):
        axes.plot([x, x + width], [start, end], color="#999999", linewidth=0.9, zorder=1)
        middle = (x + 0.27 * width, start + 0.27 * (end - start))
        axes.add_patch(
            Rectangle((middle[0] - 0.24, middle[1] - 0.2), 0.48, 0.4, facecolor="white", edgecolor="#999999")
        )
        steps = [k / 20 for k in range(-20, 21)]
        axes.plot(
            [middle[0] + 0.2 * t for t in steps],
            [middle[1] + 0.14 * shape(t) for t in steps],
            color="#20639b",
            zorder=3,
        )
    for place in (x, x + width):
        axes.plot([place] * 2, ends, "o", color="#333333", markersize=7, zorder=3)


def draw() -> Figure:
    figure = Figure(figsize=(11, 2.9), layout="constrained")
    axes = figure.subplots()
    small, large = {"ha": "center", "fontsize": 10}, {"ha": "center", "va": "center", "fontsize": 17}
    layer(axes, 0.1, 1.1, 2.4, 1.8)
    axes.text(1.3, 0.15, "a KAN layer:\na function on every edge", va="center", **small)
    axes.text(3.1, 2.0, "→", **large)
    box(axes, 3.7, 1.0, 1.7, 2.0, 1.6, FROZEN)
    axes.text(4.55, 2.0, "A", **large)
    axes.text(4.7, 0.15, "its coefficients, frozen:\ninputs × outputs × basis functions", va="center", **small)
    axes.text(6.9, 2.0, "+", **large)
    sheet(axes, 7.5, 1.0, 0.5, 2.0)
    axes.text(7.75, 2.0, "U$_1$", ha="center", va="center", fontsize=12)
    box(axes, 8.3, 1.8, 0.5, 0.5, 0.5, TRAINED)
    axes.text(8.55, 2.05, "G", ha="center", va="center", fontsize=12)
    sheet(axes, 9.3, 1.8, 1.7, 0.5)
    axes.text(10.15, 2.05, "U$_2$", ha="center", va="center", fontsize=12)
    corners = [(8.45, 2.65), (8.95, 2.65), (9.75, 3.25), (9.25, 3.25)]
    axes.add_patch(Polygon(corners, facecolor=TRAINED, edgecolor="#444444", linewidth=1.0))
    axes.text(9.1, 2.95, "U$_3$", ha="center", va="center", fontsize=12)
    axes.text(
        9.2,
        0.15,
        "the update, trained: a core and a factor\nfor each axis, a tenth of the numbers",
        va="center",
        **small,
    )
    axes.set(xlim=(-0.1, 11.4), ylim=(-0.3, 3.75), aspect="equal")
    axes.axis("off")
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = new_parser(__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "images" / "method.png", help="file")
    args = parser.parse_args(argv)
    return exit_code(
        lambda: write_atomically(args.output, lambda path: draw().savefig(path, dpi=110, format="png")),
        "Nothing is kept.",
    )


if __name__ == "__main__":
    sys.exit(main())
