"""Measures what fine-tuning changed in a KAN: coefficients, updates, their spectra, and functions on edges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from ..coefficients.registry import Descriptions
from ..coefficients.target import Target
from ..config.lotra_config import LoTRAConfig
from ..layers.lotra import adapted_tensors
from ..preserved import check_model, first_tensor, preserved
from ..standin import adapted_coefficients
from ..targets.resolve import resolve_targets
from ..tucker.spectrum import Spectrum


def effective_coefficients(model: nn.Module, coefficients: Descriptions | None = None) -> dict[str, torch.Tensor]:
    """A = parameter · scale of every KAN layer of a model, shape (n, m, n_d, ...), by full parameter name.

    Args:
        model: a model without adapters.
        coefficients: the layouts of layers that are not registered, as in `LoTRAConfig(coefficients=...)`.

    Raises:
        ValueError: if the model has no KAN layer, or has adapters.
    """
    config = LoTRAConfig(r=1, coefficients=coefficients or {})
    return {target.parameter: coefficients_of(model, target) for target in plain_targets("model", model, config)}


def coefficient_updates(
    base: nn.Module, finetuned: nn.Module, coefficients: Descriptions | None = None
) -> dict[str, torch.Tensor]:
    """Δ = A_ft − A_pt, shape (n, m, n_d, ...), by full parameter name, in float64 on the CPU.

    Δ is meaningful only if both models have the same basis functions, so their grids must be the same. Other
    differences between the models, such as biases, are ignored.

    Raises:
        ValueError: if a model has no KAN layer or has adapters, or the two do not have the same layers.
    """
    config = LoTRAConfig(r=1, coefficients=coefficients or {})
    return {target.parameter: update for target, update in updates_between(base, finetuned, config)}


def update_spectrum(
    base: nn.Module, finetuned: nn.Module, coefficients: Descriptions | None = None
) -> dict[str, Spectrum]:
    """The singular values of the unfoldings of A_ft − A_pt, by parameter name. They help to choose ranks.

    >>> spectrum = update_spectrum(base, finetuned)["layers.0.coef"]
    >>> spectrum.energy_kept((4, 4, 3)), spectrum.truncation_error((4, 4, 3)), spectrum.tail_bound((4, 4, 3))

    The arguments and errors are those of `coefficient_updates`.
    """
    updates = coefficient_updates(base, finetuned, coefficients)
    return {name: Spectrum.of(update, f"the update of {name}") for name, update in updates.items()}


def updates_between(
    base: nn.Module, finetuned: nn.Module, config: LoTRAConfig
) -> Iterator[tuple[Target, torch.Tensor]]:
    """Every target of `config` in `base`, with A_ft − A_pt, shape (n, m, n_d, ...), in float64 on the CPU."""
    targets = plain_targets("base", base, config)
    found = {(target.module, target.spec) for target in plain_targets("finetuned", finetuned, config)}
    if differing := found ^ {(target.module, target.spec) for target in targets}:
        names = sorted({f"{module}.{spec.parameter}" for module, spec in differing})
        raise ValueError(
            f"`base` and `finetuned` differ in the layout or shape of {names}: is `finetuned` trained from `base`?"
        )
    for target in targets:
        before, after = (coefficients_of(model, target).to("cpu", torch.float64) for model in (base, finetuned))
        yield target, after - before


def plain_targets(name: str, model: nn.Module, config: LoTRAConfig) -> list[Target]:
    """The targets of `config` in a model that must have no adapters."""
    check_model(**{name: model})
    if adapted_tensors(model):
        raise ValueError(f"`{name}` has LoTRA adapters: pass a plain model, such as `merge_and_unload()` returns")
    return resolve_targets(model, config)


def coefficients_of(model: nn.Module, target: Target) -> torch.Tensor:
    """A copy of the A of one target, shape (n, m, n_d, ...)."""
    stored = adapted_coefficients(model.get_submodule(target.module), target.spec, ()).detach()
    return target.spec.to_canonical(stored).clone()


@torch.no_grad()
def activation_curves(
    layer: nn.Module, edges: Sequence[tuple[int, int]], reference: torch.Tensor, inputs: torch.Tensor
) -> torch.Tensor:
    """φ_io(t) = y_o(x with x_i = t) − y_o(x) at the reference x, measured by running the layer.

    For a KAN layer y_o = Σ_i φ_io(x_i), this is the edge's function up to a constant, for any values of the other
    inputs. The outputs do not determine the constant. If the layer mixes its inputs first (fast-kan's LayerNorm), the
    curve depends on the other inputs of x.

    Args:
        layer: any module from (batch, n) to (batch, m). If it returns several outputs, the first is used.
        edges: pairs (input, output).
        reference: x, shape (n,). Its dtype and device are used.
        inputs: the values t, shape (points,).

    Returns:
        The curves, shape (edges, points).

    Raises:
        ValueError: if the layer's output is not (batch, m), or an edge is not in the layer.
    """
    rows = reference.repeat(len(inputs), 1)

    def run(x: torch.Tensor) -> torch.Tensor:
        y = first_tensor(layer(x))
        if y.dim() != 2 or len(y) != len(x):
            raise ValueError(f"`layer` should map {tuple(x.shape)} to (batch, m), got the shape {tuple(y.shape)}")
        return y

    with preserved(layer, training=False):
        origin = run(reference[None])[0]
        outside = [edge for edge in edges if not (0 <= edge[0] < len(reference) and 0 <= edge[1] < len(origin))]
        if outside:
            raise ValueError(f"`edges` has {outside}; the layer has {len(reference)} inputs and {len(origin)} outputs")
        curves = []
        for i, o in edges:
            x = rows.clone()
            x[:, i] = inputs.to(x)
            curves.append(run(x)[:, o] - origin[o])
    return torch.stack(curves)
