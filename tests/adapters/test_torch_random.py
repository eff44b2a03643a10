"""What files leave to be drawn again is drawn as PyTorch draws it."""

from __future__ import annotations

import numpy as np
import pytest

from weightsmith.adapters.torch_random import normals, shuffled

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("seed", [0, 42, 777, 2**31, 2**32 + 5, 10**15, -3])
@pytest.mark.parametrize("size", [1, 2, 3, 17, 624, 1000, 4096 * 11, 3_000_017])
def test_the_start_of_a_permutation(size, seed):
    expected = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:700].tolist()
    assert list(shuffled(size, min(size, 700), seed)) == expected


@pytest.mark.parametrize("size", [1, 2, 100, 3000])
def test_a_whole_permutation(size):
    expected = torch.randperm(size, generator=torch.Generator().manual_seed(9)).tolist()
    assert list(shuffled(size, size, 9)) == expected


@pytest.mark.parametrize("seed", [0, 42, 2**40 + 1])
@pytest.mark.parametrize("count", [1, 2, 3, 15, 16, 17, 31, 32, 33, 256, 1000])
def test_normal_numbers(count, seed):
    expected = torch.randn(count, generator=torch.Generator().manual_seed(seed)).numpy()
    np.testing.assert_allclose(normals(count, seed), expected, rtol=1e-5, atol=2e-6)
