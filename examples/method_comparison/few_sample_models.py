"""Networks for many tasks, which differ by a code z; how they are trained on tasks, and what they know of new ones."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from chebyshev_kan import ChebyshevKAN, chebyshev_basis
from few_sample_fits import Predict
from few_sample_tasks import Split
from peft import get_peft_model
from torch import Tensor, nn
from training import train_by_adam

from peft_lotra import LoTRAConfig, fit_gauss_newton

HIDDEN, DEGREE = (12, 12), 4
BATCH, LARGE_BATCH = 512, 1200  # samples of a step of Adam, and of Levenberg–Marquardt
Seconds = tuple[float, float]  # of CPU, by Adam and by Levenberg–Marquardt


def kan(inputs: int, outputs: int) -> ChebyshevKAN:
    return ChebyshevKAN((inputs, *HIDDEN, outputs), DEGREE)


def contracted(coefficients: Sequence[Tensor], x: Tensor) -> Tensor:
    """The KAN of these coefficients. shapes: (n, m, n_d) each, x (*batch, inputs) → (*batch, outputs)"""
    for A in coefficients:
        x = torch.einsum("...id,iod->...o", chebyshev_basis(torch.tanh(x), A.shape[-1] - 1), A)
    return x


def of_shapes(base: ChebyshevKAN) -> Callable[[Tensor, Tensor], Tensor]:
    """f(u, x), u all coefficients of such a KAN in one vector."""
    shapes = [layer.coefficients.shape for layer in base.layers]

    def predict(u: Tensor, x: Tensor) -> Tensor:
        parts = u.split([shape.numel() for shape in shapes])
        return contracted([part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)], x)

    return predict


class Coded(nn.Module):
    """f(x, z), with a table of codes of the tasks; or the tasks' places in it as z.

    Shapes: x (*batch, inputs), z (*batch, k) or (*batch,) → (*batch, outputs).
    """

    def __init__(self, tasks: int, k: int, size: float = 1.0) -> None:
        super().__init__()
        self.codes = nn.Parameter(size * torch.randn(tasks, k))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.at_codes(x, z if z.is_floating_point() else self.codes[z])

    def at(self, z: Tensor, x: Tensor) -> Tensor:
        """The same, of one code for all samples. shapes: z (k,), x (n, inputs)"""
        return self(x, z.expand(len(x), -1))


class CodeAsInputs(Coded):
    """A KAN of (x, z). MAD, arXiv 2302.08263, and DeepSDF before it."""

    def __init__(self, tasks: int, k: int, inputs: int, outputs: int) -> None:
        super().__init__(tasks, k, 0.5)
        self.kan = kan(inputs + k, outputs)

    def at_codes(self, x: Tensor, z: Tensor) -> Tensor:
        return self.kan(torch.cat([x, z], -1))


class LearnedBasis(Coded):
    """b_0(x) + Σ_j z_j b_j(x): DeepONet with a code in place of its branch."""

    def __init__(self, tasks: int, k: int, inputs: int, outputs: int) -> None:
        super().__init__(tasks, k)
        self.kan, self.k = kan(inputs, outputs * (k + 1)), k

    def at_codes(self, x: Tensor, z: Tensor) -> Tensor:
        basis = self.kan(x).unflatten(-1, (-1, self.k + 1))
        return basis[..., 0] + torch.einsum("...oj,...j->...o", basis[..., 1:], z)


class GEPS(Coded):
    """A + U diag(z) V in every layer, on A unfolded to (i d) × o. arXiv 2410.23889"""

    def __init__(self, tasks: int, k: int, inputs: int, outputs: int) -> None:
        super().__init__(tasks, k)
        self.base = nn.ParameterList([layer.coefficients for layer in kan(inputs, outputs).layers])
        self.U = nn.ParameterList([torch.randn(A.shape[0] * A.shape[2], k) * A.std() for A in self.base])
        self.V = nn.ParameterList([0.3 * torch.randn(k, A.shape[1]) for A in self.base])

    def at_codes(self, x: Tensor, z: Tensor) -> Tensor:
        for A, U, V in zip(self.base, self.U, self.V, strict=True):
            basis = chebyshev_basis(torch.tanh(x), DEGREE)
            x = torch.einsum("...id,iod->...o", basis, A) + ((basis.flatten(-2) @ U) * z) @ V
        return x

    def at(self, z: Tensor, x: Tensor) -> Tensor:
        updates = [((U * z) @ V).unflatten(0, (-1, DEGREE + 1)).mT for U, V in zip(self.U, self.V, strict=True)]
        return contracted([A + update for A, update in zip(self.base, updates, strict=True)], x)


class Known(CodeAsInputs):
    """A KAN of x and of what is known of a task."""

    def __init__(self, known: Tensor, seen: list[int], inputs: int, outputs: int) -> None:
        nn.Module.__init__(self)
        self.known, self.codes = known, known[seen]
        self.kan = kan(inputs + known.shape[1], outputs)


def batch_of(split: Split, source: torch.Generator, size: int = BATCH) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs and outputs of random samples of random tasks seen, and the tasks, by their place among those seen."""
    seen = torch.tensor(split.seen)
    i = torch.randint(len(seen), (size,), generator=source)
    j = torch.randint(len(split.x), (size,), generator=source)
    return split.x[j], split.y[seen[i], j], i


def fitted(
    split: Split, model: Any, outputs: Callable[[Any, Tensor, Tensor], Tensor], rate: float, seconds: Seconds
) -> Any:
    """A network fitted to the tasks seen, by Adam and then by Levenberg–Marquardt on new samples in each iteration.

    Args:
        outputs: of the network, inputs, and the tasks' places among those seen.
        seconds: of CPU, of each of the two.
    """
    source = torch.Generator().manual_seed(split.number)

    def residual(net: Any, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return outputs(net, batch[0], batch[2]) - batch[1]

    train_by_adam(
        model, lambda step: residual(model, batch_of(split, source)).square().mean(), rate, seconds=seconds[0]
    )
    start = time.process_time()
    if not seconds[1]:
        return model
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`data` give")
        fit_gauss_newton(
            model,
            residual,
            lambda iteration: batch_of(split, source, LARGE_BATCH),
            iterations=10**6,
            loss_tolerance=0,
            progressbar=False,
            callback=lambda now: time.process_time() - start > seconds[1],
        )
    return model


def coded(make: Callable[..., nn.Module], split: Split, rate: float, seconds: Seconds, k: int = 0) -> Any:
    """A network f(x, z) with its codes; of what is known, without k."""
    torch.manual_seed(split.number)
    sizes = {"tasks": len(split.seen), "k": k} if k else {"known": split.domain.known, "seen": split.seen}
    model = make(**sizes, inputs=split.x.shape[1], outputs=split.y.shape[2])
    return fitted(split, model, lambda net, x, i: net(x, i), rate, seconds)


def base(split: Split, rate: float, seconds: Seconds, pooled: bool = True) -> ChebyshevKAN:
    """One KAN on all tasks seen, or on the typical one."""
    torch.manual_seed(split.number)
    if not pooled:
        split = copy.copy(split)
        split.seen = [split.typical]
    return fitted(split, kan(split.x.shape[1], split.y.shape[2]), lambda net, x, i: net(x), rate, seconds)


def family(split: Split, k: int, rate: float, seconds: Seconds) -> nn.Module:
    """LoTRA's adapter of the tasks seen, with codes; the base is trained with it, from its random start."""
    torch.manual_seed(split.number)
    names = [split.domain.names[task] for task in split.seen]
    config = LoTRAConfig(
        r=(5, 5, None), coefficients={"coefficients": "i o d"}, family=names, family_code=k, family_degree=1
    )
    model = get_peft_model(kan(split.x.shape[1], split.y.shape[2]), config)
    for name, parameter in model.named_parameters():
        if "base_layer" in name:
            parameter.requires_grad_(True)
    fitted(split, model, lambda net, x, i: net(x, lotra_task=i), rate, seconds)
    return model.requires_grad_(False)


class Learned(NamedTuple):
    """What a method knows before the samples of a new task.

    Attributes:
        predict: f(u, x), u what the samples decide.
        centre: u without samples. shape: (K,)
        once: how many numbers were learned from the tasks seen.
        codes: u of each task seen, if it is a code. shape: (tasks, K)
        known: columns that go before the new task's inputs, by task. shape: (all tasks, numbers)
        other: what is not of this form.
    """

    predict: Predict
    centre: Tensor
    once: int
    codes: Tensor | None = None
    known: Tensor | None = None
    other: Any = None

    def extended(self, tasks: Tensor, x: Tensor) -> Tensor:
        """x, shape (B, n, inputs), with what is known of its tasks."""
        if self.known is None:
            return x
        columns = self.known[tasks].double()[:, None].expand(-1, x.shape[1], -1)
        return torch.cat([x, columns], -1)


def numbers(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def of_codes(model: nn.Module) -> Learned:
    once, model = numbers(model), model.double().requires_grad_(False)
    codes = model.codes.detach()
    return Learned(model.at, codes.mean(0), once, codes)


def of_family(model: nn.Module) -> Learned:
    once, model = numbers(model), model.double()
    (codes,) = [p.detach() for name, p in model.named_parameters() if "lotra_codes" in name]
    return Learned(lambda z, x: model(x, lotra_task={"code": z}), codes.mean(0), once, codes, other=model)


def of_weights(base: nn.Module, once: int | None = None, known: Tensor | None = None) -> Learned:
    """All coefficients."""
    flat = torch.cat([layer.coefficients.detach().double().flatten() for layer in base.layers])
    return Learned(of_shapes(base), flat, numbers(base) if once is None else once, known=known)


def of_adapter(base: nn.Module, r: int = 2) -> Learned:
    """G ×₁ U1 ×₂ U2 in every layer, the basis whole; G = 0 at the start, as in LoTRA."""
    tensors = [layer.coefficients.detach().double() for layer in base.layers]
    source, start, shapes = torch.Generator().manual_seed(0), [], []
    for n, m, n_d in (A.shape for A in tensors):
        r1, r2 = min(r, n), min(r, m)
        shapes += [(r1, r2, n_d), (n, r1), (m, r2)]
        start += [torch.zeros(r1, r2, n_d)]
        start += [torch.randn(size, rank, generator=source) / math.sqrt(size) for size, rank in ((n, r1), (m, r2))]
    centre = torch.cat([part.flatten() for part in start]).double()

    def predict(u: Tensor, x: Tensor) -> Tensor:
        parts = [p.reshape(shape) for p, shape in zip(u.split([math.prod(s) for s in shapes]), shapes, strict=True)]
        updates = [torch.einsum("abd,ia,ob->iod", *parts[k : k + 3]) for k in range(0, len(parts), 3)]
        return contracted([A + update for A, update in zip(tensors, updates, strict=True)], x)

    return Learned(predict, centre, numbers(base))
