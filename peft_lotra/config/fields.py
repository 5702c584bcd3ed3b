"""Checks of single fields of a LoTRAConfig."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from numbers import Real
from typing import Any

from ..families.family import Family
from ..preserved import is_number

FORMAT = 1  # of saved adapters; one that an earlier version would read wrongly has a greater number
BIASES = ("none", "all", "lotra_only")


def _are(kind: type, value: Any) -> bool:
    """Whether a value is a collection of this type."""
    is_collection = isinstance(value, Collection) and not isinstance(value, str | bytes | Mapping)
    return is_collection and all(isinstance(entry, kind) and not isinstance(entry, bool) for entry in value)


def _are_names(value: Any) -> bool:
    return value is None or isinstance(value, str) or _are(str, value)


def _are_indices(value: Any) -> bool:
    return value is None or type(value) is int or _are(int, value)


def _are_rows(tokens: Any) -> bool:
    rows = tokens.values() if isinstance(tokens, Mapping) else [[] if tokens is None else tokens]
    return all(_are(int, indices) for indices in rows)


def _is_count(value: Any) -> bool:
    return value is None or (type(value) is int and value > 0)


_NAMES = "a list of names of modules, or a regular expression,"
_ROWS = "a list of indices, or a mapping from names of embeddings to such lists,"
_FLAGS = ("allow_unread", "freeze_factors", "init_weights", "inference_mode")

# Which values each field may have, and words for errors: a TypeError for these, a ValueError for those below.
_TYPES = (
    ("target_modules", _are_names, _NAMES),
    ("exclude_modules", _are_names, _NAMES),
    ("modules_to_save", lambda value: value is None or _are(str, value), "a list of names of modules,"),
    ("layers_pattern", _are_names, "a list of names, or one name,"),
    ("layers_to_transform", _are_indices, "a list of indices of layers, or one index,"),
    ("trainable_token_indices", _are_rows, _ROWS),
    ("digest", lambda value: isinstance(value, str | None), "a str; leave it out,"),
)
_VALUES = (
    ("compression_ratio", lambda value: value is None or (is_number(value) and 0 < value <= 1), "a number in (0, 1]"),
    ("bias", BIASES.__contains__, f"one of {BIASES}"),
    ("family_code", _is_count, "a positive integer or None"),
    ("family_degree", _is_count, "a positive integer"),
    *[(name, lambda value: isinstance(value, bool), "True or False") for name in _FLAGS],
)


def check_fields(config: Any) -> None:
    """Raise TypeError or ValueError, naming the field and the value, if one cannot be right by itself."""
    for error, checks in ((TypeError, _TYPES), (ValueError, _VALUES)):
        for name, allowed, words in checks:
            if not allowed(value := getattr(config, name)):
                raise error(f"`{name}` should be {words} but the value passed is {value!r}")
    found = config.file_format
    if type(found) is not int or not 1 <= found <= FORMAT:
        instead = "`pip install -U peft-lotra`" if type(found) is int and found > FORMAT else "leave it out"
        raise ValueError(
            f"`file_format` is {found!r}, and this version of peft_lotra reads formats up to {FORMAT}: {instead}"
        )
    checked_pattern("base_marks", config.base_marks, _check_marks)


def _check_marks(marks: Any, name: str) -> None:
    if not isinstance(marks, list) or len(marks) != 2 or not all(isinstance(x, Real) for x in marks):
        raise TypeError(f"`{name}` should be a list of two numbers but is {marks!r}: leave it out")


def check_alpha(alpha: Any, name: str) -> Any:
    """`alpha`. Raise ValueError, naming `name`, unless it is a finite number."""
    if not is_number(alpha):
        raise ValueError(f"`{name}` should be a finite number but the value passed is {alpha!r}")
    return alpha


def checked_pattern(name: str, value: Any, check: Callable[[Any, str], Any]) -> dict[str, Any]:
    """What `check` makes of each value of a pattern, and of those inside mappings by parameter, and of its name."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"`{name}` should be a mapping from names but the value passed is {value!r}")
    return {
        key: {path: check(inner, f"{name}[{key!r}][{path!r}]") for path, inner in entry.items()}
        if isinstance(entry, Mapping)
        else check(entry, f"{name}[{key!r}]")
        for key, entry in value.items()
    }


def check_family(config: Any) -> None:
    """Write `family` as plain data. Raise unless `family`, its degree and its code fit together."""
    code = config.family_code
    if config.family_degree is None:
        config.family_degree = 1 if code else 4
    if config.family is None:
        if code is not None:
            raise ValueError(f"`family_code` {code!r} without `family`: list the names of tasks in `family`")
        return
    config.family = Family.of(config.family, config.family_degree, code or 0).plain
