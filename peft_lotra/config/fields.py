"""Checks of single fields of a LoTRAConfig."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from numbers import Real
from typing import Any

from ..families.family import Family, check_degree

FORMAT = 1  # of saved adapters; one that an earlier version would read wrongly has a greater number
BIASES = ("none", "all", "lotra_only")

# The fields that are lists: name, type of an entry, whether a single entry may replace the list, words for errors.
_NAMES = (
    ("target_modules", str, True, "names of modules, or a regular expression"),
    ("exclude_modules", str, True, "names of modules, or a regular expression"),
    ("modules_to_save", str, False, "names of modules"),
    ("layers_pattern", str, True, "names, or one name"),
    ("layers_to_transform", int, True, "indices of layers, or one index"),
)


def check_names(config: Any) -> None:
    """Raise TypeError unless the fields that name modules, layers and tokens hold names and whole numbers."""
    for name, kind, alone, what in _NAMES:
        value = getattr(config, name)
        if value is not None and not (alone and type(value) is kind) and not _is_list_of(kind, value):
            raise TypeError(f"`{name}` should be a list of {what}, but the value passed is {value!r}")
    tokens = config.trainable_token_indices
    rows = tokens.values() if isinstance(tokens, Mapping) else [[] if tokens is None else tokens]
    if not all(_is_list_of(int, indices) for indices in rows):
        raise TypeError(
            "`trainable_token_indices` should be a list of indices, or a mapping from names of embeddings to such "
            f"lists, but the value passed is {tokens!r}"
        )
    if type(config.file_format) is not int or not 1 <= config.file_format <= FORMAT:
        newer = type(config.file_format) is int and config.file_format > FORMAT
        raise ValueError(
            f"`file_format` is {config.file_format!r}, and this version of peft_lotra reads formats up to {FORMAT}: "
            + ("`pip install -U peft-lotra`" if newer else "leave it out")
        )
    if not isinstance(config.digest, str | None):
        raise TypeError(f"`digest` should be a str but the value passed is {config.digest!r}: leave it out")
    for name, marks in checked_mapping("base_marks", config.base_marks).items():
        if not isinstance(marks, list) or len(marks) != 2 or not all(isinstance(x, Real) for x in marks):
            raise TypeError(f"`base_marks[{name!r}]` should be a list of two numbers but is {marks!r}: leave it out")


def _is_list_of(kind: type, value: Any) -> bool:
    is_collection = isinstance(value, Collection) and not isinstance(value, str | bytes | Mapping)
    return is_collection and all(isinstance(entry, kind) and not isinstance(entry, bool) for entry in value)


def checked_mapping(name: str, value: Any) -> Mapping[str, Any]:
    """The value of a field. Raise TypeError unless it is a mapping with str keys."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"`{name}` should be a mapping from names but the value passed is {value!r}")
    return value


def named_entries(name: str, value: Any) -> dict[str, Any]:
    """The values of a pattern, also those inside mappings by parameter, by the names that errors use."""
    found = {}
    for key, entry in checked_mapping(name, value).items():
        for path, inner in entry.items() if isinstance(entry, Mapping) else [(None, entry)]:
            found[f"{name}[{key!r}]" + ("" if path is None else f"[{path!r}]")] = inner
    return found


def check_numbers(config: Any) -> None:
    """Raise ValueError unless `compression_ratio` is in (0, 1] and every `alpha` is a finite number."""
    ratio = config.compression_ratio
    if ratio is not None and not (isinstance(ratio, Real) and 0 < float(ratio) <= 1):
        raise ValueError(f"`compression_ratio` should be a number in (0, 1] but the value passed is {ratio!r}")
    for name, alpha in {"alpha": config.alpha, **named_entries("alpha_pattern", config.alpha_pattern)}.items():
        if not isinstance(alpha, Real) or isinstance(alpha, bool) or not math.isfinite(alpha):
            raise ValueError(f"`{name}` should be a finite number but the value passed is {alpha!r}")


def check_choices(config: Any) -> None:
    """Raise ValueError unless `bias` and the flags have one of their few values."""
    if config.bias not in BIASES:
        raise ValueError(f"`bias` should be one of {BIASES} but the value passed is {config.bias!r}")
    for name in ("allow_unread", "freeze_factors", "init_weights", "slim", "inference_mode"):
        if not isinstance(getattr(config, name), bool):
            raise ValueError(f"`{name}` should be True or False but the value passed is {getattr(config, name)!r}")


def check_family(config: Any) -> None:
    """Write `family` as plain data. Raise unless `family`, its degree and code, and `slim` fit together."""
    code = config.family_code
    if code is not None and (isinstance(code, bool) or not isinstance(code, int) or code < 1):
        raise ValueError(f"`family_code` should be a positive integer or None but the value passed is {code!r}")
    if config.family_degree is None:
        config.family_degree = 1 if code else 4
    check_degree(config.family_degree)
    if config.family is None:
        if code is not None:
            raise ValueError(f"`family_code` {code!r} without `family`: list the names of tasks in `family`")
        return
    config.family = Family.of(config.family, config.family_degree, code or 0).plain
    if config.slim:
        raise ValueError(f"`slim`=True with `family` {config.family!r}: a family adapts a KAN that has coefficients")
