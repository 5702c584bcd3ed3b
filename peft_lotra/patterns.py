"""What the names and regular expressions of a config mean, by PEFT's rules."""

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


def entries_for(module: str, patterns: Collection[str] | str) -> list[str]:
    """The entries that mean `module`: a string is a regular expression on the full name, a collection has names or
    endings of names."""
    if isinstance(patterns, str):
        return [patterns] if re.fullmatch(patterns, module) else []
    endings = name_endings(module)
    return [entry for entry in patterns if entry in endings]


def means(key: str, name: str) -> re.Match[str] | None:
    """Whether a key means this name, as PEFT's `get_pattern_key` has it; what precedes the key is the first group."""
    return re.match(f"{ENDING[0]}{key}{ENDING[1]}", name)


def pattern_value(pattern: Mapping[str, Any], module: str, parameter: str, default: Any = None) -> Any:
    """A tensor's entry, by its module's full name or else the first key that means it; it may map parameters to
    values."""
    value = pattern.get(module if module in pattern else get_pattern_key(list(pattern), module), default)
    return value.get(parameter, default) if isinstance(value, Mapping) else value


def check_expressions(field: str, entries: Iterable[str], around: tuple[str, str] = ("", "")) -> None:
    """Raise ValueError, naming field and entry, unless all are regular expressions, with what is put around them."""
    for entry in entries:
        try:
            re.compile(f"{around[0]}{entry}{around[1]}")
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f"`{field}`: {entry!r} is not a regular expression ({error}); to mean this name, give "
                f"{re.escape(entry)!r}"
            ) from None


def index_of(module: str, layers_pattern: Collection[str] | str | None) -> int | None:
    """The number in a module's name that `layers_to_transform` means."""
    patterns = layers_pattern or [""]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        before, after = INDEXED if pattern else (INDEXED[0], "")
        index = re.search(rf"{before}{pattern}{after}(?P<index>\d+)(?:\.|$)", module)
        if index is not None:
            return int(index["index"])
    return None
