"""Checks of single fields of a LoTRAConfig."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

BIASES = ("none", "all", "lotra_only")

# Fields that are lists: of what, whether one entry may stand alone, and how errors say it.
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
            "`trainable_token_indices` should be a list of indices, or one for each name of an embedding, but the "
            f"value passed is {tokens!r}"
        )
    if not isinstance(config.digest, str | None):
        raise TypeError(f"`digest` should be a str but the value passed is {config.digest!r}: leave it out")


def _is_list_of(kind: type, value: Any) -> bool:
    is_collection = isinstance(value, Collection) and not isinstance(value, str | bytes | Mapping)
    return is_collection and all(isinstance(entry, kind) and not isinstance(entry, bool) for entry in value)


def checked_mapping(name: str, value: Any) -> Mapping[str, Any]:
    """The value of a field; TypeError unless it maps names."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"`{name}` should be a mapping from names but the value passed is {value!r}")
    return value


def named_entries(name: str, value: Any) -> dict[str, Any]:
    """The entries of a pattern, those by parameter too, as errors call them."""
    found = {}
    for key, entry in checked_mapping(name, value).items():
        for path, inner in entry.items() if isinstance(entry, Mapping) else [(None, entry)]:
            found[f"{name}[{key!r}]" + ("" if path is None else f"[{path!r}]")] = inner
    return found
