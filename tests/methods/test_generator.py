"""The generator: known answers, and that it is the same for integers and tensors."""

from __future__ import annotations

import pytest
import torch

from negmerge_fast.core.generator import number, numbers, philox

ONES = 0xFFFFFFFF

# Of Random123, kat_vectors, philox4x32 with 10 rounds: zeros, ones, and the digits of pi.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, int, int, int]
) -> None:
    assert philox(counter, key) == expected
    a, b, c, d = (torch.tensor([word], dtype=torch.int64) for word in counter)
    assert tuple(int(word) for word in philox((a, b, c, d), key)) == expected


@pytest.mark.parametrize("element", [0, 1, 7, (1 << 34) - 1, 1 << 34, (1 << 45) + 2])
def test_which_counter_and_key_belong_to_an_element(element: int) -> None:
    seed, tensor, model = 0x0123456789ABCDEF, 0x89ABCDEF, 3
    counter = (element >> 2) & ONES, element >> 34, tensor, model
    expected = philox(counter, (0x89ABCDEF, 0x01234567))[element & 3]
    assert number(seed, tensor, model, element) == expected
    quads = torch.tensor([element >> 2], dtype=torch.int64)
    assert int(numbers(seed, tensor, model, quads)[element & 3]) == expected


def test_numbers_are_spread_evenly() -> None:
    """Each bit of the four words is set in half of the numbers, within five standard errors."""
    words = torch.stack(numbers(0, 1, 2, torch.arange(10_000)))
    assert int(words.min()) >= 0 and int(words.max()) <= ONES
    for bit in range(32):
        counts = (words >> bit & 1).sum(1)
        assert ((counts - 5000).abs() <= 250).all(), bit
