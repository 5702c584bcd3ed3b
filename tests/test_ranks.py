import itertools
import math
import re

import pytest
import torch
from conftest import tucker

from peft_lotra.tucker.decomposition import parameter_count
from peft_lotra.tucker.ranks import choose_ranks, clipped, ranks_for_budget, suggest_ranks
from peft_lotra.tucker.spectrum import Spectrum

SHAPES = {"first": (2, 32, 8), "middle": (32, 32, 8), "last": (32, 1, 8)}
TOTAL = sum(math.prod(shape) for shape in SHAPES.values())


def cost(ranks, shapes=SHAPES):
    return sum(parameter_count(shapes[name], ranks[name]) for name in shapes)


@pytest.mark.parametrize("ratio", [1 / 16, 0.1, 1 / 8, 1 / 4, 1 / 2, 1.0])
def test_compression_ratio_is_a_budget(ratio):
    ranks = choose_ranks(SHAPES, {}, None, ratio)
    assert cost(ranks) <= ratio * TOTAL
    assert all(r is None or 1 <= r < n for name in SHAPES for r, n in zip(ranks[name], SHAPES[name], strict=True))


def test_a_tenth_unless_said_otherwise():
    assert choose_ranks(SHAPES, {}, None, None) == choose_ranks(SHAPES, {}, None, 0.1)
    fixed = {name: (1, 1, 1) for name in SHAPES}
    assert choose_ranks(SHAPES, fixed | {"middle": (16, 16, 8)}, None, None)["middle"] == (16, 16, None)
    with pytest.raises(ValueError, match="`compression_ratio`=0.1 allows 896"):
        choose_ranks(SHAPES, fixed | {"middle": (16, 16, 8)}, None, 0.1)


def at(shape, r):
    """r in every mode that is longer; for 1 the cheapest of whole modes and rank 1."""
    if r > 1:
        return tuple(None if r >= size else r for size in shape[:3])
    choices = itertools.product(*([None] if size == 1 else [1, None] for size in shape[:3]))
    return min(choices, key=lambda ranks: parameter_count(shape, ranks))


@pytest.mark.parametrize("budget", [150, 313, 500, 777, 1800, 10**4])
def test_budget_takes_the_largest_rank_that_fits(budget):
    """Equal ranks at least, and no tensor's rank can be raised beside the others."""
    shapes = [(7, 13, 5), (13, 4, 5, 3, 3), (2, 13, 5)]

    def total(ranks):
        return sum(map(parameter_count, shapes, ranks))

    chosen = ranks_for_budget(shapes, budget)
    assert total(chosen) <= budget
    equal = max(r for r in range(1, 14) if total([at(shape, r) for shape in shapes]) <= budget)
    levels = []
    for shape, ranks in zip(shapes, chosen, strict=True):
        same = [r for r in range(equal, max(shape[:3]) + 1) if at(shape, r) == ranks]
        assert same
        levels.append(same[-1])
    for k, shape in enumerate(shapes):
        if levels[k] < max(shape[:3]):
            assert total([*chosen[:k], at(shape, levels[k] + 1), *chosen[k + 1 :]]) > budget


def test_small_layers_get_rank_four_unless_said_otherwise():
    shapes = {"first": (2, 8, 8), "middle": (8, 8, 8), "last": (8, 1, 8), "tiny": (2, 5, 4)}
    found = choose_ranks(shapes, {}, None, None)
    assert found["first"] == (None, 4, None)
    assert found["middle"] == (4, 4, None)
    assert found["last"] == (None, None, None)
    assert found["tiny"] == (None, None, None)
    wide = shapes | {"wide": (128, 128, 8)}
    assert min(choose_ranks(wide, {}, None, None)["wide"][:2]) > 4
    assert choose_ranks(shapes, {"middle": (1, 1, 1)}, None, None)["middle"] == (1, 1, 1)
    assert max(r or 0 for r in choose_ranks(shapes, {}, None, 0.2)["middle"]) < 4


def test_short_modes_keep_a_rank():
    """Ranks in proportion to the modes would be (1, 6, 1), (6, 6, 1), (6, 1, 1) here."""
    ranks = choose_ranks(SHAPES, {}, None, 0.1)
    assert ranks == {"first": (None, 5, 5), "middle": (4, 4, 4), "last": (6, None, 6)}
    assert cost(ranks) == 878 <= 0.1 * TOTAL


def test_kernel_axes_count_towards_the_budget():
    with_kernel = ranks_for_budget([(16, 16, 8, 3, 3)], 2000)
    assert parameter_count((16, 16, 8, 3, 3), with_kernel[0]) <= 2000
    without = ranks_for_budget([(16, 16, 8)], 2000)
    assert parameter_count((16, 16, 8), with_kernel[0]) < parameter_count((16, 16, 8), without[0])


def test_r_is_clipped_to_the_modes():
    assert choose_ranks(SHAPES, {}, 4, None) == {"first": (None, 4, 4), "middle": (4, 4, 4), "last": (4, None, 4)}
    expected = {"first": (None, 8, 4), "middle": (8, 8, 4), "last": (8, None, 4)}
    assert choose_ranks(SHAPES, {}, (8, 8, 4), None) == expected
    assert choose_ranks(SHAPES, {}, (8, None, 4), None)["middle"] == (8, None, 4)
    assert choose_ranks({"kernel": (5, 6, 4, 3, 3)} | SHAPES, {}, (8, 8, 4, 3), None) == expected | {
        "kernel": (None, None, None, 3)
    }
    # the count in the project's notes, of factors of full size too, less those: 2·2 and 1·1
    assert cost(choose_ranks(SHAPES, {}, (8, 8, 4), None)) == 1477 - 4 - 1


def test_fixed_ranks_are_exact_and_spend_the_budget():
    ranks = choose_ranks(SHAPES, {"middle": (8, 8, 4)}, None, 0.2)
    assert ranks["middle"] == (8, 8, 4)
    assert cost(ranks) <= 0.2 * TOTAL
    assert choose_ranks(SHAPES, {"last": 1}, 2, None)["last"] == (1, None, 1)


@pytest.mark.parametrize(
    ("fixed", "r", "ratio", "message"),
    [
        ({"last": (1, 2, 1)}, 1, None, "`rank_pattern` gives last the ranks (1, 2, 1), above its modes"),
        ({}, 33, None, "`r`=33 is above the modes (input, output, basis) of every layer; the largest are (32, 32, 8)"),
        ({}, (2, 2, 9), None, "`r`=(2, 2, 9) is above the modes"),
        ({}, None, 0.01, "`compression_ratio`=0.01 allows 89 parameters for the 8960 coefficients of 3 tensors, but "),
        ({"middle": (32, 32, 8)}, None, 0.5, "the ranks of `rank_pattern`, and rank 1 elsewhere, need 8274"),
    ],
)
def test_errors(fixed, r, ratio, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        choose_ranks(SHAPES, fixed, r, ratio)


def test_the_least_ratio_named_by_the_error_works():
    with pytest.raises(ValueError, match="rank") as error:
        choose_ranks(SHAPES, {}, None, 0.01)
    least = float(re.search(r"at least ([\d.]+)", str(error.value)).group(1))
    assert choose_ranks(SHAPES, {}, None, least) == {name: at(shape, 1) for name, shape in SHAPES.items()}


def decaying(*shape, rate=0.5):
    """A tensor whose entries fall off along every mode."""
    weights = [torch.exp(-rate * torch.arange(size)) for size in shape[:3]]
    scale = torch.einsum("i,o,d->iod", *weights).reshape(*shape[:3], *(1 for _ in shape[3:]))
    turns = [torch.linalg.qr(torch.randn(size, size)).Q for size in shape[:3]]
    return tucker(torch.randn(shape) * scale, *turns).dense().double()


def truncated(tensor, ranks):
    """A projected on its leading left singular vectors in every mode: the truncated HOSVD."""
    result = tensor
    for mode, r in enumerate(tensor.shape[k] if r is None else r for k, r in enumerate(ranks)):
        unfolding = tensor.movedim(mode, 0).flatten(1)
        U = torch.linalg.eigh(unfolding @ unfolding.T).eigenvectors.flip(1)[:, :r]
        result = torch.tensordot(U @ U.T, result, dims=([1], [mode])).movedim(0, mode)
    return result


def error(updates, ranks):
    return math.sqrt(sum((truncated(a, ranks[name]) - a).square().sum().item() for name, a in updates.items()))


@pytest.mark.parametrize("energy", [None, 0.5, 0.9, 1])
def test_suggested_ranks_keep_the_energy_at_least_cost(energy):
    updates = {"first": decaying(3, 6, 4), "kernel": decaying(5, 2, 3, 2, 2)}
    ranks = suggest_ranks(updates, energy=energy)
    share = (1 - (0.99 if energy is None else energy)) * (1 + 1e-9) + 1e-12
    for name, update in updates.items():
        kept = {
            triple: (truncated(update, triple) - update).square().sum() <= share * update.square().sum()
            for triple in itertools.product(*(range(1, size + 1) for size in update.shape[:3]))
        }
        assert kept[tuple(size if r is None else r for r, size in zip(ranks[name], update.shape, strict=False))]
        cost = parameter_count(update.shape, ranks[name])
        choices = [clipped(triple, update.shape) for triple, enough in kept.items() if enough]
        assert cost == min(parameter_count(update.shape, triple) for triple in choices)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.4, 0.8])
def test_suggested_ranks_beat_the_uniform_ones(share):
    updates = {
        name: scale * decaying(*SHAPES[name], rate=0.2) for name, scale in zip(SHAPES, (1, 3, 0.2), strict=True)
    }
    uniform = choose_ranks(SHAPES, {}, None, share)
    suggested = suggest_ranks(updates, budget=int(share * TOTAL))
    assert cost(suggested) <= share * TOTAL
    assert error(updates, suggested) < error(updates, uniform)


def test_suggested_ranks_are_nearly_the_best_of_all():
    """Against every choice of ranks for two small tensors."""
    updates = {"a": decaying(3, 4, 3), "b": 0.5 * decaying(4, 2, 3)}
    shapes = {name: tuple(update.shape) for name, update in updates.items()}
    every = [list(itertools.product(*(range(1, size + 1) for size in shape))) for shape in shapes.values()]
    spectra = {name: Spectrum.of(update) for name, update in updates.items()}
    for budget in (21, 25, 40, 50):
        best = math.sqrt(
            min(
                spectra["a"].truncation_error(a) ** 2 + spectra["b"].truncation_error(b) ** 2
                for a, b in itertools.product(*every)
                if sum(parameter_count(shapes[k], clipped(r, shapes[k])) for k, r in (("a", a), ("b", b))) <= budget
            )
        )
        assert error(updates, suggest_ranks(spectra, budget=budget)) <= 1.15 * best


@pytest.mark.parametrize("kwargs", [{}, {"energy": 1}, {"budget": 700}])
def test_a_zero_update_gets_the_fewest_numbers(kwargs):
    updates = {"zero": torch.zeros(6, 5, 4), "one mode": torch.zeros(8, 4, 4), "other": decaying(8, 8, 4)}
    updates["one mode"][:, 2] = torch.randn(8, 4)
    ranks = suggest_ranks(updates, **kwargs)
    assert parameter_count((6, 5, 4), ranks["zero"]) == parameter_count((6, 5, 4), at((6, 5, 4), 1))
    assert ranks["one mode"][1] == 1
    assert None in ranks["other"] or ranks["other"] > (1, 1, 1)


@pytest.mark.parametrize(
    ("updates", "kwargs", "message"),
    [
        ({}, {}, "`updates` should map parameter names"),
        ({"a": None}, {}, "`updates['a']` should be a real floating-point tensor, got None"),
        ({"a": torch.ones(3, 4)}, {}, "`updates['a']` should have the axes (input, output, basis, ...), got (3, 4)"),
        ({"a": torch.full((2, 2, 2), math.nan)}, {}, "`updates['a']` has NaN or infinity"),
        ({"a": torch.ones(2, 2, 2)}, {"energy": 0.5, "budget": 9}, "give `energy` or `budget`, not both"),
        ({"a": torch.ones(2, 2, 2)}, {"energy": 0}, "`energy` should be a number in (0, 1] but the value passed is 0"),
        ({"a": torch.ones(2, 2, 2)}, {"budget": 0.1}, "`budget` should be an integer"),
        ({"a": torch.ones(2, 2, 2)}, {"budget": 5}, "`budget`=5 is too small: rank 1 everywhere needs 6"),
    ],
)
def test_errors_of_suggested_ranks(updates, kwargs, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        suggest_ranks(updates, **kwargs)
