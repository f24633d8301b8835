"""Plans cut into ranges, chunks and shards: every element is in one of them, and shards are even."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from checkpoint_files import family, save_model
from hypothesis import given, settings
from hypothesis import strategies as st

from negmerge_fast.checkpoints.formats import open_checkpoint
from negmerge_fast.core.ranges import Range, subtract
from negmerge_fast.streaming.partition import chunks, partition, slice_plan
from negmerge_fast.streaming.plan import Plan, make_plan


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Tensors of many kinds, one version of them in other types, so that sources of one extent differ in length."""
    folder = tmp_path_factory.mktemp("plan")
    base, one, two = family(n=2)
    names = list(base)
    save_model(folder / "base", base, [names[:3], names[3:]])
    save_model(folder / "one", one)
    save_model(folder / "two", {n: t.double() if t.dtype == torch.float32 else t for n, t in two.items()})
    return make_plan(open_checkpoint(folder / "base"), [open_checkpoint(folder / n) for n in ("one", "two")])


def covered(plan: Plan, ranges: list[Range], chunk_bytes: int) -> list[tuple[object, ...]]:
    """Every byte of every source of the chunks, as often as it is in one."""
    found: list[tuple[object, ...]] = []
    for range_ in ranges:
        for chunk in chunks(slice_plan(plan, range_), chunk_bytes):
            for k, (file, offset, nbytes) in enumerate(chunk.sources):
                found += [(chunk.path, k, file.path, offset + i) for i in range(nbytes)]
            at = [source.offset for source in chunk.sources]
            for tensor_slice in chunk.slices:
                versions = [
                    plan.base.tensors[tensor_slice.name],
                    *(m.tensors[tensor_slice.name] for m in plan.models),
                ]
                for k, (version, size) in enumerate(zip(versions, tensor_slice.sizes, strict=True)):
                    if tensor_slice.numel:
                        assert at[k] == version.source.offset + tensor_slice.start * size
                    at[k] += tensor_slice.numel * size
            if chunk.slices:
                assert at == [source.offset + source.nbytes for source in chunk.sources]
    return found


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_chunks_cover_every_byte_once(plan: Plan, data: st.DataObject) -> None:
    edges = data.draw(st.lists(st.integers(0, plan.whole.end), max_size=6))
    chunk_bytes = data.draw(st.sampled_from([8, 100, 4096]))
    cuts = [0, *sorted(edges), plan.whole.end]
    ranges = [Range(a, b) for a, b in pairwise(cuts)]
    found = covered(plan, ranges, chunk_bytes)
    assert len(found) == len(set(found)) and set(found) == set(covered(plan, [plan.whole], 1 << 20))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_shards_are_disjoint_complete_and_even(plan: Plan, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 7))
    [done] = partition(plan, [plan.whole], 1)
    edges = sorted(
        data.draw(
            st.lists(
                st.sampled_from([r.end for shard in partition(plan, done, 9) for r in shard]), max_size=4
            )
        )
    )
    todo = subtract(plan.whole, [Range(a, b) for a, b in zip(edges[::2], edges[1::2], strict=False)])
    shards = partition(plan, todo, count)
    assert len(shards) == count
    everything = [range_ for shard in shards for range_ in shard]
    assert everything == sorted(everything) and subtract(plan.whole, everything) == subtract(plan.whole, todo)
    assert all(a.end <= b.begin for a, b in pairwise(everything))
    moved = [
        sum(
            e.sources[0].nbytes + sum(s.nbytes for s in e.sources)
            for range_ in shard
            for e in slice_plan(plan, range_)
        )
        for shard in shards
    ]
    # Cut between elements, of at most 8 bytes in the output and in each version.
    assert max(moved) - min(moved) <= 2 * 8 * (len(plan.models) + 2)
    # What is cut is cut between elements: each range has as many bytes as it says.
    assert all(
        sum(e.sources[0].nbytes for e in slice_plan(plan, range_)) == range_.end - range_.begin
        for range_ in everything
    )


def test_subtract() -> None:
    assert subtract(Range(0, 9), []) == [Range(0, 9)]
    assert subtract(Range(0, 9), [Range(5, 9), Range(0, 2), Range(1, 3)]) == [Range(3, 5)]
    assert subtract(Range(0, 9), [Range(0, 9)]) == [] and subtract(Range(0, 0), []) == []
