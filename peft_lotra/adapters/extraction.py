"""Turns a full fine-tune into an adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ..analysis.updates import updates_between
from ..coefficients.spec import tensor_at
from ..coefficients.target import Target
from ..combination import update_of
from ..config.lotra_config import LoTRAConfig
from ..layers.biases import trained_biases
from ..layers.lotra import adapted_tensors
from ..model import LoTRAModel
from ..preserved import first_tensor
from ..training.gauss_newton import fit_gauss_newton
from ..tucker.decomposition import Tucker, decompose
from ..tucker.ranks import mode_sizes


def extract_adapter(
    base: nn.Module,
    finetuned: nn.Module,
    config: LoTRAConfig,
    *,
    inputs: torch.Tensor | Callable[[int], torch.Tensor] | None = None,
    iterations: int = 20,
    progressbar: bool = True,
) -> tuple[PeftModel, dict[str, float]]:
    """min ‖(A_ft − A_pt) − alpha · G ×₁ U1 ×₂ U2 ×₃ U3‖ for every layer: truncated HOSVD improved by HOOI.

    >>> ranks = suggest_ranks(update_spectrum(base, finetuned), budget=1000)
    >>> model, errors = extract_adapter(base, finetuned, LoTRAConfig(rank_pattern=ranks), inputs=x)
    >>> model.save_pretrained("adapter")

    The nearest update of low rank does not give the nearest function. At the energy 0.99, a tenth of the update's norm
    is left out. If fine-tuning has divided the error by far more than ten, as with PDEs, this tenth is most of the
    gain. With `inputs`, the adapter is therefore fitted to the outputs of `finetuned`, starting from the nearest
    update: min Σ_x ‖model(x) − finetuned(x)‖², by `fit_gauss_newton`.

    Args:
        base: the model before fine-tuning. It is wrapped and frozen, as `get_peft_model` does.
        finetuned: the same model after fine-tuning. It is not changed.
        config: which layers are adapted, with which ranks. `modules_to_save` and biases are copied from `finetuned`.
        inputs: points x that the models take, shape (N, ...), or a function from the number of the iteration to such
            points. With None there is no fit. Each output should depend on its own x alone. If a model returns several
            values, as transformers' models do, the first tensor is its output. If fixed points give fewer than 2
            outputs for each number of the adapter, the fit learns them by heart, and a UserWarning says so.
        iterations: the most iterations of the fit.
        progressbar: whether the fit shows its progress.

    Returns:
        The base with the adapter, and ‖Δ − Δ_r‖ / ‖Δ‖ by full parameter name (0 where Δ = 0).

    Raises:
        ValueError: if the models do not have the same layers, the update is not finite, a rank or alpha does not fit,
            or the models differ in something that the adapter cannot hold. `base` is then as it was before.
    """
    if config.family is not None:
        raise ValueError(f"`config` has `family` {config.family!r}: extract one for each task, then use `family_from`")
    updates = dict(updates_between(base, finetuned, config))
    for target, update in updates.items():
        if not torch.isfinite(update).all():
            raise ValueError(f"the update of {target.parameter} has NaN or infinity: did fine-tuning diverge?")
        if target.alpha == 0 and update.any():
            raise ValueError(f"`alpha` is 0 for {target.parameter}: an adapter of this scaling holds no update")
    biases = trained_biases(base, "", config.bias, {target.module for target in updates})
    _check_the_rest(base, finetuned, list(updates), {bias.plain for bias in biases}, config.modules_to_save or ())
    factors = {
        target.parameter: decompose(update.reshape(mode_sizes(update.shape)), target.ranks)
        for target, update in updates.items()
    }
    names = {module: name for name, module in base.named_modules()}
    model = get_peft_model(base, config)
    fill(model, model.active_adapter, factors)
    for bias in biases:
        bias.parameter.data.copy_(tensor_at(finetuned, bias.plain))
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            saved = finetuned.get_submodule(names[module.original_module])
            module.modules_to_save[model.active_adapter].load_state_dict(saved.state_dict())
    if inputs is not None:
        _fit(model, finetuned, inputs, iterations, progressbar)
    layers, errors = adapted_tensors(model), {}
    for target, update in updates.items():
        name = target.parameter
        extracted = update_of(layers[name], model.active_adapter, name).dense().reshape(update.shape)
        errors[name] = ((extracted - update).norm() / update.norm()).nan_to_num().item()
    return model, errors


def _fit(model: PeftModel, finetuned: nn.Module, inputs: Any, iterations: int, progressbar: bool) -> None:
    """Fit the adapter, but not `modules_to_save` or biases, to the outputs of `finetuned`."""

    def residual(net: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        difference = first_tensor(net(x)) - first_tensor(finetuned(x))
        return difference.reshape(len(difference), -1)

    others = [p for name, p in model.named_parameters() if p.requires_grad and LoTRAModel.prefix not in name]
    try:
        for p in others:
            p.requires_grad_(False)
        fit_gauss_newton(model, residual, inputs, iterations=iterations, progressbar=progressbar)
    finally:
        for p in others:
            p.requires_grad_(True)


def fill(model: nn.Module, adapter: str, factors: Mapping[str, Tucker]) -> None:
    """Set an adapter's update of each named tensor to G ×₁ U1 ×₂ U2 ×₃ U3. Its core is G / scaling."""
    layers = adapted_tensors(model)
    for parameter, update in factors.items():
        core, scaling = update.core, layers[parameter].scaling[adapter]
        layers[parameter].set_tucker(adapter, update._replace(core=core / scaling if core.any() else core))


def _check_the_rest(
    base: nn.Module, finetuned: nn.Module, targets: list[Target], biases: set[str], endings: Sequence[str]
) -> None:
    """Raise if the models differ in a tensor other than coefficients, `biases` and modules with one of the endings."""
    before, after = base.state_dict(), finetuned.state_dict()
    specs = {target.parameter: target.spec for target in targets}
    held = {f"{target.module}.{target.spec.scale}" for target in targets} | biases
    copied = tuple(f"{name}." for name, _ in base.named_modules() if name.endswith(tuple(endings)))  # as for PEFT

    def differs(key: str) -> bool:
        if key not in before or key not in after or before[key].shape != after[key].shape:
            return True
        differing = before[key] != after[key].to(before[key].device)
        if key in specs:
            specs[key].part(differing).zero_()
        return bool(differing.any())

    if further := [key for key in sorted({*before, *after} - held) if not key.startswith(copied) and differs(key)]:
        raise ValueError(
            f"`base` and `finetuned` differ also in {further}, which an adapter of the coefficients does not hold: "
            'use `target_modules="all-linear"`, `bias` or `modules_to_save`, or copy these tensors from `base`'
        )
