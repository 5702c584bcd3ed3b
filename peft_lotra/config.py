"""LoTRAConfig: plain data, checked as far as this goes without a model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from numbers import Real
from typing import Any

from peft.config import PeftConfig
from peft.utils.other import get_pattern_key

from .checkpoint import CONTAINERS, check_saved_weights
from .coefficients import CoefficientSpec, Layout
from .coefficients.spec import check_descriptions
from .registration import LOTRA
from .tensors.ranks import Ranks, as_triple
from .tensors.tucker import factor_shapes


@dataclass(frozen=True)
class Target:
    """One coefficient tensor to adapt."""

    module: str  # name of the KAN layer
    spec: CoefficientSpec
    ranks: Ranks = (1, 1, 1)
    alpha: float = 1.0

    @property
    def parameter(self) -> str:
        """Full name of the coefficient parameter in the base model."""
        return f"{self.module}.{self.spec.parameter}"


@dataclass
class LoTRAConfig(PeftConfig):
    """A_ft = A_pt + alpha · G ×₁ U1 ×₂ U2 ×₃ U3 for every KAN coefficient tensor that the fields select.

    On injection the model's own copy of the config becomes self-contained: `target_modules`, `coefficients` and
    `rank_pattern` then name every adapted layer, so that a saved adapter loads without the registrations of the
    machine that made it. The object passed in is not changed and can be used again.

    Args:
        r: Tucker ranks (input, output, basis), or one number for all three. Upper bounds: in each layer they are
            clipped to the sizes of the modes.
        compression_ratio: instead of `r`, a budget c in (0, 1] over all adapted layers together: adapter parameters
            ≤ c · (number of coefficients). The largest `r` that fits is taken, and r + 1 in layers where that still
            fits. 0.1 if neither `r` nor `compression_ratio` is given and `rank_pattern` leaves layers open.
        alpha: factor on the update. Unlike LoRA's `lora_alpha`, it is not divided by the rank. With 0 there is no
            update, and a warning.
        target_modules: KAN layers to adapt: names or name endings, or a regular expression on the full name. None
            means every KAN layer that is known, by `register_kan_layer` or by `coefficients`.
        exclude_modules: KAN layers to leave out, in the same form.
        layers_to_transform: adapt only layers with these indices (the first number in the module's name), all
            of which there must be.
        layers_pattern: the name before that number, if the first one is not meant.
        rank_pattern: ranks for single layers, keyed by module name or a regular expression on its ending, or by the
            parameter's full name, as `suggest_ranks` gives them. They are taken exactly; a rank above its mode is an
            error. For a module with several coefficient tensors the value may map parameter paths to ranks. A full
            name goes before an expression, and of two expressions the first.
        alpha_pattern: `alpha` for single layers, keyed likewise.
        modules_to_save: modules other than adapters that are trained and saved with them, by endings of their names.
        trainable_token_indices: rows of embeddings that are trained and saved with the adapters: indices into the
            input embedding, or a mapping from names of embedding modules to indices.
        coefficients: coefficient tensors that are not registered: maps a parameter's full name, or a regular
            expression on its ending, to a layout such as `"i o d"` or `"o (i d)"`, or to a mapping with `layout`,
            `sizes` (of flattened axes), `slice` (the part of a packed parameter), `scale` and `scale_layout` (a factor
            before the contraction), and `layer` (the module whose forward uses the parameter, if the key does not
            tell).
        allow_unread: whether a forward pass of an adapted layer may go by without using its coefficients, as in a
            layer with branches; otherwise that is an error, since the adapter would have no effect.
        init_weights: True: G = 0, factors normal with variance 1/size; the adapted model starts equal to the base.
            False: G is random too, for tests.
        slim: A_pt = 0 without memory: the coefficient tensors are the update alone, and those of the model are lost.
            `slim_kan` sets it. G is then random, scaled to the layer's own initialisation.

    Raises:
        ValueError, TypeError: naming the field, the value and what is allowed.
    """

    r: int | tuple[int, int, int] | None = None
    compression_ratio: float | None = None
    alpha: float = 1.0
    target_modules: set[str] | list[str] | str | None = None
    exclude_modules: set[str] | list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, Any] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    coefficients: Mapping[str, Any] = field(default_factory=dict)
    allow_unread: bool = False
    init_weights: bool = True
    slim: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = LOTRA
        if self.r is not None and self.compression_ratio is not None:
            raise ValueError(
                f"give `r` or `compression_ratio`, not both: got r={self.r!r}, "
                f"compression_ratio={self.compression_ratio!r}"
            )
        if self.r is not None:
            self.r = check_ranks(self.r, "r")
        if self.compression_ratio is not None and not (
            isinstance(self.compression_ratio, Real) and 0 < self.compression_ratio <= 1
        ):
            raise ValueError(
                f"`compression_ratio` should be a number in (0, 1] but the value passed is {self.compression_ratio!r}"
            )
        for name, alpha in {"alpha": self.alpha, **_named("alpha_pattern", self.alpha_pattern)}.items():
            if not isinstance(alpha, Real) or isinstance(alpha, bool) or not math.isfinite(alpha):
                raise ValueError(f"`{name}` should be a finite number but the value passed is {alpha!r}")
        self.rank_pattern = {
            key: {path: check_ranks(r, f"rank_pattern[{key!r}][{path!r}]") for path, r in ranks.items()}
            if isinstance(ranks, Mapping)
            else check_ranks(ranks, f"rank_pattern[{key!r}]")
            for key, ranks in _checked_mapping("rank_pattern", self.rank_pattern).items()
        }
        check_descriptions(self.coefficients)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                _check_entries(name, value, str, "names of modules, or a regular expression")
                setattr(self, name, set(value))
        if self.modules_to_save is not None:
            _check_entries("modules_to_save", self.modules_to_save, str, "names of modules")
        if self.layers_pattern is not None and not isinstance(self.layers_pattern, str):
            _check_entries("layers_pattern", self.layers_pattern, str, "names, or one name")
        if self.layers_to_transform is not None and type(self.layers_to_transform) is not int:
            _check_entries("layers_to_transform", self.layers_to_transform, int, "indices of layers, or one index")
        for name in ("layers_to_transform", "layers_pattern"):
            if getattr(self, name) is not None and isinstance(self.target_modules, str):
                raise ValueError(f"`{name}` cannot be used when `target_modules` is a str (regular expression)")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")
        for name in ("allow_unread", "init_weights", "slim"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` should be True or False but the value passed is {getattr(self, name)!r}")

    def to_dict(self) -> dict[str, Any]:
        """The fields, with sets as sorted lists: a saved config does not depend on the hash seed."""
        return {key: sorted(value) if isinstance(value, set) else value for key, value in super().to_dict().items()}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any):
        """The config of a saved adapter. A damaged adapter file beside it is reported here, before a model is touched.

        Raises:
            ValueError: if the adapter file cannot be read, holds NaN or infinity, or does not fit the config.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        check_saved_weights(pretrained_model_name_or_path, subfolder, config.saved_shapes())
        return config

    def self_contained(self, targets: list[Target]) -> LoTRAConfig:
        """A copy that names every target with its layout and ranks, so that it needs no registry to load."""
        ranks = {
            module: _one_or_many({target.spec.parameter: list(target.ranks) for target in group})
            for module, group in _by_module(targets)
        }
        # Keys of the user's that matched nothing stay: PEFT warns about them.
        unmatched = {
            key: value
            for key, value in self.rank_pattern.items()
            if key not in ranks
            and key not in {target.parameter for target in targets}
            and not any(re.match(rf"(.*\.)?({key})$", module) for module in ranks)
        }
        coefficients = {}
        for target in targets:
            owner = target.parameter.rpartition(".")[0]
            layer = {} if owner == target.module else {"layer": target.module}
            coefficients[target.parameter] = target.spec.describe() | layer
        return replace(self, target_modules=set(ranks), rank_pattern={**ranks, **unmatched}, coefficients=coefficients)

    def saved_targets(self) -> list[tuple[str, Target]]:
        """The targets of a self-contained config, each with the name of its LoTRALayer; none of any other config."""
        targets = []
        for parameter, description in self.coefficients.items():
            if not isinstance(description, Mapping) or not description.get("sizes"):
                return []
            module = description.get("layer", parameter.rpartition(".")[0])
            path = parameter.removeprefix(f"{module}.")
            spec = CoefficientSpec(path, Layout(description["layout"], description["sizes"]))
            ranks = pattern_value(self.rank_pattern, module, path)
            if ranks is None:
                return []
            targets.append(Target(module, spec, as_triple(ranks)))
        named = []
        for module, group in _by_module(sorted(targets, key=lambda target: (target.module, target.spec.parameter))):
            named += [(module + ".base_layer" * (len(group) - 1 - depth), t) for depth, t in enumerate(group)]
        return named

    def saved_shapes(self) -> dict[str, tuple[int, ...]]:
        """Key and shape of every adapter tensor in the file saved with a self-contained config."""
        return {
            f"base_model.model.{name}.{container}": shape
            for name, target in self.saved_targets()
            for container, shape in zip(
                CONTAINERS, factor_shapes(target.spec.layout.canonical_shape, target.ranks), strict=True
            )
        }


def pattern_value(pattern: Mapping[str, Any], module: str, parameter: str, default: Any = None) -> Any:
    """A tensor's entry, by its module's full name or else PEFT's pattern rule; it may map parameters to values."""
    value = pattern.get(module if module in pattern else get_pattern_key(list(pattern), module), default)
    return value.get(parameter, default) if isinstance(value, Mapping) else value


def _by_module(targets: list[Target]) -> Iterator[tuple[str, list[Target]]]:
    return ((module, list(group)) for module, group in groupby(targets, key=lambda target: target.module))


def _one_or_many(by_parameter: dict[str, Any]) -> Any:
    return by_parameter if len(by_parameter) > 1 else next(iter(by_parameter.values()))


def check_ranks(r: Any, name: str) -> int | tuple[int, int, int]:
    """`r` as an int or a triple of ints, all positive; ValueError naming `name` otherwise."""
    triple = (r,) * 3 if type(r) is int else tuple(r) if isinstance(r, list | tuple) else ()
    if len(triple) != 3 or any(type(rank) is not int or rank <= 0 for rank in triple):
        raise ValueError(
            f"`{name}` should be a positive integer value, or three of them (input, output, basis), "
            f"but the value passed is {r!r}"
        )
    return r if type(r) is int else triple


def _checked_mapping(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"`{name}` should be a mapping from names but the value passed is {value!r}")
    return value


def _check_entries(name: str, value: Any, kind: type, what: str) -> None:
    wrong = not isinstance(value, list | tuple | set)
    if wrong or any(not isinstance(entry, kind) or isinstance(entry, bool) for entry in value):
        raise TypeError(f"`{name}` should be a list of {what}, but the value passed is {value!r}")


def _named(name: str, value: Any) -> dict[str, Any]:
    return {f"{name}[{key!r}]": entry for key, entry in _checked_mapping(name, value).items()}
