"""Philox4x32-10, the counter-based generator of random gates (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

choices.py says which counter and key belong to an element. csrc/family.h, the Triton kernel and the PyTorch backend compute the same.
"""

from __future__ import annotations

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_WORD = 0xFFFFFFFF


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """The four 32-bit numbers of a counter."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(_ROUNDS):
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = second >> 32 ^ b ^ k, second & _WORD, first >> 32 ^ d ^ m, first & _WORD
        k, m = (k + _KEY_STEPS[0]) & _WORD, (m + _KEY_STEPS[1]) & _WORD
    return a, b, c, d


def number(seed: int, tensor: int, model: int, element: int) -> int:
    """The number of an element of a tensor in a model, below 2^32."""
    counter = element // 4 & _WORD, element // 4 >> 32, tensor, model
    return philox(counter, (seed & _WORD, seed >> 32))[element % 4]
