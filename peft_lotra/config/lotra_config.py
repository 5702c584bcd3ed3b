"""LoTRAConfig: plain data, checked as far as possible without a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND

from ..coefficients.spec import check_descriptions
from ..files.config_file import ConfigFile
from ..registration import LOTRA
from ..tucker.decomposition import Ranks
from ..tucker.ranks import check_ranks
from .fields import FORMAT, check_alpha, check_family, check_fields, checked_pattern
from .patterns import INDEXED, check_expressions


@dataclass
class LoTRAConfig(ConfigFile):
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
            `rank_pattern` does not name every layer; a layer whose rank of inputs or outputs would then be below 4
            gets (4, 4, None), since with less a small layer learns little. If the adapter is above 0.2, a warning says
            how large it is.
        alpha: a factor on the update. Unlike LoRA's `lora_alpha`, it is not divided by the rank. If it is 0, there is
            no update, and a warning says so.
        target_modules: the KAN layers to adapt: names or name endings, or a regular expression on the full name. None
            means every KAN layer that is known, by `register_kan_layer` or by `coefficients`. "all-linear" means
            these layers and every other matrix and convolution kernel, in KAN layers or not, except the output layer
            of a transformers model; see `peft_lotra.targets.linear`.
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
            expression on its ending, to a layout such as `"i o d"` or `"o (i d)"`. `{"coef.*": "d | o i"}` means
            parameters coef.0, coef.1, …, one for each basis function. The value may also be a mapping with `layout`,
            `sizes` (of flattened axes), `slice` (the part of a packed parameter), `scale` and `scale_layout` (a factor
            before the contraction), and `layer` (the module whose forward uses the parameter,
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
        family_degree: the total degree of the polynomials in the parameters, and in the codes, that make up c:
            P = C(k + degree, degree) for k of them. It is 4, or 1 with `family_code`. For named tasks without codes, P
            is their number.
        family_code: k, for named tasks: each task has a code of k numbers, which all layers share. The codes are
            trained with the adapter, and saved with it. `family` may then also map names of parameters to ranges,
            beside one list of names of tasks, as in `{"T": (250.0, 400.0), "fluid": ["water", "ammonia"]}`. Ours,
            after CoDA (arXiv 2202.01889).
        init_weights: True: G = 0 and the factors are normal with variance 1/size, so the adapted model starts equal to
            the base. False: G is random, too, for tests.
        digest: the sha256 of the saved tensors and of the fields that give them their meaning. `save_pretrained` sets
            it. An adapter file that does not fit it is not loaded. If you edit tensors or config by hand, remove this
            field from `adapter_config.json`; the adapter then loads with a warning.
        file_format: the number of the format of saved adapters. A number that is not known yet is refused.
        base_marks: a norm and a checksum of the coefficients under the adapter, by full parameter name.
            `save_pretrained` sets it. Loading on other coefficients gives a warning.

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
    family_degree: int | None = None
    family_code: int | None = None
    init_weights: bool = True
    digest: str | None = None
    file_format: int = FORMAT
    base_marks: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except ValueError as error:
            raise ValueError(f"`task_type`: {error}") from None
        self.peft_type = LOTRA
        check_fields(self)
        if self.r is not None and self.compression_ratio is not None:
            got = f"r={self.r!r}, compression_ratio={self.compression_ratio!r}"
            raise ValueError(f"give `r` or `compression_ratio`, not both: got {got}")
        if self.r is not None:
            self.r = check_ranks(self.r, "r")
        check_alpha(self.alpha, "alpha")
        self.rank_pattern = checked_pattern("rank_pattern", self.rank_pattern, check_ranks)
        self.alpha_pattern = checked_pattern("alpha_pattern", self.alpha_pattern, check_alpha)
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

    @property
    def is_all_linear(self) -> bool:
        """Whether `target_modules` is "all-linear", in upper or lower case."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND

    def to_dict(self) -> dict[str, Any]:
        """The fields, with sets as sorted lists, so that a saved config does not depend on the hash seed."""
        return {key: sorted(value) if isinstance(value, set) else value for key, value in super().to_dict().items()}
