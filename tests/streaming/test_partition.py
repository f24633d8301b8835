"""Plans in parts: whatever they are cut to, every element is in one of them; and how they are shared out."""

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


def covered(plan: Plan, runs: list[Range], chunk_bytes: int) -> list[tuple[object, ...]]:
    """Every byte of every source of the parts, and every element, once for each time that it is in one."""
    found: list[tuple[object, ...]] = []
    for run in runs:
        for chunk in chunks(slice_plan(plan, run), chunk_bytes):
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
def test_parts_cover_every_byte_once(plan: Plan, data: st.DataObject) -> None:
    edges = data.draw(st.lists(st.integers(0, plan.whole.end), max_size=6))
    chunk_bytes = data.draw(st.sampled_from([8, 100, 4096]))
    cuts = [0, *sorted(edges), plan.whole.end]
    runs = [Range(a, b) for a, b in pairwise(cuts)]
    found = covered(plan, runs, chunk_bytes)
    assert len(found) == len(set(found)) and set(found) == set(covered(plan, [plan.whole], 1 << 20))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_shares_are_disjoint_whole_and_even(plan: Plan, data: st.DataObject) -> None:
    lots = data.draw(st.integers(1, 7))
    [done] = partition(plan, [plan.whole], 1)
    edges = sorted(
        data.draw(
            st.lists(st.sampled_from([r.end for lot in partition(plan, done, 9) for r in lot]), max_size=4)
        )
    )
    todo = subtract(plan.whole, [Range(a, b) for a, b in zip(edges[::2], edges[1::2], strict=False)])
    shared = partition(plan, todo, lots)
    assert len(shared) == lots
    everything = [run for lot in shared for run in lot]
    assert everything == sorted(everything) and subtract(plan.whole, everything) == subtract(plan.whole, todo)
    assert all(a.end <= b.begin for a, b in pairwise(everything))
    moved = [
        sum(
            e.sources[0].nbytes + sum(s.nbytes for s in e.sources)
            for run in lot
            for e in slice_plan(plan, run)
        )
        for lot in shared
    ]
    # Cut between elements, of at most 8 bytes in the output and in each version.
    assert max(moved) - min(moved) <= 2 * 8 * (len(plan.models) + 2)
    # What is cut is cut between elements: each part is as long as the run that it was made of.
    assert all(
        sum(e.sources[0].nbytes for e in slice_plan(plan, run)) == run.end - run.begin for run in everything
    )


def test_what_is_left() -> None:
    assert subtract(Range(0, 9), []) == [Range(0, 9)]
    assert subtract(Range(0, 9), [Range(5, 9), Range(0, 2), Range(1, 3)]) == [Range(3, 5)]
    assert subtract(Range(0, 9), [Range(0, 9)]) == [] and subtract(Range(0, 0), []) == []
