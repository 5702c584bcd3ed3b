"""Stand-ins that take the place of a coefficient parameter while the layer's own forward runs.

The adapter does not know how a layer evaluates its basis. It puts a stand-in where the layer looks for its parameter,
and the layer runs its own code with the stand-in. The rest of the package only says which updates are active.
"""

from .placing import (
    Adapted,
    adapted_coefficients,
    adapted_rows,
    check_dense,
    dense_update,
    forget,
    is_sharded,
    replaced,
    run_densely,
)
from .tensor import PerformanceWarning, warn
from .update import Update

__all__ = [
    "Adapted",
    "PerformanceWarning",
    "Update",
    "adapted_coefficients",
    "adapted_rows",
    "check_dense",
    "dense_update",
    "forget",
    "is_sharded",
    "replaced",
    "run_densely",
    "warn",
]
