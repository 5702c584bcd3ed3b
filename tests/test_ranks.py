import math
import re

import pytest

from peft_lotra.ranks import choose_ranks, ranks_for_budget
from peft_lotra.tucker import parameter_count

SHAPES = {"first": (2, 32, 8), "middle": (32, 32, 8), "last": (32, 1, 8)}
TOTAL = sum(math.prod(shape) for shape in SHAPES.values())


def cost(ranks, shapes=SHAPES):
    return sum(parameter_count(shapes[name], ranks[name]) for name in shapes)


@pytest.mark.parametrize("ratio", [1 / 16, 0.1, 1 / 8, 1 / 4, 1 / 2, 1.0])
def test_compression_ratio_is_a_budget(ratio):
    ranks = choose_ranks(SHAPES, {}, None, ratio)
    assert cost(ranks) <= ratio * TOTAL
    assert all(1 <= r <= size for name in SHAPES for r, size in zip(ranks[name], SHAPES[name][:3], strict=True))


def test_a_tenth_unless_said_otherwise():
    assert choose_ranks(SHAPES, {}, None, None) == choose_ranks(SHAPES, {}, None, 0.1)
    fixed = {name: (1, 1, 1) for name in SHAPES}
    assert choose_ranks(SHAPES, fixed | {"middle": (16, 16, 8)}, None, None)["middle"] == (16, 16, 8)
    with pytest.raises(ValueError, match="`compression_ratio`=0.1 allows 896"):
        choose_ranks(SHAPES, fixed | {"middle": (16, 16, 8)}, None, 0.1)


def test_budget_takes_the_largest_t_that_fits():
    """Against a scan of t on a fine grid."""
    shapes = [(7, 13, 5), (13, 4, 5, 3, 3)]
    for budget in (150, 313, 500, 777):
        best = None
        for t in (k / 20000 for k in range(20001)):
            ranks = [tuple(max(1, math.floor(t * size + 0.5)) for size in shape[:3]) for shape in shapes]
            if sum(map(parameter_count, shapes, ranks)) <= budget:
                best = ranks
        assert ranks_for_budget(shapes, budget) == best


def test_kernel_axes_count_towards_the_budget():
    with_kernel = ranks_for_budget([(16, 16, 8, 3, 3)], 2000)
    assert parameter_count((16, 16, 8, 3, 3), with_kernel[0]) <= 2000
    assert with_kernel < ranks_for_budget([(16, 16, 8)], 2000)


def test_r_is_clipped_to_the_modes():
    assert choose_ranks(SHAPES, {}, 4, None) == {"first": (2, 4, 4), "middle": (4, 4, 4), "last": (4, 1, 4)}
    assert choose_ranks(SHAPES, {}, (8, 8, 4), None) == {"first": (2, 8, 4), "middle": (8, 8, 4), "last": (8, 1, 4)}
    # the parameter count stated for this network and rank in the project's notes
    assert cost(choose_ranks(SHAPES, {}, (8, 8, 4), None)) == 1477


def test_fixed_ranks_are_exact_and_spend_the_budget():
    ranks = choose_ranks(SHAPES, {"middle": (8, 8, 4)}, None, 0.2)
    assert ranks["middle"] == (8, 8, 4)
    assert cost(ranks) <= 0.2 * TOTAL
    assert choose_ranks(SHAPES, {"last": 1}, 2, None)["last"] == (1, 1, 1)


@pytest.mark.parametrize(
    ("fixed", "r", "ratio", "message"),
    [
        ({"last": (1, 2, 1)}, 1, None, "`rank_pattern` gives last the ranks (1, 2, 1), above its modes"),
        ({}, 33, None, "`r`=33 is above the modes (input, output, basis) of every layer; the largest are (32, 32, 8)"),
        ({}, (2, 2, 9), None, "`r`=(2, 2, 9) is above the modes"),
        ({}, None, 0.01, "`compression_ratio`=0.01 allows 89 parameters for the 8960 coefficients of 3 tensors, but "),
        ({"middle": (32, 32, 8)}, None, 0.5, "the ranks of `rank_pattern`, and (1, 1, 1) elsewhere, need 10389"),
    ],
)
def test_errors(fixed, r, ratio, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        choose_ranks(SHAPES, fixed, r, ratio)


def test_the_least_ratio_named_by_the_error_works():
    with pytest.raises(ValueError, match="rank") as error:
        choose_ranks(SHAPES, {}, None, 0.01)
    least = float(re.search(r"at least ([\d.]+)", str(error.value)).group(1))
    assert set(choose_ranks(SHAPES, {}, None, least).values()) == {(1, 1, 1)}
