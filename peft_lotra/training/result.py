"""What a second-order fit returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class GaussNewtonResult:
    """The result of a fit, in plain values that JSON can hold. `resume_from=` continues from it.

    Attributes:
        losses: the loss at the start, and after every iteration on the points of that iteration. It is empty if the
            fit was interrupted before the first loss was known.
        damping: λ for the next iteration.
        iterations: the number of iterations done, with those of the fit that was resumed.
        reason: why the fit ended: "iterations", "gradient", "loss", "damping" (no step reduces the loss any more),
            "not finite" (residuals or derivatives after the first iteration), "seconds", "callback", "validation" or
            "interrupted". In a callback it is "running".
        validation_losses: what `validation` gives at the start and after every iteration.
        parameters: values of θ that a resumed fit needs and the model does not hold: "start" with `weight_decay`,
            "last" and "best" with validation.
        fingerprint: of the model, the data and the other arguments, by name: what has to be the same to go on.
    """

    losses: tuple[float, ...]
    damping: float
    iterations: int
    reason: str
    validation_losses: tuple[float, ...] = ()
    parameters: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    fingerprint: Mapping[str, str] = field(default_factory=dict)
