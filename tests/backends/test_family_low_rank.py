"""Other methods on the CPU kernel: low-rank models have the bits of the same models written out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from backend_cases import CASES, BackendCase
from bits import same_bits

from negmerge_fast.backends import native
from negmerge_fast.core.batch import Batch, Operand, Segment, Signature
from negmerge_fast.core.choices import Terms
from negmerge_fast.core.low_rank import ExpandBatch, ExpandSegment, Expansion, LowRank
from negmerge_fast.core.rule import Rule
from negmerge_fast.methods import catalogue

# Rows, columns and the first element: of rows in one tile, and of rows that are cut, both from within a row on.
SHAPES = [(90, 9, 4), (40, 1500, 777)]


def operand(tensor: torch.Tensor) -> Operand:
    return Operand(tensor.data_ptr(), "F32", tensor)


@pytest.mark.parametrize("case", [each for each in CASES if "cpu-cpu" in str(each.id)])
@pytest.mark.parametrize(("rows", "columns", "begin"), SHAPES)
@pytest.mark.parametrize("name", ["ties", "dare-ties"])
def test_low_rank_models_are_merged_like_dense_ones(
    case: BackendCase, name: str, rows: int, columns: int, begin: int
) -> None:
    if (reason := case.why_not()) is not None:
        pytest.skip(reason)
    generator = torch.Generator().manual_seed(rows)
    numel = rows * columns - begin
    base, weight = torch.randn(2, numel, generator=generator)
    weight[::5] = 0
    dense, expansions, kept = [], [], []
    with case.chosen():
        for _ in range(3):
            left, right = (
                torch.randn(rows, 5, generator=generator),
                torch.randn(5, columns, generator=generator),
            )
            kept.append((left, right))
            factors = LowRank(left.data_ptr(), right.data_ptr(), 1, rows, columns, 5, 0.5, kept[-1])
            expansions.append(Expansion(factors, begin))
            written = torch.empty(numel)
            segment = ExpandSegment(numel, expansions[-1], operand(base), operand(written))
            native.expand_cpu(ExpandBatch("cpu", "F32", "F32", [segment]))
            dense.append(operand(written))
        dense.append(operand(torch.randn(numel, generator=generator)))
        rule = Rule(0.9, 1.0, catalogue.method(name).choices(4, weighted=True))
        terms = [Terms(begin, 7, operand(weight), [1.0] * 4, [3.0, 4.0, 5.0, float("inf")])]
        found = []
        for models in (dense, [*expansions, dense[-1]]):
            out = torch.full((numel,), float("nan"))
            segment = Segment(numel, operand(base), models, operand(out))  # type: ignore[arg-type]
            batch = Batch("cpu", Signature("F32", ("F32",) * 4, False), [segment], terms)
            merged = native.merge_low_rank_cpu(batch, rule, 2)
            of_delta = torch.full((numel,), float("nan"))
            batch = replace(batch, segments=[segment._replace(out=operand(of_delta))])
            found.append(
                (out, of_delta, merged.tolist(), native.merge_low_rank_cpu(batch, rule, 1, True).tolist())
            )
    (out, of_delta, *counts), (same_out, same_delta, *same_counts) = found
    assert counts == same_counts and counts[0][0][0] > 0 and counts[0][0][3] > 0
    assert same_bits(out, same_out) and same_bits(of_delta, same_delta)
