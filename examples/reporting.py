"""The output of an example: a table, a picture, and files that are complete or absent."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from pdes import PDE
from pictures import COLOURS, OPTIMIZERS, plain_log
from torch import Tensor


@dataclass
class Row:
    """One line of the table. ``error`` is the relative L2 error against the exact solution of the target."""

    method: str
    trainable: int
    share: float
    error: float
    seconds: float | None = None
    stored_bytes: int | None = None  # what must be stored for this task besides the base


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file that is complete or absent, even if a run is interrupted or two runs write it at once."""
    partial = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def format_table(rows: list[Row]) -> str:
    header = ("", "trainable", "of the base", "rel. L2 error", "seconds", "stored per task")
    lines = [header]
    for row in rows:
        seconds = "–" if row.seconds is None else f"{row.seconds:.1f}"
        stored = "–" if row.stored_bytes is None else f"{row.stored_bytes / 1000:.1f} kB"
        lines.append((row.method, f"{row.trainable:,}", f"{row.share:.1%}", f"{row.error:.2e}", seconds, stored))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    template = "   ".join(f"{{:{'>' if i else '<'}{width}}}" for i, width in enumerate(widths))
    return "\n".join(template.format(*line) for line in lines)


def draw(
    pde: PDE,
    exact: Tensor,
    adapted: Tensor,
    courses: dict[str, list[tuple[int, float]]],
    optimizer: str,
    zero_shot: float,
    title: str,
) -> Figure:
    """Exact and adapted solution, their difference, and the course of the error; fields have shape (size, size)."""
    figure = Figure(figsize=(11, 9), layout="constrained")
    figure.suptitle(title, fontsize=14)
    (exact_axes, adapted_axes), (error_axes, course_axes) = figure.subplots(2, 2)
    extent = (pde.lower[0], pde.upper[0], pde.lower[1], pde.upper[1])
    limit = exact.abs().max().item()
    error = (adapted - exact).abs()
    solution = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
    # Points where the error happens to vanish would stretch the scale over many empty decades.
    logarithmic = {"cmap": "magma", "norm": LogNorm(error.max().item() / 1e3, error.max().item(), clip=True)}
    for axes, field, name, style in (
        (exact_axes, exact, "Exact solution u", solution),
        (adapted_axes, adapted, "LoTRA-adapted KAN Ψ", solution),
        (error_axes, error, "Absolute error |Ψ − u|", logarithmic),
    ):
        # Transposed, because an image's rows run along the vertical axis, and our first axis is horizontal.
        image = axes.imshow(field.T.numpy(), origin="lower", extent=extent, aspect="auto", **style)
        axes.set(title=name, xlabel=pde.axes[0], ylabel=pde.axes[1])
        axes.locator_params(nbins=5)
        figure.colorbar(image, ax=axes)
    course_axes.axhline(zero_shot, color=COLOURS["frozen"], linestyle=":", label="base, zero-shot")
    for label, course in courses.items():
        color = COLOURS["adapter" if label.startswith("LoTRA") else "full"]
        course_axes.semilogy(*zip(*course, strict=True), OPTIMIZERS[optimizer], color=color, label=label)
    course_axes.set(title="Convergence on the target", xlabel="training step", ylabel="relative L2 error")
    plain_log(course_axes.yaxis)
    course_axes.grid(alpha=0.3)
    course_axes.legend()
    return figure
