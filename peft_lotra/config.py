"""LoTRAConfig: plain data, checked as far as possible without a model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
from peft.config import PeftConfig
from peft.utils import CONFIG_NAME, INCLUDE_LINEAR_LAYERS_SHORTHAND

from .checkpoint import (
    PREFIX,
    SavedAdapter,
    Slot,
    check_weights,
    digest,
    is_adapter_key,
    naming,
    read_adapter,
)
from .coefficients import CoefficientSpec, Layout
from .coefficients.spec import check_descriptions
from .families import Family
from .fields import check_choices, check_family, check_names, check_numbers, checked_mapping
from .patterns import INDEXED, check_expressions, name_endings
from .registration import LOTRA
from .tensors.ranks import by_mode, check_ranks
from .tensors.tucker import Ranks, tucker_shapes


@dataclass(frozen=True)
class Target:
    """One coefficient tensor to adapt."""

    module: str  # name of the KAN layer
    spec: CoefficientSpec
    ranks: Ranks = (1, 1, 1)
    alpha: float = 1.0
    copy_of: tuple[str, str] | None = None  # the layer's class, and the registered class that it is taken to copy

    @property
    def parameter(self) -> str:
        """Full name of the coefficient parameter in the base model."""
        return f"{self.module}.{self.spec.parameter}"


@dataclass
class LoTRAConfig(PeftConfig):
    """A_ft = A_pt + alpha · G ×₁ U1 ×₂ U2 ×₃ U3 ×₄ U4 for every KAN coefficient tensor that the fields select.

    The model makes its own copy of the config. In this copy, `target_modules`, `coefficients` and `rank_pattern` name
    every adapted layer, so that a saved adapter loads without the registrations of the machine that made it. The
    object that you pass is not changed, and you can use it again.

    Args:
        r: Tucker ranks (input, output, basis), or one number for all three. They are upper bounds: each layer clips
            them to the sizes of its modes. A mode of rank None, or of its full size, is whole: it has no factor. With
            `(None, r2, None)` the adapter is a LoRA of the flattened coefficients. A fourth number is the rank of the
            groups and kernel positions, in layers that have them. Without it, this mode is whole.
        compression_ratio: a budget c in (0, 1] in place of `r`, for all adapted layers together: trained adapter
            parameters ≤ c · (number of coefficients). The ranks are the largest `r` that fits; then the lowest ranks
            are raised in turn while they fit. It is 0.1 if neither `r` nor `compression_ratio` is given and
            `rank_pattern` does not name every layer. On a KAN that is too small for 0.1, the smallest adapter is taken
            if there is no `rank_pattern`, with a warning.
        alpha: a factor on the update. Unlike LoRA's `lora_alpha`, it is not divided by the rank. If it is 0, there is
            no update, and a warning says so.
        target_modules: the KAN layers to adapt: names or name endings, or a regular expression on the full name. None
            means every KAN layer that is known, by `register_kan_layer` or by `coefficients`. "all-linear" means
            these layers and every other matrix and convolution kernel, in KAN layers or not, except the output layer
            of a transformers model; see `peft_lotra.linear_targets`.
        exclude_modules: the layers to leave out, in the same form.
        layers_to_transform: the indices of the layers to adapt. An index is the first number in a module's name. The
            model must have a layer for each index.
        layers_pattern: the name in front of the index, if the first number is not the index.
        rank_pattern: ranks of single layers. A key is a module's name, a regular expression on its ending, or a
            parameter's full name, as `suggest_ranks` returns it. The ranks are not clipped: a rank above its mode is
            an error. For a module with several coefficient tensors, the value may map parameter paths to ranks. A full
            name takes precedence over an expression, and an expression over those after it.
        alpha_pattern: `alpha` of single layers, with keys of the same form.
        modules_to_save: other modules that are trained and saved with the adapter, by the endings of their names.
        trainable_token_indices: the rows of embeddings that are trained and saved with the adapter: indices into the
            input embedding, or a mapping from names of embedding modules to indices.
        coefficients: coefficient tensors that are not registered. It maps a parameter's full name, or a regular
            expression on its ending, to a layout such as `"i o d"` or `"o (i d)"`. The value may also be a mapping
            with `layout`, `sizes` (of flattened axes), `slice` (the part of a packed parameter), `scale` and
            `scale_layout` (a factor before the contraction), and `layer` (the module whose forward uses the parameter,
            if it is not the one that the key suggests).
        bias: which biases are trained and saved with the adapter. "none": no biases. "lotra_only": those of adapted
            layers, with the vectors of normalisations in them. "all": these and all other biases of the model. As with
            LoRA, they are the model's own tensors: only one adapter of a model may have them, and they keep their
            trained values when the adapter is disabled, unloaded or deleted.
        allow_unread: whether a forward pass of an adapted layer may leave its coefficients unused, as in a layer with
            branches. Otherwise such a pass is an error, because the adapter would have no effect.
        freeze_factors: whether to train only the core G. The factors stay as they start: random and orthonormal, or as
            `initialize_lotra_weights(method="gradient_hosvd")` sets them. They are saved with the core, because
            factors drawn from the same seed differ in their last bits between processors.
        family: ranges of continuous parameters by name, as in `{"lam": (1.0, 1.6)}`, or a list of names of tasks. The
            adapter is then for the whole family of tasks, Δ(task) = alpha · G ×₁ U1 ×₂ U2 ×₃ U3 ×₅ c(task), and its
            core has one more axis, of size P. `at_task` sets the task of a forward pass, and `adapter_at` makes an
            ordinary adapter for one task. Ours.
        family_degree: the total degree of the polynomials in the parameters that make up c: P = C(k + degree, degree)
            for k parameters. For named tasks, P is their number.
        init_weights: True: G = 0 and the factors are normal with variance 1/size, so the adapted model starts equal to
            the base. False: G is random, too, for tests.
        slim: whether A_pt = 0 and takes no memory. The coefficient tensors then consist of the update alone, and those
            of the model are lost. `slim_kan` sets this. G is then random, scaled to the layer's own initialisation.
        digest: the sha256 of the saved tensors and of the fields that give them their meaning. `save_pretrained` sets
            it. An adapter file that does not fit it is not loaded. If you edit tensors or config by hand, remove this
            field from `adapter_config.json`; the adapter then loads with a warning.

    Raises:
        ValueError, TypeError: naming the field, the value and what is allowed.
    """

    r: int | Ranks | None = None
    compression_ratio: float | None = None
    alpha: float = 1.0
    target_modules: set[str] | list[str] | str | None = None
    exclude_modules: set[str] | list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, Any] = field(default_factory=dict)
    alpha_pattern: dict[str, Any] = field(default_factory=dict)
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    coefficients: Mapping[str, Any] = field(default_factory=dict)
    bias: str = "none"
    allow_unread: bool = False
    freeze_factors: bool = False
    family: Mapping[str, Any] | list[str] | None = None
    family_degree: int = 4
    init_weights: bool = True
    slim: bool = False
    digest: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_written": {}, "_saved": None}  # copies have no tensors

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except ValueError as error:
            raise ValueError(f"`task_type`: {error}") from None
        self.peft_type = LOTRA
        self._written: Mapping[str, torch.Tensor] = {}  # the tensors that are being saved, by name
        self._copies: frozenset[str] = frozenset()  # the names of saved tensors other than core and factors
        self._saved: SavedAdapter | None = None  # the adapter file beside the config's file, if it was read from one
        self._file: str | None = None  # the config's own file in that case
        check_names(self)
        if self.r is not None and self.compression_ratio is not None:
            raise ValueError(
                f"give `r` or `compression_ratio`, not both: got r={self.r!r}, "
                f"compression_ratio={self.compression_ratio!r}"
            )
        if self.r is not None:
            self.r = check_ranks(self.r, "r")
        check_numbers(self)
        self.rank_pattern = {
            key: {path: check_ranks(r, f"rank_pattern[{key!r}][{path!r}]") for path, r in ranks.items()}
            if isinstance(ranks, Mapping)
            else check_ranks(ranks, f"rank_pattern[{key!r}]")
            for key, ranks in checked_mapping("rank_pattern", self.rank_pattern).items()
        }
        check_descriptions(self.coefficients)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str):
                check_expressions(name, [value])
            elif value is not None:
                setattr(self, name, set(value))
        given = self.layers_pattern or []
        check_expressions("layers_pattern", [given] if isinstance(given, str) else given, INDEXED)
        for name in ("layers_to_transform", "layers_pattern"):
            regular_expression = isinstance(self.target_modules, str) and not self.is_all_linear
            if getattr(self, name) is not None and regular_expression:
                raise ValueError(f"`{name}` cannot be used when `target_modules` is a str (regular expression)")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")
        check_family(self)
        check_choices(self)

    @property
    def is_all_linear(self) -> bool:
        """Whether `target_modules` is "all-linear", in upper or lower case."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND

    def to_dict(self) -> dict[str, Any]:
        """The fields, with sets as sorted lists, so that a saved config does not depend on the hash seed."""
        return {key: sorted(value) if isinstance(value, set) else value for key, value in super().to_dict().items()}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any):
        """The config of a saved adapter, checked with the adapter file beside it before a model is touched.

        A config beside an adapter file is self-contained: its names are compared literally, not as regular
        expressions. An adapter without `digest` is loaded with a warning.

        Raises:
            ValueError, TypeError: naming the file and a wrong field, if the adapter file is missing, cannot be read,
                holds NaN or infinity, or does not fit the config.
        """
        directory = os.path.join(pretrained_model_name_or_path, *([subfolder] if subfolder else []))
        with naming(os.path.join(directory, CONFIG_NAME)):
            config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
            return config._checked(directory) if isinstance(config, LoTRAConfig) else config

    def _checked(self, directory: str) -> LoTRAConfig:
        """This config with the adapter file of its directory, after all checks."""
        # These fields had their effect when the adapter was made.
        modules = {target.module for _, target in self.saved_targets()}
        alphas = {module: self.alpha_pattern.get(module, self.alpha) for module in modules if self.alpha_pattern}
        config = replace(
            self,
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
            alpha_pattern=self.alpha_pattern | alphas,
        )
        saved = read_adapter(directory)
        obstacle = config._obstacle()
        if saved is None:
            if os.path.isdir(directory) and not obstacle:
                raise ValueError(
                    f"{directory} has {CONFIG_NAME} but no adapter file (adapter_model.safetensors or "
                    "adapter_model.bin) beside it: copy the whole directory, or save the adapter again"
                )
            return self
        if obstacle:
            raise ValueError(
                f"{obstacle}. The config of a saved adapter names every tensor in full, as `save_pretrained` writes it"
            )
        copies = {key: Slot(tuple(t.shape), t.dtype) for key, t in saved.weights.items() if not is_adapter_key(key)}
        check_weights(config.saved_slots() | copies, saved.weights, saved.origin)
        if self.digest is None:
            warnings.warn(
                f"{CONFIG_NAME} in {directory} has no `digest`, so a change or damage of the adapter would not be "
                "noticed: save the adapter again to add one",
                stacklevel=4,
            )
        elif self.digest != digest(saved.weights, self._meaning()):
            raise ValueError(
                f"{saved.origin} and this config do not fit the `digest` here: one of them was changed or damaged. "
                f"Use an earlier save. If you changed it on purpose, remove `digest` from {CONFIG_NAME}"
            )
        config._saved, config._file = saved, os.path.join(directory, CONFIG_NAME)
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`, with the `digest` of the tensors that PEFT collected last."""
        written, self._written = self._written, {}
        plain = all(type(t) in (torch.Tensor, torch.nn.Parameter) and not t.is_meta for t in written.values())
        self.digest = digest(written, self._meaning()) if written and plain else None
        super().save_pretrained(save_directory, **kwargs)

    def check_written(self, adapter_name: str) -> None:
        """Raise ValueError if the tensors that are being saved are not those that the config names."""
        expected = {key: tuple(slot.shape) for key, slot in self.saved_slots().items()}
        written = {key: tuple(t.shape) for key, t in self._written.items() if is_adapter_key(key)}
        wrong = {key for key in expected.keys() | written.keys() if expected.get(key) != written.get(key)}
        wrong |= self._copies - self._written.keys()
        if wrong:
            layers = sorted({key.removeprefix(PREFIX).rpartition(".")[0] for key in wrong})
            raise ValueError(
                f"the adapter {adapter_name!r} cannot be saved: the tensors of {layers} are not those that its config "
                "names. Either these layers were replaced or rebuilt after they were adapted, so that their update is "
                "lost; or they have an earlier adapter of the same name; or `state_dict` is not that of the whole "
                "model. Adapt the model as it is now by a new `get_peft_model`"
            )

    def _meaning(self) -> dict[str, Any]:
        """The fields that give the adapter's tensors their meaning."""
        fields = ("alpha", "alpha_pattern", "coefficients", "rank_pattern", "slim", "modules_to_save")
        said = self.to_dict()
        others = {} if self.bias == "none" else {"bias": self.bias}
        others |= {} if self.family is None else {name: said[name] for name in ("family", "family_degree")}
        return {name: said[name] for name in (*fields, "trainable_token_indices")} | others

    def self_contained(self, targets: list[Target]) -> LoTRAConfig:
        """A copy that names every target with its layout, ranks and `alpha`, so that it loads without a registry."""
        modules = {module: list(group) for module, group in _by_module(targets)}
        coefficients = {}
        for target in targets:
            owner = target.parameter.rpartition(".")[0]
            layer = {} if owner == target.module else {"layer": target.module}
            coefficients[target.parameter] = target.spec.describe() | layer
        return replace(
            self,
            target_modules=set(modules),
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
            rank_pattern={
                module: _one_or_many({target.spec.parameter: list(target.ranks) for target in group})
                for module, group in modules.items()
            },
            alpha_pattern={
                module: _one_or_many({target.spec.parameter: target.alpha for target in group})
                for module, group in modules.items()
                if self.alpha_pattern
            },
            coefficients=coefficients,
        )

    @property
    def kind(self) -> Family | None:
        """The family of tasks; None if the adapter is for one task."""
        return None if self.family is None else Family.of(self.family, self.family_degree)

    @property
    def terms(self) -> int:
        """P of a family of tasks; 0 if the adapter is for one task."""
        return 0 if self.kind is None else self.kind.size

    @property
    def is_self_contained(self) -> bool:
        """Whether the config names every target, as `self_contained` does. Its names are then read literally."""
        return self._obstacle() is None

    def _obstacle(self) -> str | None:
        """Why the config is not self-contained, naming the field; None if it is self-contained."""
        modules: dict[str, set[str]] = {}
        for _, target in self.saved_targets():
            modules.setdefault(target.module, set()).add(target.spec.parameter)
        if not modules:
            return "`coefficients` and `rank_pattern` should give a layout with `sizes`, and ranks, for every tensor"
        for name in ("rank_pattern", "alpha_pattern"):
            unknown = sorted(getattr(self, name).keys() - modules.keys())
            if unknown:
                return f"`{name}` names {unknown}, but the modules of `coefficients` are {sorted(modules)}"
        if self.alpha_pattern and self.alpha_pattern.keys() != modules.keys():
            return f"`alpha_pattern` lacks {sorted(modules.keys() - self.alpha_pattern.keys())}"
        for module, alphas in self.alpha_pattern.items():
            if isinstance(alphas, Mapping) and alphas.keys() != modules[module]:
                return f"`alpha_pattern[{module!r}]` names {sorted(alphas)}, and should {sorted(modules[module])}"
        if not isinstance(self.target_modules, set):
            return f"`target_modules` should be a list of names but is {self.target_modules!r}"
        left_out = sorted(module for module in modules if not self.target_modules & name_endings(module))
        if left_out:
            return f"`target_modules` leaves out {left_out}, which `coefficients` names"
        used = [
            n for n in ("exclude_modules", "layers_to_transform", "layers_pattern") if getattr(self, n) is not None
        ]
        return f"{used} are given besides" if used else None

    def saved_targets(self) -> list[tuple[str, Target]]:
        """The targets of a self-contained config, each with the name of its LoTRALayer; [] for any other config."""
        targets = []
        for parameter, description in self.coefficients.items():
            if not isinstance(description, Mapping) or not description.get("sizes"):
                return []
            module = description.get("layer") or parameter.rpartition(".")[0]
            path = parameter.removeprefix(f"{module}.")
            spec = CoefficientSpec(path, Layout(description["layout"], description["sizes"]))
            ranks = self.rank_pattern.get(module)
            ranks = ranks.get(path) if isinstance(ranks, Mapping) else ranks
            if ranks is None or {axis for group in spec.axes for axis in group} != description["sizes"].keys():
                return []
            targets.append(Target(module, spec, by_mode(ranks)))
        named = []
        for module, group in _by_module(sorted(targets, key=lambda target: (target.module, target.spec.nesting))):
            named += [(module + ".base_layer" * (len(group) - 1 - depth), t) for depth, t in enumerate(group)]
        return named

    def saved_slots(self) -> dict[str, Slot]:
        """The name and shape of every core and factor in the file beside a self-contained config."""
        return {
            f"{PREFIX}{name}.{container}": Slot(shape)
            for name, target in self.saved_targets()
            for container, shape in self._shapes(target).items()
        }

    def _shapes(self, target: Target) -> dict[str, tuple[int, ...]]:
        return tucker_shapes(target.spec.layout.canonical_shape, target.ranks, self.terms)


def _by_module(targets: list[Target]) -> Iterator[tuple[str, list[Target]]]:
    return ((module, list(group)) for module, group in groupby(targets, key=lambda target: target.module))


def _one_or_many(by_parameter: dict[str, Any]) -> Any:
    return by_parameter if len(by_parameter) > 1 else next(iter(by_parameter.values()))
