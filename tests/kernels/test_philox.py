"""The generator is held against the known answers that its authors publish with Random123."""

from __future__ import annotations

import numpy as np

from weightsmith.kernels import philox


def words(counter: list[int], key: tuple[int, int]) -> list[int]:
    return philox.philox4x32(np.array([counter], np.uint64), key)[0].tolist()


def test_known_answers():
    ones = 0xFFFFFFFF
    assert words([0] * 4, (0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert words([ones] * 4, (ones, ones)) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert words([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], (0xA4093822, 0x299F31D0)) == [
        0xD16CFE09,
        0x94FDCCEB,
        0x5001E420,
        0x24126EA1,
    ]


def test_a_stretch_is_the_same_however_it_is_cut():
    key = philox.key_of(7, "tensor", "model")
    whole = philox.uniform(key, 0, 1000)
    cut = [philox.uniform(key, a, b) for a, b in [(0, 1), (1, 3), (3, 333), (333, 334), (334, 1000)]]
    np.testing.assert_array_equal(np.concatenate(cut), whole)
    far = philox.uniform(key, 2**40, 2**40 + 5)
    np.testing.assert_array_equal(philox.uniform(key, 2**40 + 3, 2**40 + 5), far[3:])


def test_numbers_are_uniform_and_keys_are_independent():
    one = philox.uniform(philox.key_of(0, "a"), 0, 1 << 16)
    other = philox.uniform(philox.key_of(0, "b"), 0, 1 << 16)
    assert one.min() >= 0
    assert one.max() < 1
    assert abs(one.mean() - 0.5) < 0.005
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.02
    counts = np.histogram(one, 64, (0, 1))[0]
    # Chi-square with 63 degrees of freedom: 110 is beyond the 99.9th percentile.
    assert ((counts - 1024) ** 2 / 1024).sum() < 110
