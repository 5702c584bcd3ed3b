"""Networks for many tasks, which differ by a code z, and how they are trained on the tasks seen."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from chebyshev_kan import ChebyshevKAN, chebyshev_basis
from few_sample_tasks import Split
from peft import get_peft_model
from torch import Tensor, nn

from peft_lotra import LoTRAConfig, at_task

HIDDEN, DEGREE = (12, 12), 4
BATCH = 512  # samples of a step


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
    """f(x, z), with a table of codes of the tasks. shapes: x (*batch, inputs), z (*batch, k) → (*batch, outputs)"""

    def __init__(self, tasks: int, k: int, size: float = 1.0) -> None:
        super().__init__()
        self.codes = nn.Parameter(size * torch.randn(tasks, k))

    def at(self, z: Tensor, x: Tensor) -> Tensor:
        """The same, of one code for all samples. shapes: z (k,), x (n, inputs)"""
        return self(x, z.expand(len(x), -1))


class CodeAsInputs(Coded):
    """A KAN of (x, z). MAD, arXiv 2302.08263, and DeepSDF before it."""

    def __init__(self, tasks: int, k: int, inputs: int, outputs: int) -> None:
        super().__init__(tasks, k, 0.5)
        self.kan = kan(inputs + k, outputs)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.kan(torch.cat([x, z], -1))


class LearnedBasis(Coded):
    """b_0(x) + Σ_j z_j b_j(x): DeepONet with a code in place of its branch."""

    def __init__(self, tasks: int, k: int, inputs: int, outputs: int) -> None:
        super().__init__(tasks, k)
        self.kan, self.k = kan(inputs, outputs * (k + 1)), k

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        basis = self.kan(x).unflatten(-1, (-1, self.k + 1))
        return basis[..., 0] + torch.einsum("...oj,...j->...o", basis[..., 1:], z)


class CoDA(Coded):
    """A + Σ_j z_j W_j in every layer, W dense. arXiv 2202.01889"""

    def __init__(self, tasks: int, k: int, inputs: int, outputs: int) -> None:
        super().__init__(tasks, k)
        self.base = nn.ParameterList([layer.coefficients for layer in kan(inputs, outputs).layers])
        self.W = nn.ParameterList([0.1 * torch.randn(k, *A.shape) * A.std() for A in self.base])

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        weights = torch.cat([torch.ones_like(z[..., :1]), z], -1)
        for A, W in zip(self.base, self.W, strict=True):
            basis = chebyshev_basis(torch.tanh(x), DEGREE)
            x = torch.einsum("...id,...k,kiod->...o", basis, weights, torch.cat([A[None], W]))
        return x

    def at(self, z: Tensor, x: Tensor) -> Tensor:
        return contracted([A + torch.einsum("k,kiod->iod", z, W) for A, W in zip(self.base, self.W, strict=True)], x)


class GEPS(Coded):
    """A + U diag(z) V in every layer, on A unfolded to (i d) × o. arXiv 2410.23889"""

    def __init__(self, tasks: int, k: int, inputs: int, outputs: int) -> None:
        super().__init__(tasks, k)
        self.base = nn.ParameterList([layer.coefficients for layer in kan(inputs, outputs).layers])
        self.U = nn.ParameterList([torch.randn(A.shape[0] * A.shape[2], k) * A.std() for A in self.base])
        self.V = nn.ParameterList([0.3 * torch.randn(k, A.shape[1]) for A in self.base])

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        for A, U, V in zip(self.base, self.U, self.V, strict=True):
            basis = chebyshev_basis(torch.tanh(x), DEGREE)
            x = torch.einsum("...id,iod->...o", basis, A) + ((basis.flatten(-2) @ U) * z) @ V
        return x

    def at(self, z: Tensor, x: Tensor) -> Tensor:
        updates = [((U * z) @ V).unflatten(0, (-1, DEGREE + 1)).mT for U, V in zip(self.U, self.V, strict=True)]
        return contracted([A + update for A, update in zip(self.base, updates, strict=True)], x)


class Known(nn.Module):
    """A KAN of x and of what is known of a task."""

    def __init__(self, known: Tensor, seen: list[int], inputs: int, outputs: int) -> None:
        super().__init__()
        self.known, self.codes = known, known[seen]
        self.kan = kan(inputs + known.shape[1], outputs)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.kan(torch.cat([x, z], -1))


def batch_of(split: Split, source: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Random tasks seen, by their place among them, and a sample of each."""
    seen = torch.tensor(split.seen)
    i = torch.randint(len(seen), (BATCH,), generator=source)
    j = torch.randint(len(split.x), (BATCH,), generator=source)
    return i, split.x[j], split.y[seen[i], j]


def train(model: nn.Module, loss: Callable[[], Tensor], rate: float, seconds: float) -> None:
    """Adam on what is trainable, at a rate that falls to zero by a cosine over so many CPU seconds."""
    optimizer, start = torch.optim.Adam([p for p in model.parameters() if p.requires_grad]), time.process_time()
    while (part := (time.process_time() - start) / seconds) < 1:
        optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * part)) / 2
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def trained_on_tasks(split: Split, make: Callable[..., nn.Module], rate: float, seconds: float, **sizes: Any) -> Any:
    """A network f(x, z) with its codes, on the tasks seen."""
    torch.manual_seed(split.number)
    source, ends = torch.Generator().manual_seed(split.number), (split.x.shape[1], split.y.shape[2])
    model = make(**sizes, inputs=ends[0], outputs=ends[1])

    def loss() -> Tensor:
        i, x, y = batch_of(split, source)
        return (model(x, model.codes[i]) - y).square().mean()

    train(model, loss, rate, seconds)
    return model


def coded(make: type[Coded], split: Split, k: int, rate: float, seconds: float) -> Coded:
    return trained_on_tasks(split, make, rate, seconds, tasks=len(split.seen), k=k)


def known(split: Split, rate: float, seconds: float) -> Known:
    return trained_on_tasks(split, Known, rate, seconds, known=split.domain.known, seen=split.seen)


def base(split: Split, rate: float, seconds: float, pooled: bool = True) -> ChebyshevKAN:
    """One KAN on all tasks seen, or on the typical one."""
    torch.manual_seed(split.number)
    source, model = torch.Generator().manual_seed(split.number), kan(split.x.shape[1], split.y.shape[2])

    def loss() -> Tensor:
        x, y = batch_of(split, source)[1:] if pooled else (split.x, split.y[split.typical])
        return (model(x) - y).square().mean()

    train(model, loss, rate, seconds)
    return model


def family(
    split: Split, k: int, rate: float, seconds: float, r: Any = (5, 5, None), degree: int = 1, joint: bool = True
) -> nn.Module:
    """LoTRA's adapter of the tasks seen, with codes. On a base that was trained on all of them before, in half of the
    seconds, which stays as it is; or that is trained with the adapter from its random start."""
    torch.manual_seed(split.number)
    start = kan(split.x.shape[1], split.y.shape[2]) if joint else base(split, rate, seconds / 2)
    names = [split.domain.names[task] for task in split.seen]
    config = LoTRAConfig(
        r=r, coefficients={"coefficients": "i o d"}, family=names, family_code=k, family_degree=degree
    )
    model, source = get_peft_model(copy.deepcopy(start), config), torch.Generator().manual_seed(split.number)
    for name, parameter in model.named_parameters():
        if joint and "base_layer" in name:
            parameter.requires_grad_(True)

    def loss() -> Tensor:
        i, x, y = batch_of(split, source)
        with at_task(model, task=i):
            return (model(x) - y).square().mean()

    train(model, loss, rate, seconds if joint else seconds / 2)
    return model.requires_grad_(False)
