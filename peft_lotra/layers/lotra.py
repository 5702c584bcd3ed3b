"""LoTRALayer: the Tucker adapters of one coefficient tensor."""

from __future__ import annotations

import math
import warnings
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ..calls.context import Shares, now
from ..calls.samples import may_pass_again, run
from ..coefficients.spec import CoefficientSpec, owner_of, shape_at
from ..placement.draws import check_one_draw, row_sums
from ..placement.offloaded import tensors_in_place, writable_tensors
from ..placement.sharded import full_tensor, write
from ..standin import Adapted, Update, adapted_rows, dense_update, forget, run_densely, warn
from ..tucker.decomposition import CODES, CONTAINERS, Ranks, tucker_shapes
from ..tucker.ranks import by_mode, mode_sizes
from .forwarding import Forwarding
from .held import Held
from .mixed import updates_by_sample


class LoTRALayer(Forwarding, Held):
    """A_ft = A + Σ_adapters s · G ×₁ U1 ×₂ U2 ×₃ U3 ×₄ U4 for one coefficient tensor A of the wrapped KAN layer.

    G: (r1, r2, r3, ...), U1: (n, r1), U2: (m, r2), U3: (n_d, r3), kept by adapter name in `lotra_core`, `lotra_U1`,
    `lotra_U2`, `lotra_U3`. With U4: (K, r4) in `lotra_U4`, the K groups and kernel positions are one mode, and G is
    (r1, r2, r3, r4). A mode whose rank is None is whole: it has no U. A module with several coefficient tensors is
    wrapped once for each.

    Unknown public attributes are looked up on the base layer, so that code around the layer keeps working. `forward`
    and the layer's methods see the adapted coefficients, and so does code that reads the parameter by its name, such
    as a regulariser. Methods that rewrite coefficients raise an error while the adapter is attached.
    """

    _has_company = False  # whether other processes may have parts of this layer

    def __init__(self, base_layer: nn.Module, spec: CoefficientSpec) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.spec = spec
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.r: dict[str, Ranks] = {}
        self.alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}  # alpha, unless it was rescaled
        self.terms: dict[str, int] = {}  # P of a family of tasks; else 0
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}  # PEFT reads this attribute
        self.in_features, self.out_features = spec.layout.canonical_shape[:2]
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True
        self._before_merge: dict[str, torch.Tensor] = {}  # the values of parameter and scale, by path
        self._merged_sums: list[int] = []  # checksums of the merged values
        self._drawn: dict[str, tuple[torch.Tensor, ...]] = {}  # checksums by adapter, until `check_one_draw`
        # Attributes that frameworks add later stay on the module to which they are added.
        names = {name for name in dir(self.get_base_layer()) if not name.startswith("_")}
        self._names_of_base = frozenset(names.difference(vars(self), self._modules, dir(nn.Module)))
        self._had_names = False  # whether a pass had `adapter_names`
        self._allows_unread = False  # whether the base layer need not use its coefficients in every pass
        self._needs_tensor = bool(spec.layout.flattened)  # whether the layer's coefficients have to be a plain tensor

    def update_layer(
        self,
        adapter_name: str,
        ranks: Ranks,
        alpha: float = 1.0,
        init_weights: bool = True,
        inference_mode: bool = False,
        freeze_factors: bool = False,
        terms: int = 0,
        codes: tuple[int, int] | None = None,
    ) -> None:
        """Add an adapter; `terms` is P of a family, else 0, and `codes` the shape of its codes, if they are kept here.

        Raises:
            ValueError: if a rank is not between 1 and the size of its mode. Nothing is added then.
        """
        modes = mode_sizes(self.spec.layout.canonical_shape)
        if any(rank is not None and not 0 < rank <= size for rank, size in zip(ranks, modes, strict=False)):
            raise ValueError(
                f"`r` should be three positive integer values up to the modes {modes[:3]} of {self.spec.parameter}, "
                f"or None for whole modes, but the value passed is {ranks}"
            )
        self.r[adapter_name] = by_mode(ranks)
        self.alpha[adapter_name] = self.scaling[adapter_name] = alpha
        if freeze_factors:
            self.frozen_peft_weight_names[adapter_name] = CONTAINERS[1:]
        coefficients = self._stored(self.spec.parameter)
        self.terms[adapter_name] = terms
        shapes = tucker_shapes(self.spec.layout.canonical_shape, ranks, terms)
        dtype = torch.float32 if coefficients.dtype.itemsize == 1 else coefficients.dtype
        for name, shape in (shapes | ({} if codes is None else {CODES: codes})).items():
            # The adapter gets memory even if the base has none yet, or is offloaded.
            device = None if coefficients.is_meta else coefficients.device
            container = getattr(self, name)
            if hasattr(container, "_hf_hook"):  # accelerate has offloaded the earlier adapters
                remove_hook_from_module(container)
            container[adapter_name] = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
        self.reset_lotra_parameters(adapter_name, init_weights)
        if sums := row_sums(self.tucker(adapter_name).tensors()):
            self._drawn[adapter_name] = sums
            self._has_company = True
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def reset_lotra_parameters(self, adapter_name: str, init_weights: bool = True) -> None:
        """G = 0 (normal if `init_weights` is False), U1 ~ N(0, 1/n), U2 ~ N(0, 1/m), U3 ~ N(0, 1/n_d), U4 ~ N(0, 1/K).

        With G = 0 the update is zero, and every factor has a gradient after one step. Source: eq. 8, with a random U2.
        Frozen factors have orthonormal columns (ours).
        """
        core, factors = self.tucker(adapter_name)
        if adapter_name in self.lotra_codes:
            nn.init.normal_(self.lotra_codes[adapter_name])
        if init_weights:
            nn.init.zeros_(core)
        else:
            nn.init.normal_(core)
        for factor in factors.values():
            if adapter_name in self.frozen_peft_weight_names:
                with torch.no_grad():
                    Q = torch.linalg.qr(torch.randn(factor.shape, dtype=torch.float64)).Q
                    factor.copy_(Q)
            else:
                nn.init.normal_(factor, std=1 / math.sqrt(factor.shape[0]))

    def dtype_in_use(self, adapter_name: str) -> torch.dtype:
        """The dtype of the factors or of the coefficients, whichever has the smaller range."""
        tensors = self.lotra_core[adapter_name], self._stored(self.spec.parameter)
        return min([t.dtype for t in tensors if t.dtype.itemsize > 1], key=lambda dtype: torch.finfo(dtype).max)

    def _update(self, adapter_name: str) -> Update:
        factors = self.tucker(adapter_name)
        if "k" in factors.factors:  # for contractions, this factor is a part of the core
            factors = factors.map(full_tensor).with_positions(self.spec.layout.canonical_shape[3:])
        if not self.terms[adapter_name]:
            return Update(factors, self.scaling[adapter_name])
        context = now()
        task = context.task(adapter_name, self)
        if task is None and not context.known:
            raise RuntimeError(
                f"a backward pass repeats a pass of the family {adapter_name!r}, whose task is not known there: "
                "checkpoint with `use_reentrant=False` (and torch 2.8 or newer), or checkpoint a function that enters "
                "`at_task` itself"
            )
        if task is None:
            raise RuntimeError(
                f"the adapter {adapter_name!r} is for a family of tasks, and this pass is at none of them: call the "
                "model inside `with at_task(model, ...)`, or make an adapter for one task by `adapter_at`"
            )
        core, c = full_tensor(factors.core), task[0]
        if c.dim() == 1:
            return Update(factors._replace(core=core).at(c), self.scaling[adapter_name])
        core = core.squeeze(-1) if c.shape[1] == 1 else core
        return Update(factors._replace(core=core), self.scaling[adapter_name], c.to(core))

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """s · G ×₁ U1 ×₂ U2 ×₃ U3 in the layout of the parameter."""
        shape = shape_at(self.get_base_layer(), self.spec.parameter)
        return dense_update(self.spec, self._update(adapter_name), shape)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """parameter ← parameter · scale + Σ updates, scale ← 1, for the given adapters, or the active ones if None.

        The values from before are kept until `unmerge`, which restores them to the bit.

        Raises:
            ValueError: with `safe_merge`, if the merged coefficients are not all finite. Nothing is changed then.
            RuntimeError: as in `unmerge`.
        """
        self._merge(safe_merge, adapter_names, keep=True)

    @torch.no_grad()
    def _merge(self, safe_merge: bool, adapter_names: list[str] | None, keep: bool) -> None:
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lotra_core]
        if not names:
            return
        with self._writing():
            if safe_merge:
                self._check_finite(names)
            if keep and self.merged:
                self._check_unwritten()
            elif keep:
                self._before_merge = {path: self._stored(path).data.clone() for path in self._paths}
            for path, rows, values in adapted_rows(self.get_base_layer(), self.spec, tuple(map(self._update, names))):
                write(self._stored(path), values, rows)
            if self.spec.scale is not None:
                self._stored(self.spec.scale).data.fill_(1)
            self._merged_sums = self._sums() if keep else []
        self.merged_adapters += names

    @torch.no_grad()
    def _check_finite(self, adapter_names: list[str]) -> None:
        """Raise ValueError if A + Σ updates is not all finite."""
        merged = adapted_rows(self.get_base_layer(), self.spec, tuple(map(self._update, adapter_names)))
        if not all(torch.isfinite(values).all() for *_, values in merged):
            broken = [name for name in adapter_names if not torch.isfinite(self.get_delta_weight(name)).all()]
            names = ", ".join(broken or adapter_names)
            raise ValueError(f"NaNs detected in the merged weights. The adapter {names} seems to be broken")

    def unmerge(self) -> None:
        """Restore parameter and scale as they were before the first `merge`, to the bit.

        Raises:
            RuntimeError: if somebody has written to them since the last `merge`, which would be lost.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        with self._writing():
            self._check_unwritten()
            for path, before in self._before_merge.items():
                write(self._stored(path), before)
        self._before_merge, self._merged_sums = {}, []
        self.merged_adapters.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer; if `merge`, with all nested adapters merged into it."""
        layer: nn.Module = self
        while isinstance(layer, LoTRALayer):
            if merge:
                layer._merge(safe_merge, adapter_names, keep=False)
            forget(layer.get_base_layer(), layer.spec)
            layer = layer.base_layer
        return layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base layer's own forward with A_ft in place of A. Every sample may have an A_ft of its own.

        Raises:
            ValueError, RuntimeError: if the context of the call does not fit; see `peft_lotra.calls.samples.run`.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self._drawn and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            check_one_draw(self, CONTAINERS, self._active_here())
        context = now()
        if self.disable_adapters or (context.known and not context.entries):
            if not (self._has_company and may_pass_again(self)):
                return self._run_once(args, kwargs)
        return run(self, LoTRALayer, context, args, kwargs)

    def _run_once(self, args: Any, kwargs: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling() or self._needs_tensor or self._is_quantized:
            return self._run_eagerly(args, kwargs)
        updates = self._active_updates()
        with Adapted(self.get_base_layer(), self.spec, updates) as call:
            y = self.base_layer(*args, **kwargs)
        if updates and not call.acted:
            self._check_unread()
        return y

    # After a graph break at this layer, torch.compile must not compile parts of its pass.
    @torch.compiler.disable
    def _run_eagerly(self, args: Any, kwargs: Any) -> Any:
        inner: Any = self._modules["base_layer"]
        spec, layer = self.spec, self.get_base_layer() if isinstance(inner, BaseTunerLayer) else inner
        with tensors_in_place(self):
            updates = self._active_updates()
            in_function = False
            if not (updates and self._needs_tensor):
                adapted = Adapted(layer, spec, updates)
                try:
                    with adapted:
                        y = inner(*args, **kwargs)
                    if updates and not adapted.acted:
                        self._check_unread()
                    return y
                except RuntimeError:  # TorchScript makes one of every error
                    if adapted.refusal is None:
                        raise
                    in_function = adapted.refusal.in_function
            if spec.layout.flattened:
                warn("", type(layer).__qualname__, f"keeps its coefficients as {spec.layout.pattern!r}, across axes")
            y = run_densely(layer, spec, updates, partial(inner, *args, **kwargs), in_function)
            if not self._needs_tensor:
                self._needs_tensor = True
                warn("TorchScript, torch.autograd.Function or torch.vmap", type(layer).__qualname__)
            return y

    def _check_unread(self) -> None:
        """Raise RuntimeError, after a pass that computed nothing from the coefficients, unless this is allowed."""
        if not self._allows_unread:
            raise RuntimeError(
                f"a forward pass of {type(self.get_base_layer()).__qualname__} did not use `{self.spec.parameter}`, "
                "so its adapter had no effect: the layer uses another tensor, does not read this one as an attribute, "
                "keeps a copy, or uses it after the pass. `verify_coefficients(model, *sample)` says if it is the "
                "right tensor; `LoTRAConfig(allow_unread=True)` is for layers that do not use it in every pass"
            )

    def _active_updates(self, besides: str | None = None) -> tuple[Update, ...]:
        """The updates to add to what the base layer holds, without that of the adapter `besides`."""
        if self.disable_adapters:
            return ()
        context = now()
        shares = context.batch(self) if context.entries else None
        by_sample = isinstance(shares, Shares)
        names: Any = self.active_adapters
        if isinstance(shares, Shares) and shares.rows is not None:
            names = shares.rows
        own, merged = self._modules["lotra_core"]._parameters, self.merged_adapters  # type: ignore[union-attr]
        found: list[Any] = []
        for name in names:  # a comprehension would be one more call in every pass
            if name in own and name not in merged and name != besides:
                found.append(name if by_sample else self._update(name))
        return updates_by_sample(self, found, shares) if isinstance(shares, Shares) else tuple(found)

    def _writing(self) -> AbstractContextManager[None]:
        """While this is entered, parameter and scale are in place, and values written to them are kept."""
        return writable_tensors(self, [owner_of(self.get_base_layer(), path)[0] for path in self._paths])

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # The base class would look for a `weight`, round fp32 factors to the base's 16 bits and make them trainable.
        # If the base is not loaded yet, factors on the CPU stay there.
        device = device or self._stored(self.spec.parameter).device
        for factor in self.tucker(adapter_name).tensors():
            if not factor.is_meta and device != torch.device("meta"):
                factor.data = factor.data.to(device)

    def __repr__(self) -> str:
        return f"lotra.{super().__repr__()}"


# Older versions of dynamo cannot trace the stand-in. With them, these layers run between compiled graphs.
if torch.__version__ < (2, 13):  # type: ignore[operator]
    LoTRALayer.forward = torch.compiler.disable(LoTRALayer.forward)  # type: ignore[method-assign]


def wrapped(kind: type[LoTRALayer], module: nn.Module, spec: CoefficientSpec) -> tuple[LoTRALayer, nn.Module]:
    """A new layer for one tensor, at its place among the LoTRALayers around the module, and the outermost of these."""
    if isinstance(module, LoTRALayer) and module.spec.nesting > spec.nesting:
        layer, module.base_layer = wrapped(kind, module.base_layer, spec)
        return layer, module
    layer = kind(module, spec)
    return layer, layer


def adapted_tensors(model: nn.Module, adapter: str | None = None) -> dict[str, LoTRALayer]:
    """The LoTRALayer of every adapted coefficient tensor, by the tensor's full name in the model without adapters.

    A module with several tensors has nested LoTRALayers: the outer one comes first.

    Args:
        model: any module. For a PeftModel, the names are those in its base model.
        adapter: if given, only layers that have this adapter.
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoTRALayer) and (adapter is None or adapter in module.lotra_core):
            path = f"{name}.{module.spec.parameter}".replace("base_layer.", "").removeprefix("base_model.model.")
            found[path.removeprefix(".")] = module
    return found


def freeze_base(model: nn.Module) -> None:
    """Freeze all parameters but those of adapters, trained copies and token rows, whose flags stay as they are."""
    others: set[nn.Module] = set()
    for module in model.modules():  # the outer ones come first
        if isinstance(module, AuxiliaryTrainingWrapper):
            others.update(module.modules())
        elif isinstance(module, LoTRALayer):
            others.update(module.containers())
            module._freeze_non_trainable_peft_weights()
        for _, parameter in () if module in others else module.named_parameters(recurse=False):
            parameter.requires_grad = False
