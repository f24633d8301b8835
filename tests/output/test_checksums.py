"""Checksums: the same for any chunks, order, number of threads and of processes."""

from __future__ import annotations

import itertools
import pickle
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_128_digest, xxh3_128_hexdigest

from negmerge_fast.core.hashing import hash_of
from negmerge_fast.output import checksums
from negmerge_fast.output.checksums import BLOCK, Checksums
from negmerge_fast.streaming import budget

SMALL = 64


def expected_checksum(content: bytes, block: int = SMALL) -> str:
    """The definition, without any optimisation."""
    digests = [xxh3_128_digest(content[at : at + block]) for at in range(0, len(content), block)]
    return "xxh3_128:" + xxh3_128_hexdigest(b"".join(digests))


def content_of(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def ranges(size: int, cuts: list[int]) -> list[tuple[int, int]]:
    ends = [0, *sorted(cuts), size]
    return [(begin, end) for begin, end in itertools.pairwise(ends) if begin < end]


@st.composite
def cut_file(draw: st.DrawFn) -> tuple[bytes, list[tuple[int, int]]]:
    size = draw(st.one_of(st.integers(0, 6 * SMALL), st.sampled_from([SMALL, 5 * SMALL])))
    cuts = draw(st.lists(st.integers(0, size), max_size=12))
    return content_of(size), draw(st.permutations(ranges(size, cuts)))


@settings(deadline=None, derandomize=True, max_examples=300)
@given(cut_file())
def test_any_chunks_in_any_order(case: tuple[bytes, list[tuple[int, int]]]) -> None:
    content, order = case
    sums = Checksums({"a": len(content), "b": 0}, SMALL)
    buffer = bytearray(len(content))
    for begin, end in order:
        assert list(sums.gaps("a")), "known before it has come"
        buffer[begin:end] = content[begin:end]
        sums.add("a", begin, memoryview(buffer)[begin:end])
        buffer[begin:end] = bytes(end - begin)  # the caller may overwrite it at once
    assert not list(sums.gaps("a")) and not sums._files["a"]._parts
    assert sums.of("a") == expected_checksum(content) and sums.of("b") == expected_checksum(b"")


def test_the_usual_block() -> None:
    content = content_of(3 * BLOCK + 5)
    sums = Checksums({"a": len(content)})
    sums.add("a", 0, memoryview(content))
    assert sums.of("a") == expected_checksum(content, BLOCK)
    assert hash_of(b"ab", bytearray(b"c")) == hash_of(b"abc") == "xxh3_128:" + xxh3_128_hexdigest(b"abc")


def test_every_byte_counts_and_so_does_its_position() -> None:
    content = bytearray(content_of(3 * SMALL))
    found = {expected_checksum(bytes(content))}
    for at in range(len(content)):
        content[at] ^= 1
        sums = Checksums({"a": len(content)}, SMALL)
        sums.add("a", 0, memoryview(content))
        found.add(sums.of("a"))
        content[at] ^= 1
    found.add(expected_checksum(bytes(content[SMALL:] + content[:SMALL])))
    found.add(expected_checksum(bytes(content + b"\0")))
    assert len(found) == len(content) + 3


def test_many_threads() -> None:
    content = content_of(40 * BLOCK + 77)
    order = ranges(len(content), random.Random(1).sample(range(len(content)), 400))
    random.Random(2).shuffle(order)
    sums = Checksums({"a": len(content)})
    with ThreadPoolExecutor(8) as pool:
        done = [pool.submit(sums.add, "a", b, memoryview(content)[b:e]) for b, e in order]
    for future in done:
        future.result()
    assert sums.of("a") == expected_checksum(content, BLOCK)


def test_gaps_are_reported_and_may_be_filled_later() -> None:
    content = content_of(5 * SMALL + 3)
    sums = Checksums({"a": len(content)}, SMALL)
    sums.add("a", SMALL + 1, memoryview(content)[SMALL + 1 : 4 * SMALL])
    assert list(sums.gaps("a")) == [(0, 64), (64, 64), (256, 64), (320, 3)]
    with pytest.raises(ValueError, match="a: bytes from 0 have not come"):
        sums.of("a")
    for offset, size in sums.gaps("a"):
        sums.add("a", offset, memoryview(content)[offset : offset + size])
    assert sums.of("a") == expected_checksum(content) and not sums._files["a"]._parts
    sums.add("a", SMALL, memoryview(content)[SMALL : 3 * SMALL])  # whole blocks again
    sums.add("a", 5, memoryview(content)[5:9])  # a part of what is known
    assert sums.of("a") == expected_checksum(content) and not sums._files["a"]._parts


@settings(deadline=None, derandomize=True, max_examples=100)
@given(cut_file(), st.integers(1, 4))
def test_several_processes(case: tuple[bytes, list[tuple[int, int]]], processes: int) -> None:
    content, order = case
    each = [Checksums({"a": len(content), "b": 3}, SMALL) for _ in range(processes)]
    for number, (begin, end) in enumerate(order):
        each[number % processes].add("a", begin, memoryview(content)[begin:end])
    together = each[0]
    for other in each[1:]:
        together.update(pickle.loads(pickle.dumps(other.export())))
    for offset, size in together.gaps("a"):  # blocks of which each has a part
        together.add("a", offset, memoryview(content)[offset : offset + size])
    assert together.of("a") == expected_checksum(content)
    assert list(together.gaps("b")) == [(0, 3)]


@pytest.mark.parametrize("offset, size", [(-1, 1), (0, 11), (10, 1), (11, 0)])
def test_bytes_that_are_not_in_the_file(offset: int, size: int) -> None:
    with pytest.raises(ValueError, match="expected them to be within 10"):
        Checksums({"a": 10}).add("a", offset, memoryview(bytes(size)))


def test_memory_is_at_most_what_is_computed(monkeypatch: Any) -> None:
    """For any chunks that workers take in order."""
    monkeypatch.setattr(checksums, "BLOCK", SMALL)
    chance = random.Random(0)
    for workers in (1, 2, 5):
        content = content_of(50 * SMALL + 3)
        coming = iter(ranges(len(content), chance.sample(range(len(content)), chance.randrange(5, 200))))
        sums = Checksums({"a": len(content)}, SMALL)
        held: list[tuple[int, int]] = []
        while True:
            held += itertools.islice(coming, workers - len(held))
            if not held:
                break
            begin, end = held.pop(chance.randrange(len(held)))
            sums.add("a", begin, memoryview(content)[begin:end])
            blocks = sums._files["a"]
            kept = sum(len(whole) for whole, _ in blocks._parts.values())
            taken = kept + len(blocks.known) + len(blocks.digests)
            assert taken <= checksums.memory([len(content)], workers)
        assert sums.of("a") == expected_checksum(content)


def test_checksums_are_counted_in_the_budget() -> None:
    def memory(size: int) -> int:
        few: Any = {"workers": 2, "max_chunk_bytes": 4096, "scratch": 0, "block": 0}
        return budget.fit(1 << 30, "memory_budget", models=1, tensors=1, sizes=[size, 0], **few).memory

    assert memory(1 << 40) - memory(0) == 17 << 23
