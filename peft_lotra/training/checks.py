"""Checks of the arguments of second-order fits."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any


def check_numbers(**arguments: tuple[Any, float]) -> None:
    """Raise ValueError unless each argument, given by name as (value, bound), is a number that respects its bound."""
    for name, (value, bound) in arguments.items():
        whole = name in ("iterations", "patience", "max_memory")
        above = not whole and not name.endswith(("tolerance", "decay"))
        if value is None and name in ("max_seconds", "patience"):
            continue
        good = isinstance(value, Integral if whole else Real) and not isinstance(value, bool) and math.isfinite(value)
        if not good or value < bound or (above and value == bound):
            kind, relation = "whole" if whole else "finite", "above" if above else "of at least"
            raise ValueError(
                f"`{name}` should be a {kind} number {relation} {bound} but the value passed is {value!r}"
            )
