"""Plots of spectra and of the functions on edges. Only this module needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..tucker.decomposition import Ranks
from ..tucker.spectrum import Spectrum
from .updates import activation_curves

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Format, width and colour by mode. They show all three curves even if these are equal.
_MODES = {"input": (".-", 4.0, "C0"), "output": (".-", 1.5, "C1"), "basis": (".:", 2.0, "k")}
_LEAST = 1e-4  # the smallest σ_k / ‖Δ‖ that sets the scale; it has 1e-8 of the energy


def plot_spectrum(spectra: Mapping[str, Spectrum], ranks: Mapping[str, int | Ranks] | None = None) -> Figure:
    """Plot σ_k / ‖Δ‖ over k for the three unfoldings of every update, in a panel for each update.

    The plot follows figure 1 of the source. All panels have one scale, which ends just below the smallest value above
    1e-4. Smaller values contribute almost nothing to the update.

    Args:
        spectra: spectra by name, as from `update_spectrum`.
        ranks: ranks to mark, by the same names, as from `suggest_ranks`.

    Raises:
        ImportError: without matplotlib.
        ValueError: if there is nothing to draw, or `ranks` names something else.
    """
    figure, panels = _panels("plot_spectrum", "spectra", spectra)
    unknown = sorted(set(ranks or {}) - set(spectra))
    if unknown:
        raise ValueError(f"`ranks` names {unknown}, which `spectra` does not have; it has {sorted(spectra)}")
    shares = [[v / (spectrum.energy**0.5 or 1) for v in spectrum.singular_values] for spectrum in spectra.values()]
    shown = torch.cat([torch.ones(1), *(values for three in shares for values in three)])
    for axes, (name, spectrum), three in zip(panels, spectra.items(), shares, strict=True):
        axes.set(title=f"{name} {spectrum.shape}", xlabel="k", yscale="log")
        axes.set_ylim(shown[shown > _LEAST].min().item() / 1.5, 1.5)
        marked = (ranks or {}).get(name, (0, 0, 0))
        marked = (marked,) * 3 if isinstance(marked, int) else marked[:3]
        for (mode, (style, width, colour)), values, rank in zip(_MODES.items(), three, marked, strict=True):
            axes.plot(range(1, len(values) + 1), values.tolist(), style, lw=width, color=colour, label=mode)
            if rank is not None and 0 < rank <= len(values):
                axes.plot(rank, values[rank - 1].item(), "o", color=colour, fillstyle="none", markersize=11)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.grid(alpha=0.3)
    figure.supylabel("σ_k / ‖Δ‖", fontsize="medium")
    _legend(figure, panels[0], "kept" if ranks else None)
    return figure


def plot_activations(
    layers: Mapping[str, nn.Module], edges: Sequence[tuple[int, int]], reference: torch.Tensor, inputs: torch.Tensor
) -> Figure:
    """Plot φ_io(t) of chosen edges (i, o), in a panel for each edge, for several states of one layer.

    >>> layers = {"base": base.layers[0], "adapted": model.get_submodule("base_model.model.layers.0")}
    >>> plot_activations(layers, [(0, 0), (1, 3)], reference=torch.zeros(2), inputs=torch.linspace(-1, 1, 200))

    Args:
        layers: the states by label, such as before and after adaptation. Any module will do; see `activation_curves`.
        edges: pairs (input, output).
        reference: the point from which one input at a time varies, shape (n,).
        inputs: the values of this input, shape (points,).

    Raises:
        ImportError: without matplotlib.
        ValueError: as for `activation_curves`, or if there is nothing to draw.
    """
    figure, panels = _panels("plot_activations", "edges", edges)
    if not layers:
        raise ValueError("`layers` should have at least one layer by label, got none")
    for (label, layer), style in zip(layers.items(), cycle(("-", "--", "-.", ":")), strict=False):
        curves = activation_curves(layer, edges, reference, inputs)
        for axes, curve in zip(panels, curves, strict=True):
            axes.plot(inputs.tolist(), curve.tolist(), style, label=label)
    for axes, (i, o) in zip(panels, edges, strict=True):
        axes.set(title=f"input {i} → output {o}", xlabel=f"x_{i}", ylabel="φ(x) − φ(reference)")
        axes.grid(alpha=0.3)
    _legend(figure, panels[0])
    return figure


def _panels(function: str, argument: str, things: Any) -> tuple[Figure, list[Any]]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"{function} draws with matplotlib, which cannot be imported ({error}): pip install matplotlib"
        ) from error
    if not things:
        raise ValueError(f"`{argument}` is empty: there is nothing to draw")
    columns = min(3, len(things))
    rows = -(-len(things) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in panels[len(things) :]:
        unused.remove()
    return figure, panels[: len(things)]


def _legend(figure: Figure, axes: Any, circles: str | None = None) -> None:
    """One legend below all panels."""
    handles, labels = axes.get_legend_handles_labels()
    if circles is not None:
        handles.append(axes.plot([], [], "o", color="0.4", fillstyle="none", markersize=10)[0])
        labels.append(circles)
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
