import math

import numpy as np
import pytest
import tensorly
import torch
from conftest import assert_equal, parts, tucker

from peft_lotra.tucker.decomposition import decompose, hosvd, parameter_count


def random_factors(ranks=(2, 3, 4), modes=(5, 6, 7), extra=(), dtype=torch.float64):
    shapes = [(*ranks, *extra), *zip(modes, ranks, strict=True)]
    return tucker(*(torch.randn(shape, dtype=dtype) for shape in shapes))


def test_dense_is_the_tucker_product():
    factors = random_factors()
    expected = tensorly.tucker_to_tensor((factors.core.numpy(), [U.numpy() for U in factors.factors.values()]))
    assert_equal(factors.dense(), torch.from_numpy(expected))


def test_dense_keeps_trailing_axes_in_the_core():
    core, U1, U2, U3, _ = parts(random_factors(extra=(3, 2)))
    expected = np.zeros((5, 6, 7, 3, 2))
    for h, w in np.ndindex(3, 2):
        expected[..., h, w] = tensorly.tucker_to_tensor(
            (core[..., h, w].numpy(), [U1.numpy(), U2.numpy(), U3.numpy()])
        )
    assert_equal(tucker(core, U1, U2, U3).dense(), torch.from_numpy(expected))


@pytest.mark.parametrize("extra", [(), (2, 3)])
def test_orthonormal_is_the_same_tensor(extra):
    factors = random_factors(extra=extra)
    result = factors.orthonormal()
    for before, after in zip(factors.tensors()[1:], result.tensors()[1:], strict=True):
        assert (before.T @ before - torch.eye(before.shape[1])).abs().max() > 1e-2
        assert_equal(after.T @ after, torch.eye(before.shape[1], dtype=before.dtype))
    expected = torch.einsum("abc...,ia,ob,dc->iod...", *factors.tensors())
    assert_equal(torch.einsum("abc...,ia,ob,dc->iod...", *result.tensors()), expected)
    for before, after in zip(
        result.tensors(), result.orthonormal().tensors(), strict=True
    ):  # what is orthonormal stays
        assert_equal(after, before)


def test_orthonormal_of_a_zero_factor_and_of_16_bits():
    core, U1, U2, U3, _ = parts(random_factors(dtype=torch.float32))
    result = tucker(core, U1, U2 * 0, U3).orthonormal()
    assert all(factor.isfinite().all() for factor in result.tensors())
    assert not result.dense().any()
    halves = tucker(*(factor.bfloat16() for factor in (core, U1, U2, U3)))
    assert {factor.dtype for factor in halves.orthonormal().tensors()} == {torch.bfloat16}


@pytest.mark.parametrize("extra", [(), (2, 3)])
def test_decompose_recovers_a_tensor_of_the_rank(extra):
    tensor = random_factors(extra=extra).dense()
    factors = decompose(tensor, (2, 3, 4))
    assert factors.core.shape == (2, 3, 4, *extra)
    assert_equal(factors.dense(), tensor, 1e-8)


def test_decompose_error_is_within_the_hosvd_bound():
    tensor = torch.randn(6, 5, 4, dtype=torch.float64)
    error = (decompose(tensor, (3, 3, 2)).dense() - tensor).norm()
    unfoldings = [tensor.movedim(mode, 0).flatten(1) for mode in range(3)]
    discarded = [torch.linalg.svdvals(u)[r:].square().sum() for u, r in zip(unfoldings, (3, 3, 2), strict=True)]
    assert max(discarded).sqrt() <= error <= sum(discarded).sqrt()


@pytest.mark.parametrize(
    ("shape", "ranks"), [((12, 1, 3), (7, 1, 3)), ((4, 5, 3, 2), (4, 1, 1)), ((3, 9, 2), (1, 4, 1))]
)
def test_a_rank_above_the_product_of_the_others_is_completed(shape, ranks):
    tensor = torch.randn(shape, dtype=torch.float64)
    factors = decompose(tensor, ranks)
    assert [factor.shape for factor in factors.tensors()[1:]] == list(zip(shape, ranks, strict=False))
    for U in factors.tensors()[1:]:
        assert_equal(U.T @ U, torch.eye(U.shape[1], dtype=U.dtype))
    least = [min(r, math.prod(ranks) // r * math.prod(shape[3:])) for r in ranks]
    assert least != list(ranks)
    assert_equal(factors.dense(), decompose(tensor, least).dense())


def test_decompose_zero():
    factors = decompose(torch.zeros(4, 3, 2), (2, 3, 1))
    assert not factors.core.any()
    assert all(torch.equal(U.T @ U, torch.eye(U.shape[1])) for U in factors.tensors()[1:])


@pytest.mark.parametrize("extra", [(), (3, 2)])
def test_hosvd(extra):
    tensor = torch.randn(5, 2, 3, *extra, dtype=torch.float64)
    factors, values = hosvd(tensor)
    assert_equal(factors.dense(), tensor)
    for mode, (U, sigma) in enumerate(zip(factors.tensors()[1:], values.values(), strict=True)):
        assert_equal(U.T @ U, torch.eye(U.shape[1], dtype=U.dtype))
        gram = torch.tensordot(tensor, tensor, dims=[[axis for axis in range(tensor.dim()) if axis != mode]] * 2)
        assert_equal(sigma.square(), torch.linalg.eigvalsh(gram).flip(0)[: len(sigma)])
        assert_equal(U @ torch.diag(sigma.square()) @ U.T, gram)


@pytest.mark.parametrize("extra", [(), (3, 2)])
def test_parameter_count_counts_what_the_factors_hold(extra):
    factors = random_factors(extra=extra)
    assert parameter_count((5, 6, 7, *extra), (2, 3, 4)) == sum(factor.numel() for factor in factors.tensors())
