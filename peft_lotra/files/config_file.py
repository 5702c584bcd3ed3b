"""The config of a saved adapter: what makes it self-contained, and how it is written, read and checked."""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft.config import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from ..coefficients.layout import Layout, unstacked
from ..coefficients.spec import CoefficientSpec
from ..coefficients.target import Target
from ..families.family import Family
from ..tucker.decomposition import CODES, tucker_shapes
from ..tucker.ranks import by_mode
from .adapter_file import PREFIX, SavedAdapter, Slot, check_weights, digest, is_adapter_key, naming, read_adapter

# These fields had their effect when the adapter was made.
_NONE: dict[str, Any] = dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))

Config = TypeVar("Config", bound="ConfigFile")


class ConfigFile(PeftConfig):
    """What a LoTRAConfig does as a file, `adapter_config.json`.

    A self-contained config names every adapted tensor with its layout and ranks. It loads without the registrations of
    the machine that made it, and its names are compared literally.
    """

    if TYPE_CHECKING:  # the fields are those of LoTRAConfig

        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...

    _written: Mapping[str, torch.Tensor] = {}  # the tensors that are being saved, by name
    _copies: frozenset[str] = frozenset()  # the names of saved tensors other than core and factors
    _saved: SavedAdapter | None = None  # the adapter file beside the config's file, if it was read from one
    _file: str | None = None  # the config's own file in that case
    _named: tuple[tuple[Any, Any], list[tuple[str, Target]]] | None = None  # the fields, and the targets in them
    _kind: tuple[tuple[Any, int, int], Family | None] | None = None  # the fields of which it was made, and the family

    @property
    def kind(self) -> Family | None:
        """The family of tasks; None if the adapter is for one task."""
        given = self.family, self.family_degree or 1, self.family_code or 0
        if self._kind is None or any(a is not b for a, b in zip(self._kind[0], given, strict=True)):
            self._kind = given, None if self.family is None else Family.of(*given)
        return self._kind[1]

    @property
    def terms(self) -> int:
        """P of a family of tasks; 0 if the adapter is for one task."""
        return 0 if self.kind is None else self.kind.size

    @property
    def codes(self) -> tuple[int, int] | None:
        """The shape of the codes, (tasks, k); None if there are none."""
        return (len(self.kind.tasks), self.kind.code) if self.kind is not None and self.kind.code else None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_written": {}, "_saved": None, "_named": None}  # copies have no tensors

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
            if not isinstance(config, ConfigFile):
                return config
            if not os.path.isdir(directory):
                given = cls._split_kwargs(kwargs)[0]
                directory = _downloaded(pretrained_model_name_or_path, subfolder=subfolder, **given) or directory
            saved = read_adapter(directory)
            return config._of_adapter(saved, directory)._checked(directory, saved)

    def _of_adapter(self: Config, saved: SavedAdapter | None, directory: str) -> Config:
        """This config, or that in the adapter file if this one is of another save."""
        if saved is None or saved.config is None:
            return self
        with naming(f"the config in {saved.origin}, an earlier save of which may be whole"):
            own = type(self).from_peft_type(**json.loads(saved.config))
        if not isinstance(own, type(self)) or own.digest is None or self.digest in (None, own.digest):
            return self  # one that was changed on purpose has no digest
        warnings.warn(
            f"{CONFIG_NAME} in {directory} is of another save than {saved.origin} beside it, as if a save was "
            "interrupted: the config in the adapter file is used. Save the adapter again to replace both",
            stacklevel=5,
        )
        return own

    def _checked(self: Config, directory: str, saved: SavedAdapter | None) -> Config:
        """This config with the adapter file of its directory, after all checks."""
        modules = {target.module for _, target in self.saved_targets()}
        alphas = {module: self.alpha_pattern.get(module, self.alpha) for module in modules if self.alpha_pattern}
        config = replace(self, **_NONE | {"alpha_pattern": self.alpha_pattern | alphas})
        obstacle = config._obstacle()
        if saved is None:
            if os.path.isdir(directory) and not obstacle:
                raise ValueError(
                    f"{directory} has {CONFIG_NAME} but no adapter file (adapter_model.safetensors or "
                    "adapter_model.bin) beside it: copy the whole directory, or save the adapter again"
                )
            return self
        if obstacle:
            raise ValueError(f"{obstacle}, in full and literally, as `save_pretrained` writes them")
        copies = {key: Slot(tuple(t.shape), t.dtype) for key, t in saved.weights.items() if not is_adapter_key(key)}
        check_weights(config.saved_slots() | copies, saved.weights, saved.origin)
        if self.digest is None:
            told = f"{CONFIG_NAME} in {directory} has no `digest`, so damage of the adapter would not be noticed"
            warnings.warn(f"{told}: save the adapter again to add one", stacklevel=4)
        elif self.digest != digest(saved.weights, self._meaning()):
            raise ValueError(
                f"{saved.origin} and this config do not fit the `digest` here: one of them was changed or damaged. "
                f"Use an earlier save. If you changed it on purpose, remove `digest` from {CONFIG_NAME}"
            )
        config._saved, config._file = saved, os.path.join(directory, CONFIG_NAME)
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json` with the `digest` of the tensors that PEFT collected last."""
        written, self._written = self._written, {}
        plain = all(type(t) in (torch.Tensor, torch.nn.Parameter) and not t.is_meta for t in written.values())
        self.digest = digest(written, self._meaning()) if written and plain else None
        super().save_pretrained(save_directory, **kwargs)

    def take_saved(self, other: PeftConfig) -> None:
        """Take the checked tensors of a saved adapter that has the same meaning."""
        if not isinstance(other, ConfigFile):
            raise TypeError(f"it is a {type(other).__name__}, and the adapter of this name a {type(self).__name__}")
        mine, theirs = self._meaning(), other._meaning()
        fields = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
        if fields and other._saved is not None:
            raise ValueError(
                f"{other._saved.origin} differs in {fields} from the adapter whose weights it should replace: load it "
                "under a name that the model does not have"
            )
        self._saved = other._saved

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
                "names. These layers were replaced after they were adapted, have an earlier adapter of the same name, "
                "or are not in `state_dict`. Adapt the model as it is now by a new `get_peft_model`"
            )

    def _meaning(self) -> dict[str, Any]:
        """The fields that give the adapter's tensors their meaning."""
        fields = ["alpha", "alpha_pattern", "coefficients", "rank_pattern", "modules_to_save"]
        fields += ["trainable_token_indices", *["bias"] * (self.bias != "none")]
        fields += ["family", "family_degree"] * (self.family is not None)
        fields += ["family_code"] * (self.family_code is not None)
        said = {name: getattr(self, name) for name in fields}
        return {name: sorted(value) if isinstance(value, set) else value for name, value in said.items()}

    def self_contained(self: Config, targets: list[Target]) -> Config:
        """A copy that names every target with its layout, ranks and `alpha`, so that it loads without a registry."""
        coefficients: dict[str, Any] = {}
        ranks: dict[str, Any] = {}
        alphas: dict[str, Any] = {}
        for target in targets:
            owner, name = target.parameter.rpartition(".")[0], target.spec.parameter
            layer = {} if owner == target.module else {"layer": target.module}
            coefficients[target.parameter] = target.spec.describe() | layer
            ranks.setdefault(target.module, {})[name] = list(target.ranks)
            alphas.setdefault(target.module, {})[name] = target.alpha
        for pattern in (ranks, alphas):
            pattern |= {module: next(iter(own.values())) for module, own in pattern.items() if len(own) == 1}
        fields = {"target_modules": set(ranks), "coefficients": coefficients, "rank_pattern": ranks}
        return replace(self, **_NONE | fields | {"alpha_pattern": alphas if self.alpha_pattern else {}})

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
            given = getattr(self, name)
            inner = {k: v.keys() if isinstance(v, Mapping) else modules.get(k) for k, v in given.items()}
            if given and inner != modules:
                return (
                    f"`{name}` should name the modules of `coefficients`, {sorted(modules)}, but names {sorted(given)}"
                )
        if not isinstance(self.target_modules, set) or not modules.keys() <= self.target_modules:
            return f"`target_modules` should be a list of names with {sorted(modules)} but is {self.target_modules!r}"
        used = [f"`{name}`" for name in _NONE if getattr(self, name) is not None]
        return f"{', '.join(used)} should be left out: `coefficients` names the layers" if used else None

    def saved_targets(self) -> list[tuple[str, Target]]:
        """The targets of a self-contained config, each with the name of its LoTRALayer; [] for any other config."""
        given = self.coefficients, self.rank_pattern
        if self._named is None or self._named[0] != given:
            self._named = deepcopy(given), self._targets()
        return self._named[1]

    def _targets(self) -> list[tuple[str, Target]]:
        targets = []
        for parameter, description in self.coefficients.items():
            if not isinstance(description, Mapping) or not description.get("sizes"):
                return []
            module = description.get("layer") or parameter.rpartition(".")[0]
            path = parameter.removeprefix(f"{module}.")
            spec = CoefficientSpec(path, Layout(unstacked(description["layout"]), description["sizes"]))
            ranks = self.rank_pattern.get(module)
            ranks = ranks.get(path) if isinstance(ranks, Mapping) else ranks
            if ranks is None or {axis for group in spec.axes for axis in group} != description["sizes"].keys():
                return []
            targets.append(Target(module, spec, by_mode(ranks)))
        targets.sort(key=lambda target: (target.module, target.spec.nesting))
        inside, named = Counter([target.module for target in targets]), []
        for target in targets:  # the outermost layer comes first, around those of the module's other tensors
            inside[target.module] -= 1
            named.append((target.module + ".base_layer" * inside[target.module], target))
        return named

    def saved_slots(self) -> dict[str, Slot]:
        """The name and shape of every core and factor, and of the codes, in the file of a self-contained config."""
        targets = self.saved_targets()
        slots = {
            f"{PREFIX}{name}.{container}": Slot(shape)
            for name, target in targets
            for container, shape in tucker_shapes(target.spec.layout.canonical_shape, target.ranks, self.terms).items()
        }
        if self.codes and targets:  # they are with the first tensor
            slots[f"{PREFIX}{targets[0][0]}.{CODES}"] = Slot(self.codes)
        return slots


def _downloaded(repository: str, **given: Any) -> str | None:
    """The directory in the cache with the Hub's adapter file, which PEFT is about to download; None without one."""
    for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        with suppress(EntryNotFoundError):
            return os.path.dirname(hf_hub_download(repository, name, **given))
    return None
