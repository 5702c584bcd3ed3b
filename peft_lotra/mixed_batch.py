"""Rows of a batch taken out of a layer's arguments, and put together again from its results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten


def is_batched(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dim() > 0


def batch_rows(tree: Any, rows: Sequence[int], length: int) -> Any:
    """x[rows] for every tensor x of `length` rows in nested arguments; other values stay."""
    if len(rows) == length:
        return tree

    def taken(leaf: Any) -> Any:
        if not is_batched(leaf) or len(leaf) != length:
            return leaf
        return leaf.index_select(0, torch.tensor(rows, device=leaf.device))

    return tree_map(taken, tree)


def joined_batch(results: Sequence[Any], rows: Sequence[Sequence[int]]) -> Any:
    """One result from several: y with y[rows[j]] = results[j], for every tensor of nested results.

    A layer may have flattened leading axes into its rows; each sample then has as many rows as every other.

    Raises:
        ValueError: if results cannot be put together row by row.
    """
    if len(results) == 1:
        return results[0]
    leaves, specs = zip(*map(tree_flatten, results), strict=True)
    order = torch.tensor([row for part in rows for row in part]).argsort()

    def joined(parts: Sequence[Any]) -> Any:
        if not any(isinstance(part, torch.Tensor) for part in parts):
            if all(part == parts[0] for part in parts):
                return parts[0]
        elif all(is_batched(part) for part in parts):
            each = {divmod(len(part), len(own)) for part, own in zip(parts, rows, strict=True)}
            if len(each) == 1 and (size := each.pop())[1] == 0:
                whole = torch.cat(list(parts)).unflatten(0, (len(order), size[0]))
                return whole.index_select(0, order.to(whole.device)).flatten(0, 1)
        raise ValueError(
            "`adapter_names`: the layer returns values that do not belong to single samples; call the model once for "
            "each adapter, with `set_adapter`"
        )

    if any(spec != specs[0] for spec in specs):
        raise ValueError("`adapter_names`: the layer returns other structures for other samples")
    return tree_unflatten([joined(parts) for parts in zip(*leaves, strict=True)], specs[0])
