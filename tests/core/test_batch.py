"""Segments and their operands, and how they are packed for the kernels."""

from __future__ import annotations

import pytest

from negmerge_fast.core.batch import Batch, Operand, Operands, Segment, Signature, segment_at
from negmerge_fast.core.descriptors import pack_descriptors

SIGNATURE = Signature("F32", ("BF16", "F16"), False)


def test_operands_are_columns() -> None:
    segment = segment_at(5, SIGNATURE, [64, 2**64 - 8, 3], ["a", "b", "c"])
    expected = [Operand(2**64 - 8, "BF16", "b"), Operand(3, "F16", "c")]
    assert isinstance(segment.models, Operands)
    assert segment.base == segment.out == Operand(64, "F32", "a")
    assert list(segment.models) == expected and len(segment.models) == 2
    assert segment.models[1] == segment.models[-1] == expected[1] and segment.models[:1] == expected[:1]


def test_operands_are_packed_as_a_list_of_them() -> None:
    packed = [5, 64, 64, 2**64 - 8, 3]
    columns = segment_at(5, SIGNATURE, [64, 2**64 - 8, 3], [None] * 3)
    for segment in (columns, columns._replace(models=list(columns.models))):
        assert pack_descriptors(Batch("cpu", SIGNATURE, [segment, segment])).tolist() == [*packed, *packed]
    counted = columns._replace(base=None, out=None)
    assert pack_descriptors(Batch("cpu", SIGNATURE, [counted])).tolist() == [5, 0, 0, 2**64 - 8, 3]
    assert pack_descriptors(Batch("cpu", SIGNATURE, [])).tolist() == []


def test_other_numbers_of_models_are_refused() -> None:
    """A kernel would take the addresses of one segment for those of the next."""
    with pytest.raises(ValueError, match="2 addresses, 3 owners"):
        segment_at(5, SIGNATURE, [64, 128], [None] * 3)
    base = Operand(64, "F32", None)
    few = Segment(5, base, Operands([128], ("BF16",), [None]), base)
    with pytest.raises(ValueError, match="expected 2"):
        pack_descriptors(Batch("cpu", SIGNATURE, [few]))
