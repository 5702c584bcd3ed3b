"""Changes of a model's adapters beside calls in other threads."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from ..calls.exclusion import changing
from ..model import lotra_model

Change = TypeVar("Change", bound=Callable[..., Any])


def beside_calls(change: Change) -> Change:
    """`change(model, ...)`, which waits for the calls of other threads that run, and for which calls wait."""

    @wraps(change)
    def waiting(model: Any, *args: Any, **kwargs: Any) -> Any:
        with changing(lotra_model(model).model):
            return change(model, *args, **kwargs)

    return waiting  # type: ignore[return-value]
