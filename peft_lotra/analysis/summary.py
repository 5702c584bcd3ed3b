"""A table of the adapted tensors, their ranks, and how many numbers the adapters have."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from torch import nn

from ..files.adapter_file import PREFIX, is_tucker_key
from ..files.slots import slots_of
from ..layers.lotra import adapted_tensors
from ..placement.sharded import full_shape
from ..preserved import check_model
from ..tucker.decomposition import Ranks


class SummaryRow(NamedTuple):
    """One tensor that an adapter adapts, or trains directly.

    `layout`, `modes` and `ranks` are empty if the tensor is not a coefficient tensor.

    Attributes:
        adapter: the adapter's name.
        tensor: the full name of the coefficient parameter, or of codes, a bias, a copied module or a token row.
        layout: the layout of the parameter, such as "o (i d)".
        modes: the sizes (n, m, n_d, ...).
        ranks: (r1, r2, r3, ...), with None for a whole mode.
        trained: how many numbers training changes. Frozen factors do not count.
        stored: how many numbers the adapter's file has for the tensor.
    """

    adapter: str
    tensor: str
    layout: str
    modes: tuple[int, ...]
    ranks: Ranks | tuple[()]
    trained: int
    stored: int

    @property
    def size(self) -> int:
        """How many coefficients the tensor has; 0 if it is not a coefficient tensor."""
        return prod(self.modes) if self.modes else 0


class Summary(tuple[SummaryRow, ...]):
    """The rows of `summary`. They print as a table."""

    @property
    def totals(self) -> dict[str, tuple[int, int, int]]:
        """How many numbers are trained and stored, and how many coefficients are adapted, by adapter."""
        totals: dict[str, tuple[int, int, int]] = {}
        for row in self:
            trained, stored, size = totals.get(row.adapter, (0, 0, 0))
            totals[row.adapter] = trained + row.trained, stored + row.stored, size + row.size
        return totals

    def __str__(self) -> str:
        texts = [[*(str(cell) if cell else "" for cell in row[:5]), *(f"{n:,}" for n in row[5:])] for row in self]
        widths = [max(map(len, column)) for column in zip(SummaryRow._fields, *texts, strict=True)]
        lines = []
        for line in (SummaryRow._fields, *texts):
            cells = [cell.ljust(width) for cell, width in zip(line[:5], widths[:5], strict=True)]
            cells += [cell.rjust(width) for cell, width in zip(line[5:], widths[5:], strict=True)]
            lines.append("  ".join(cells))
        for name, (trained, stored, size) in self.totals.items():
            lines.append(f"{name}: {trained:,} trained and {stored:,} stored numbers for {size:,} coefficients")
        return "\n".join(lines)


def summary(model: nn.Module) -> Summary:
    """List what the LoTRA adapters of a model adapt: layouts, ranks, and how many numbers are trained and stored.

    >>> model = get_peft_model(ChebyshevKAN([2, 16, 1], degree=4), LoTRAConfig(r=3, coefficients=layouts))
    >>> print(summary(model))
    adapter  tensor                 layout  modes       ranks         trained  stored
    default  layers.0.coefficients  i o d   (2, 16, 5)  (None, 3, 3)       81      81
    default  layers.1.coefficients  i o d   (16, 1, 5)  (3, None, 3)       72      72
    default: 153 trained and 153 stored numbers for 240 coefficients
    >>> summary(model)[0].ranks
    (None, 3, 3)

    There is a row for every adapter and tensor, including the codes of tasks, biases, copied modules and token rows in
    the adapter's file. The config determines which numbers count as trained, whether or not the adapter is active or
    loaded for training. `model.print_trainable_parameters()` counts the parameters that require gradients at this
    moment.

    Args:
        model: any module with LoTRA adapters: a PeftModel, or a module around or inside it.

    Raises:
        TypeError: if `model` is not a torch.nn.Module.
        ValueError: if it has no LoTRA adapter.
    """
    check_model(model=model)
    layers = adapted_tensors(model)
    if not layers:
        raise ValueError(
            f"`model`, a {type(model).__name__}, has no LoTRA adapter: pass what "
            "`get_peft_model(model, LoTRAConfig(...))` returns"
        )
    configs = {}
    for module in model.modules():
        configs.update(vars(module).get("peft_config", {}))
    rows = []
    for name in dict.fromkeys(name for layer in layers.values() for name in layer.lotra_core):
        for tensor, layer in layers.items():
            if name in layer.lotra_core:
                sizes = {key: prod(full_shape(factor)) for key, factor in layer.tucker(name).named().items()}
                stored, frozen = sum(sizes.values()), layer.frozen_peft_weight_names.get(name, ())
                trained = stored - sum(size for key, size in sizes.items() if key in frozen)
                layout = layer.spec.layout
                rows.append(
                    SummaryRow(name, tensor, layout.pattern, layout.canonical_shape, layer.r[name], trained, stored)
                )
        for key, (_, slot) in slots_of(model, name, configs[name].bias if name in configs else "none").items():
            if not is_tucker_key(key):
                size = prod(slot.shape)
                rows.append(SummaryRow(name, key.removeprefix(PREFIX), "", (), (), size, size))
    return Summary(rows)
