"""Pictures of spectra and of the functions on edges. matplotlib is needed here only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..tensors.spectrum import Spectrum
from ..tensors.tucker import Ranks
from .updates import activation_curves

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MODES = {"input": "-", "output": "--", "basis": ":"}  # drawn so that equal curves show


def plot_spectrum(spectra: Mapping[str, Spectrum], ranks: Mapping[str, int | Ranks] | None = None) -> Figure:
    """σ_k / ‖Δ‖ over k for the three unfoldings of every update, with a panel for each update; the source's figure 1.

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
    for axes, (name, spectrum) in zip(panels, spectra.items(), strict=True):
        norm = math.sqrt(spectrum.energy)
        marked = (ranks or {}).get(name, (0, 0, 0))
        marked = (marked,) * 3 if isinstance(marked, int) else marked[:3]
        axes.set(title=f"{name} {spectrum.shape}", xlabel="k", ylabel="σ_k / ‖Δ‖", yscale="log" if norm else "linear")
        for (mode, style), values, rank in zip(_MODES.items(), spectrum.singular_values, marked, strict=True):
            shares = (values / norm if norm else values).tolist()
            # Below rounding there is no information, and a logarithmic axis would stretch over it.
            shares = [share if share > 1e-12 or not norm else math.nan for share in shares]
            (line,) = axes.plot(range(1, len(shares) + 1), shares, f".{style}", label=mode)
            if rank is not None and 0 < rank <= len(shares):
                axes.plot(rank, shares[rank - 1], "o", color=line.get_color(), fillstyle="none", markersize=10)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    _legend(figure, panels[0], "kept" if ranks else None)
    return figure


def plot_activations(
    layers: Mapping[str, nn.Module], edges: Sequence[tuple[int, int]], reference: torch.Tensor, inputs: torch.Tensor
) -> Figure:
    """φ_io(t) of chosen edges (i, o), a panel for each, for several states of one layer: before and after adaptation.

    >>> layers = {"base": base.layers[0], "adapted": model.get_submodule("base_model.model.layers.0")}
    >>> plot_activations(layers, [(0, 0), (1, 3)], reference=torch.zeros(2), inputs=torch.linspace(-1, 1, 200))

    Args:
        layers: layers by label. They are run, so any layer will do; see `activation_curves` for what is drawn.
        edges: pairs (input, output).
        reference: the point around which one input at a time varies, shape (n,).
        inputs: the values that this input takes, shape (points,).

    Raises:
        ImportError: without matplotlib.
        ValueError: as for `activation_curves`, or if there is nothing to draw.
    """
    figure, panels = _panels("plot_activations", "edges", edges)
    if not layers:
        raise ValueError("`layers` should have at least one layer by label, got none")
    curves = {
        label: activation_curves(layer, edges, reference, inputs).float().cpu() for label, layer in layers.items()
    }
    styles = ("-", "--", "-.", ":")
    for k, (axes, (i, o)) in enumerate(zip(panels, edges, strict=True)):
        for n, (label, curve) in enumerate(curves.items()):
            axes.plot(inputs.tolist(), curve[k].tolist(), styles[n % len(styles)], label=label)
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
