"""LoTRAModel: the PEFT tuner that wraps the KAN layers of a model in LoTRALayers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule
from peft.utils.other import _set_adapter
from torch import nn

from .call_arguments import in_context
from .calls.exclusion import calling
from .coefficients.target import Target
from .combination import combine_adapters, copy_trained
from .config.lotra_config import LoTRAConfig
from .files.adapter_file import PREFIX, check_weights, is_adapter_key, naming
from .files.collected import collected, remapped
from .files.foreign import refuse_foreign_saving
from .files.slots import slots_of
from .layers.biases import trained_biases
from .layers.linear import LinearLayer, is_linear
from .layers.lotra import LoTRALayer, adapted_tensors, freeze_base, wrapped
from .placement.offloaded import writable_tensors
from .preserved import restored_on_error
from .targets.adapter_names import check_name, check_replaced
from .targets.copies import warn_of_layouts
from .targets.resolve import HEADS, resolve_targets, warn_of_no_effect
from .targets.selection import is_excluded
from .tucker.decomposition import Ranks


class _Configs(dict):
    """LoTRAConfigs by adapter name. PEFT's functions look up names here, so an unknown name gets a clear error."""

    def __missing__(self, name: Any) -> Any:
        raise ValueError(f"`adapter_name` {name!r} does not exist: the model has the adapters {list(self)}")


class LoTRAModel(BaseTuner):
    """A model whose KAN layers compute with A + s · G ×₁ U1 ×₂ U2 ×₃ U3; `peft.get_peft_model` makes it.

    Like PEFT's other tuners, it adds, switches, disables, deletes, merges and unloads adapters. Errors in a config are
    raised before the first layer is touched.

    Three arguments of a call, `model(...)` or `model.generate(...)`, are for the adapters, and the base model does not
    see them. `adapter_names` names an adapter for each sample; "__base__" stands for no adapter. `lotra_task` sets the
    task of the active (or named) families; see `at_task`. Samples are on the first axis of each adapted layer's first
    tensor, or on the axis `batch_axis`.
    """

    prefix = "lotra_"
    tuner_layer_cls = LoTRALayer
    target_module_mapping: dict[str, list[str]] = {}
    peft_config: dict[str, Any]  # LoTRAConfigs, by name

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        held = getattr(model, "peft_config", {})
        before = dict(held)
        if isinstance(adapter_name, str) and adapter_name in held:
            check_replaced(model, peft_config, adapter_name, held[adapter_name])
        with warnings.catch_warnings():  # PEFT warns of every second adapter, even if it is wanted
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute", UserWarning)
            try:
                super().__init__(model, peft_config, adapter_name, *args, **kwargs)
            except BaseException:
                held.clear()  # PEFT writes the new config into the model's mapping first
                held.update(before)
                raise

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        if not isinstance(self.peft_config, _Configs):  # a model with an adapter injected has one already
            self.peft_config = _Configs(self.peft_config)
        refuse_foreign_saving(model)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> LoTRAConfig:
        # A copy becomes self-contained. The user's object stays as it is, and can be used for other models.
        adapter_name = next(name for name, config in self.peft_config.items() if config is peft_config)
        check_name(adapter_name, self.model)
        task = peft_config.task_type
        if task in HEADS:  # PEFT would add them to the user's object, after the copy is made
            peft_config = replace(peft_config, modules_to_save=[*(peft_config.modules_to_save or ()), *HEADS[task]])
        targets = resolve_targets(self.model, peft_config)
        warn_of_no_effect(peft_config, targets)
        warn_of_layouts(self.model, peft_config, targets)
        self._targets: dict[str, list[Target]] = {}
        for target in targets:
            self._targets.setdefault(target.module, []).append(target)
        self._self_contained = peft_config.self_contained(targets)
        self._holder = self._self_contained.saved_targets()[0][1].parameter  # has the codes of the family's tasks
        # PEFT warns of patterns that match nothing, so it gets the user's own patterns while it injects.
        parameters = {target.parameter for target in targets}
        own = {} if peft_config.is_self_contained else vars(peft_config)
        self.peft_config[adapter_name] = replace(
            self._self_contained,
            target_modules=None,  # PEFT would shorten its names, in time proportional to their number squared
            exclude_modules=peft_config.exclude_modules,
            **{
                field: {key: value for key, value in own.get(field, {}).items() if key not in parameters}
                for field in ("rank_pattern", "alpha_pattern")
            },
        )
        return self.peft_config[adapter_name]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter to `model`, with the arguments of PEFT's base class.

        After an exception, the model is as it was before, also if the adapter's file was the cause.
        """
        config = self.peft_config[adapter_name]
        disabled = any(layer.disable_adapters for layer in adapted_tensors(model).values())
        try:
            with naming(config._file), restored_on_error(self):
                super().inject_adapter(model, adapter_name, *args, **kwargs)
                if disabled:
                    self._enable_adapter_layers(False)  # of new layers, too
                held = slots_of(model, adapter_name, config.bias)
                slots = {f"{PREFIX}{key}": slot for key, (_, slot) in held.items()}
                if config._saved is not None:
                    check_weights(slots, config._saved.weights, config._saved.origin)
                if config.bias != "none" and not trained_biases(model, adapter_name, config.bias):
                    warnings.warn(f"`bias`={config.bias!r} has no effect: the model has no such bias", stacklevel=2)
                self._self_contained._saved = config._saved  # until PEFT loads it
                self._self_contained._copies = frozenset(key for key in slots if not is_adapter_key(key))
                self.peft_config[adapter_name] = self._self_contained
        except BaseException:
            self.peft_config.pop(adapter_name, None)
            raise

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # type: ignore[override]
        if is_excluded(peft_config, key):
            return _ExcludedModule()
        return key in self._targets

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if current_key not in self._targets:
            raise ValueError(
                f"the state dict has an adapter for {current_key}, which the config does not select: "
                "pass the config that was saved with it"
            )
        for tensor in self._targets[current_key]:
            layer = adapted_tensors(target).get(tensor.spec.parameter)
            is_new = layer is None
            if layer is None:
                kind = LinearLayer if is_linear(target, tensor.spec) else LoTRALayer
                layer, target = wrapped(kind, target, tensor.spec)
            layer.update_layer(
                adapter_name,
                tensor.ranks,
                alpha=tensor.alpha,
                init_weights=peft_config.init_weights,
                freeze_factors=peft_config.freeze_factors,
                terms=peft_config.terms,
                codes=peft_config.codes if tensor.parameter == self._holder else None,
                inference_mode=peft_config.inference_mode,
            )
            layer._allows_unread |= peft_config.allow_unread
            if is_new and adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
        self._replace_module(parent, target_name, target, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # The base class would look for a `weight`, to move the adapters to its device. KAN layers have none, and
        # `update_layer` has put the adapters on the device of the coefficients.
        setattr(parent, child_name, new_module)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters. Unless `inference_mode` is true, they and their biases become trainable.

        Raises:
            ValueError: if an adapter does not exist.
            RuntimeError: as `unmerge_adapter`, because PEFT unmerges all adapters first. Nothing is changed then.
        """
        for name in [adapter_name] if isinstance(adapter_name, str) else adapter_name:
            self.peft_config[name]  # raises if it does not exist
        self._check_unwritten()
        super().set_adapter(adapter_name, inference_mode)
        self._set_biases(not inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter. Its biases keep their values and are frozen. If none is left active, another will be."""
        biases = trained_biases(self.model, adapter_name, self.peft_config[adapter_name].bias)
        alone = self.active_adapters == [adapter_name]
        super().delete_adapter(adapter_name)
        if alone and self.peft_config:  # PEFT lets every layer choose among its own adapters
            self.active_adapter = self.active_adapters or sorted(self.peft_config)[:1]
            _set_adapter(self.model, self.active_adapter)
            for layer in adapted_tensors(self.model).values():
                layer.set_adapter(self.active_adapter)
        for bias in biases:
            bias.parameter.requires_grad_(False)

    def _set_biases(self, trained: bool) -> None:
        """Make the biases of active adapters trainable if `trained`, and freeze those of the other adapters."""
        for name in [name for name, config in self.peft_config.items() if config.bias != "none"]:
            for bias in trained_biases(self.model, name, self.peft_config[name].bias):
                bias.parameter.requires_grad_(trained and name in self.active_adapters)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        # The base class selects other biases, trains them even if an adapter is loaded for inference, and visits the
        # tensors of all adapters three times.
        freeze_base(model)
        self._set_biases(not any(self.peft_config[name].inference_mode for name in self.active_adapters))

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # Where the base class casts, it makes new, trainable parameters. Frozen adapters have to stay frozen.
        layers = adapted_tensors(self.model, adapter_name).values()
        trainable = [layer.lotra_core[adapter_name].requires_grad for layer in layers]
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer, requires_grad in zip(layers, trainable, strict=True):
            layer.set_requires_grad(adapter_name, requires_grad)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the coefficients and keep them. With `safe_merge`, all layers are checked first.

        Raises:
            TypeError, ValueError: if a name is wrong or, with `safe_merge`, if merged coefficients are not all finite.
            RuntimeError: if a family is at no task, or somebody has written to coefficients that are merged already.
                In each case nothing is changed.
        """
        self._check_merge(adapter_names, safe_merge)
        self._check_unwritten()
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def unmerge_adapter(self) -> None:
        """Unmerge all adapters. Raises RuntimeError before that if somebody has written to merged coefficients."""
        self._check_unwritten()
        super().unmerge_adapter()

    def disable_adapter_layers(self) -> None:
        """Disable all adapters. A layer's next pass unmerges it, so this raises RuntimeError as `unmerge_adapter`."""
        self._check_unwritten()
        super().disable_adapter_layers()

    def _check_unwritten(self) -> None:
        for layer in adapted_tensors(self.model).values():
            if layer.merged:
                with writable_tensors(layer):
                    layer._check_unwritten()

    def _unload_and_optionally_merge(  # type: ignore[override]
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        self._check_merge(adapter_names, merge and safe_merge, merge)
        self._set_biases(False)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)  # type: ignore

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool, merge: bool = True) -> None:
        """Raise before any layer is merged, so that a wrong name or a broken adapter leaves no model half merged."""
        if adapter_names is not None and not isinstance(adapter_names, list | tuple | set):
            raise TypeError(f"adapter_names should be a list of strings, got {adapter_names!r}.")  # PEFT's words
        for name in adapter_names or ():
            self.peft_config[name]  # raises if it does not exist
        for layer in adapted_tensors(self.model).values() if merge else ():
            layer._check_mergeable(layer.active_adapters if adapter_names is None else adapter_names)
        for layer in adapted_tensors(self.model).values() if safe_merge else ():
            names = layer.active_adapters if adapter_names is None else adapter_names
            names = [name for name in names if name in layer.lotra_core and name not in layer.merged_adapters]
            with writable_tensors(layer):
                layer._check_finite(names)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | Ranks | Mapping[str, int | Ranks] | None = None,
        *,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> dict[str, float]:
        """Add an adapter whose update of every coefficient tensor is Δ = Σ_j weights[j] · Δ_j, or nearly so.

        >>> model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "mean", "cat")
        >>> model.add_weighted_adapter(["a", "b"], [1.0, -1.0], "a without b", svd_rank=4)

        Args:
            adapters: the names of the adapters. If an adapter does not adapt a tensor, its Δ_j is zero there.
            weights: a number for each adapter, which may be negative. Each Δ_j includes its adapter's scaling.
            adapter_name: the new adapter's name. The new adapter is not active, and its `alpha` is 1.
            combination_type: "cat": exactly Δ. The ranks add up, to at most the size of the mode. "svd" or "linear":
                the Tucker approximation of Δ with the ranks `svd_rank`, by HOSVD and HOOI. "ties", "dare_linear",
                "dare_ties" and "magnitude_prune": the Tucker approximation of the result of these rules of
                `peft.utils.merge_utils` for the dense Δ_j. All types combine updates. Some of LoRA's types combine
                factors; LoRA's names that end in "_svd" combine updates, and mean the same here.
            svd_rank: ranks as in `LoTRAConfig.r`, or a mapping from full parameter names to ranks. By default, and for
                tensors that are not named, they are the largest ranks that the adapters have there.
            density: the fraction of entries in (0, 1] that pruning leaves, for the last four types only.
            majority_sign_method: "total" or "frequency", for "ties" and "dare_ties".

        If one of the adapters has trained copies of modules (`modules_to_save`) or token rows, the new adapter gets
        copies of them.

        Returns:
            ‖Δ − Δ_r‖ / ‖Δ‖ by full parameter name, where Δ is the result of the rule before its ranks are cut.

        Raises:
            ValueError: naming the argument. The model is then as it was before.
        """
        self.check_new(adapter_name)
        config, factors, errors = combine_adapters(
            self.model, self.peft_config, adapters, weights, combination_type, svd_rank, density, majority_sign_method
        )
        self.peft_config[adapter_name] = config
        self.inject_adapter(self.model, adapter_name)
        self._cast_adapter_dtype(adapter_name)  # as `add_adapter` does by default
        layers = adapted_tensors(self.model)
        for parameter, values in factors.items():
            layers[parameter].set_tucker(adapter_name, values)
        copy_trained(self.model, adapters, adapter_name)
        return errors

    def check_new(self, adapter_name: str) -> None:
        """Raise ValueError if there is an adapter of this name."""
        if adapter_name in self.peft_config:
            raise ValueError(
                f"`adapter_name` {adapter_name!r} exists already: choose another, or call `delete_adapter` first"
            )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """While this is entered, `adapter_names`, `lotra_task` and `batch_axis` reach every adapted layer."""
        with calling(self.model), in_context(self.model, self.peft_config, self.active_adapters, kwargs):
            yield

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        assert isinstance(config, LoTRAConfig)
        return collected(model, config, adapter_name, state_dict)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # Keys of other tensors contain no adapter's name, but may contain a module of the same name.
        return super()._remove_adapter_name_from_key(key, adapter_name) if is_adapter_key(key) else key

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        return remapped(model, config, adapter_name, state_dict)


def lotra_model(model: nn.Module, adapter_name: str | None = None) -> LoTRAModel:
    """The LoTRAModel of a PeftModel, compiled or not.

    Raises:
        TypeError: if `model` is not a PeftModel with LoTRA adapters.
        ValueError: if it has no adapter of the given name.
    """
    model = getattr(model, "_orig_mod", model)
    tuner = getattr(model, "base_model", None)
    if not isinstance(model, PeftModel) or not isinstance(tuner, LoTRAModel):
        raise TypeError(f"`model` should be a PeftModel with LoTRA adapters but a {type(model).__name__} is passed")
    if adapter_name is not None:
        tuner.peft_config[adapter_name]  # raises if it does not exist
    return tuner
