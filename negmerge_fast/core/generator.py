"""Philox4x32-10, the counter-based generator of random gates (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

choices.py says which counter and key belong to an element. csrc/family.h and the Triton kernel compute the same; the PyTorch backend
gives tensors to these functions.
"""

from __future__ import annotations

from typing import Any, TypeAlias

# An integer of 32 bits, or a tensor of such in int64: its products wrap at 64 bits, and of these all are needed.
Word: TypeAlias = Any

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_WORD = 0xFFFFFFFF


def philox(counter: tuple[Word, Word, Word, Word], key: tuple[int, int]) -> tuple[Word, Word, Word, Word]:
    """The four 32-bit numbers of a counter."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(_ROUNDS):
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        # The shift of a negative product brings in ones.
        a, b, c, d = second >> 32 & _WORD ^ b ^ k, second & _WORD, first >> 32 & _WORD ^ d ^ m, first & _WORD
        k, m = (k + _KEY_STEPS[0]) & _WORD, (m + _KEY_STEPS[1]) & _WORD
    return a, b, c, d


def numbers(seed: int, tensor: int, model: int, quad: Word) -> tuple[Word, Word, Word, Word]:
    """The numbers of elements 4 · quad … 4 · quad + 3 of a tensor in a model, each below 2^32."""
    return philox((quad & _WORD, quad >> 32, tensor, model), (seed & _WORD, seed >> 32))


def number(seed: int, tensor: int, model: int, element: int) -> int:
    """The number of an element."""
    found: int = numbers(seed, tensor, model, element // 4)[element % 4]
    return found
