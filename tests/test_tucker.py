import numpy as np
import pytest
import tensorly
import torch
from conftest import assert_equal

from peft_lotra.tucker import TuckerFactors, decompose, parameter_count, reconstruct


def random_factors(ranks=(2, 3, 4), modes=(5, 6, 7), extra=(), dtype=torch.float64):
    shapes = [(*ranks, *extra), *zip(modes, ranks, strict=True)]
    return TuckerFactors(*(torch.randn(shape, dtype=dtype) for shape in shapes))


def test_reconstruct_is_the_tucker_product():
    factors = random_factors()
    expected = tensorly.tucker_to_tensor((factors.core.numpy(), [factor.numpy() for factor in factors[1:]]))
    assert_equal(reconstruct(factors), torch.from_numpy(expected))


def test_reconstruct_keeps_trailing_axes_in_the_core():
    core, U1, U2, U3 = random_factors(extra=(3, 2))
    expected = np.zeros((5, 6, 7, 3, 2))
    for h, w in np.ndindex(3, 2):
        expected[..., h, w] = tensorly.tucker_to_tensor(
            (core[..., h, w].numpy(), [U1.numpy(), U2.numpy(), U3.numpy()])
        )
    assert_equal(reconstruct(TuckerFactors(core, U1, U2, U3)), torch.from_numpy(expected))


@pytest.mark.parametrize("extra", [(), (2, 3)])
def test_decompose_recovers_a_tensor_of_the_rank(extra):
    tensor = reconstruct(random_factors(extra=extra))
    factors = decompose(tensor, (2, 3, 4))
    assert factors.core.shape == (2, 3, 4, *extra)
    assert_equal(reconstruct(factors), tensor, 1e-8)


def test_decompose_error_is_within_the_hosvd_bound():
    tensor = torch.randn(6, 5, 4, dtype=torch.float64)
    error = (reconstruct(decompose(tensor, (3, 3, 2))) - tensor).norm()
    unfoldings = [tensor.movedim(mode, 0).flatten(1) for mode in range(3)]
    discarded = [torch.linalg.svdvals(u)[r:].square().sum() for u, r in zip(unfoldings, (3, 3, 2), strict=True)]
    assert max(discarded).sqrt() <= error <= sum(discarded).sqrt()


@pytest.mark.parametrize("extra", [(), (3, 2)])
def test_parameter_count_counts_what_the_factors_hold(extra):
    factors = random_factors(extra=extra)
    assert parameter_count((5, 6, 7, *extra), (2, 3, 4)) == sum(factor.numel() for factor in factors)
