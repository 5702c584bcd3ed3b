"""Data-driven initialisation: factors aligned with the first gradient on the new task."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import torch
from torch import nn
from tqdm import tqdm

from ..layers.lotra import LoTRALayer, adapted_tensors
from ..placement.sharded import check_not_sharded
from ..preserved import check_model, preserved, preserved_random_state
from ..standin import adapted_coefficients, replaced
from ..tucker.decomposition import MODES
from .checks import check_callable
from .processes import Processes

METHODS = {"gradient": "o", "gradient_hosvd": MODES}  # the modes whose factors are set


def initialize_lotra_weights(
    model: nn.Module,
    train_step: Callable[[], object],
    adapter_name: str = "default",
    method: str = "gradient",
    progressbar: bool = True,
) -> None:
    """U2 ← the r2 leading left singular vectors of the mode-o unfolding of ∂L/∂A; with G = 0, the model is unchanged.

    >>> initialize_lotra_weights(model, lambda: mse_loss(model(x), y).backward())

    ∂L/∂A is the gradient in the model as it is, with its other active adapters, for every layer that has the adapter.
    Only the factors of this adapter are written. Everything else in the model (parameters, buffers, `.grad`, modes,
    random state) is afterwards as it was before, also if `train_step` raises. Each layer's gradient leaves the
    accelerator as soon as it is complete. The host needs memory for one copy of the coefficients.

    Call this before the model is wrapped for distributed training. Each process then runs `train_step` on its own
    data, and the gradients are averaged. Afterwards all factors are the same in all processes, to the bit. Factors
    that the gradient does not set are those of the first process, whatever the random seeds were.

    Args:
        model: an adapted model, from `get_peft_model`.
        train_step: a function without arguments that computes losses on the new task and calls `backward()` on each.
            Gradients add up. The function must not make an optimizer step.
        adapter_name: an adapter that has not been trained (G = 0).
        method: "gradient" sets U2. "gradient_hosvd" sets every factor, each from the unfolding along its mode.
        progressbar: whether to show the progress of the decompositions.

    If an unfolding has fewer singular vectors than the rank, the other columns are random and orthonormal to them.

    Raises:
        TypeError: if `model` is not a torch.nn.Module, or `train_step` is not a function without arguments.
        ValueError: if there is no such adapter or method; if there is no gradient, as where `train_step` returns a
            loss instead of calling `backward()`, or it is zero or not finite; or if the adapter has been trained or
            merged already. No factor is changed then.
        RuntimeError: in the other processes, if `train_step` raises in one.

    Source: eq. 8, for r2 > 1 and several samples; "gradient_hosvd" is ours.
    """
    check_model(model=model)
    if method not in METHODS:
        raise ValueError(f"`method` should be one of {list(METHODS)}, got {method!r}")
    wanted = "a function without arguments, such as `lambda: loss_of(model, batch).backward()`"
    check_callable("train_step", train_step, wanted)
    layers = _layers(model, adapter_name)
    processes = Processes(True)
    gradients = processes.agreed(_gradients, model, layers, adapter_name, train_step)
    new: dict[torch.Tensor, torch.Tensor] = {}
    with preserved_random_state(model):
        for name, layer in tqdm(layers.items(), desc="initialize LoTRA", disable=not progressbar):
            gradient = _averaged(name, gradients.pop(name), layer, processes)
            tucker = layer.tucker(adapter_name)
            new |= {factor: factor.detach().clone() for factor in tucker.tensors()}
            for mode, factor in tucker.factors.items():  # those of modes that are not whole
                if mode in METHODS[method]:
                    unfolded = gradient.flatten(3) if mode == "k" else gradient
                    vectors = _leading_vectors(unfolded.movedim(MODES.index(mode), 0).flatten(1), factor.shape[1])
                    new[factor] = vectors.to(factor).contiguous()
            for factor in tucker.tensors():
                processes.of_first(new[factor])
    for factor, vectors in new.items():
        factor.data.copy_(vectors)


def _layers(model: nn.Module, adapter_name: str) -> dict[str, LoTRALayer]:
    layers = adapted_tensors(model, adapter_name)
    if not layers:
        adapters = sorted({key for layer in adapted_tensors(model).values() for key in layer.lotra_core})
        raise ValueError(f"`adapter_name` {adapter_name!r} is not one of the model's LoTRA adapters, {adapters}")
    for name, layer in layers.items():
        instead = "initialise the adapter before the model is sharded; all processes then have the same factors"
        check_not_sharded(layer, f"the layer {name}", instead)
        if layer.lotra_core[adapter_name].any():
            raise ValueError(
                f"the adapter {adapter_name!r} has a core that is not zero at {name}: it has been trained, or was "
                "made with `init_weights=False`; add a new adapter and initialise that one"
            )
        if layer.merged:
            raise ValueError(f"{name} has merged adapters: call `unmerge_adapter()` first")
    return layers


def _gradients(
    model: nn.Module, layers: dict[str, LoTRALayer], adapter_name: str, train_step: Callable[[], object]
) -> dict[str, torch.Tensor | None]:
    """∂L/∂A by layer, shape (n, m, n_d, ...), from one call of `train_step`; None for a layer without a gradient."""
    gradients: dict[str, torch.Tensor | None] = dict.fromkeys(layers)

    def collect(name: str, layer: LoTRALayer, coefficients: torch.Tensor) -> None:
        assert coefficients.grad is not None  # it has just been accumulated
        gradient = layer.spec.to_canonical(coefficients.grad.detach())
        gradient = gradient.to("cpu", torch.promote_types(gradient.dtype, torch.float32), copy=True)
        coefficients.grad, before = None, gradients[name]
        gradients[name] = gradient if before is None else before + gradient

    with ExitStack() as stack:
        stack.enter_context(preserved(model))
        for name, layer in layers.items():
            base = layer.get_base_layer()
            coefficients = adapted_coefficients(base, layer.spec, layer._active_updates(besides=adapter_name))
            coefficients = coefficients.detach().requires_grad_()
            coefficients.register_post_accumulate_grad_hook(partial(collect, name, layer))
            stack.enter_context(replaced(base, layer.spec, coefficients))
            stack.callback(setattr, layer, "_disable_adapters", layer.disable_adapters)
            layer._disable_adapters = True  # `coefficients` have the active updates already
        with torch.enable_grad():
            train_step()
    return gradients


def _averaged(name: str, gradient: torch.Tensor | None, layer: LoTRALayer, processes: Processes) -> torch.Tensor:
    """The mean over all processes, on the layer's device, or ValueError if it is zero or not finite."""
    if gradient is None:  # other processes wait for this one in the sum
        gradient = torch.zeros(layer.spec.layout.canonical_shape)
    device = next(iter(layer.lotra_core.values())).device
    gradient = processes.sum(gradient.to(device)).div_(processes.count)
    if not gradient.isfinite().all():
        raise ValueError(f"the gradient by the coefficients of {name} is not finite: check `train_step`'s losses")
    if not gradient.any():
        raise ValueError(
            f"`train_step` gave no gradient by the coefficients of {name}: it should call `backward()`, not return, "
            "a loss that depends on this layer (leave the layer out with `exclude_modules` if it is not meant to)"
        )
    return gradient


def _leading_vectors(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """The left singular vectors of the largest `rank` singular values, completed to orthonormal columns.

    Subspace iteration takes a few products of the matrix with `rank` + 8 vectors. A full decomposition would cost
    more than many training steps.
    """
    width = min(rank + 8, *matrix.shape)
    vectors, values, _ = torch.svd_lowrank(matrix, q=width, niter=8)
    known = min(rank, int((values > 1e-5 * values[0]).sum()))  # the rest is rounding
    vectors = vectors[:, :known]
    if known == rank:
        return vectors
    others = torch.randn(len(matrix), rank - known, dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.qr(torch.cat([vectors, others], dim=1)).Q
