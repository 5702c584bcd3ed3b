"""Interprets the names and regular expressions of a config by PEFT's rules."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from peft.utils.other import get_pattern_key

ENDING = (r"(.*\.)?(", ")$")  # around a key
INDEXED = (r"(?:^|\.)", r"\.")  # around an entry of `layers_pattern`


def name_endings(module: str) -> set[str]:
    """`"a.b.c"` -> `{"a.b.c", "b.c", "c"}`."""
    parts = module.split(".")
    return {".".join(parts[start:]) for start in range(len(parts))}


def entries_for(module: str, patterns: Collection[str] | str) -> set[str]:
    """The entries that mean `module`. A string is a regular expression on the full name; a collection holds names and
    endings of names."""
    if isinstance(patterns, str):
        return {patterns} if re.fullmatch(patterns, module) else set()
    return name_endings(module).intersection(patterns)


def means(key: str, name: str) -> re.Match[str] | None:
    """The match if a key means this name, by the rule of PEFT's `get_pattern_key`; group 1 is the part before it."""
    return re.match(f"{ENDING[0]}{key}{ENDING[1]}", name)


def pattern_value(pattern: Mapping[str, Any], module: str, parameter: str, default: Any = None) -> Any:
    """The value for a tensor: that of its module's full name, or of the first key that means the module. If the value
    maps parameters to values, that of the parameter."""
    value = pattern.get(module if module in pattern else get_pattern_key(list(pattern), module), default)
    return value.get(parameter, default) if isinstance(value, Mapping) else value


def check_expressions(field: str, entries: Iterable[str], around: tuple[str, str] = ("", "")) -> None:
    """Raise ValueError, naming field and entry, unless every entry is a regular expression inside of `around`."""
    for entry in entries:
        try:
            re.compile(f"{around[0]}{entry}{around[1]}")
        except (re.error, OverflowError, RecursionError) as error:
            instead = f"if it is meant as a name, give {re.escape(entry)!r}"
            raise ValueError(f"`{field}`: {entry!r} is not a regular expression ({error}); {instead}") from None


def index_of(module: str, layers_pattern: Collection[str] | str | None) -> int | None:
    """The number in a module's name that `layers_to_transform` refers to; None if there is none."""
    patterns = layers_pattern or [""]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        before, after = INDEXED if pattern else (INDEXED[0], "")
        index = re.search(rf"{before}{pattern}{after}(?P<index>\d+)(?:\.|$)", module)
        if index is not None:
            return int(index["index"])
    return None
