"""LoRA adapters as PEFT writes them: which parameter of a model each of their tensors changes, and how.

Nothing here depends on where the tensors are: T is a TensorRef of a file, or a tensor of torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeAlias, TypeVar

T = TypeVar("T")


class Product(NamedTuple, Generic[T]):
    """A low-rank difference of a parameter, or of a part of it that is a tensor of its own in a file.

    With E experts (1 for a plain matrix), a is (E · rank, in), its row e · rank + r that of expert e; b is (out, rank · E), its column
    r · E + e that of expert e: as PEFT stores them, which for E = 1 are lora_A.weight and lora_B.weight. With convolutions, a and b
    have further dimensions, all of which are 1 for b: (rank, in / groups, *kernel); they are one matrix (rank, in / groups · kernel …).

    Attributes:
        a: Factor A.
        b: Factor B.
        rank: r.
        scale: s, in float64.
        transposed: Whether the parameter is (B·A)ᵀ, for each expert: fan_in_fan_out, embeddings, experts of shape (E, in, out).
        experts: E.
        expert: Of one expert only: which. None: of all, one after the other.
        rows: Of some rows of B only: begin and end. None: of all.
        shape: Of the parameter, if not None: it has as many elements, in the same order.
    """

    a: T
    b: T
    rank: int
    scale: float
    transposed: bool = False
    experts: int = 1
    expert: int | None = None
    rows: tuple[int, int] | None = None
    shape: tuple[int, ...] | None = None


class Shift(NamedTuple, Generic[T]):
    """What is added to a parameter: scale · value, of its shape. lora_bias."""

    value: T
    scale: float


class Replacement(NamedTuple, Generic[T]):
    """A whole parameter: modules_to_save, biases, unless `rows` has the rows of the parameter that value's rows replace."""

    value: T
    rows: tuple[int, ...] | None = None


Change: TypeAlias = "Product[T] | Shift[T] | Replacement[T]"


@dataclass(frozen=True)
class Adapter(Generic[T]):
    """An adapter.

    Attributes:
        name: What errors call it: its path, or `finetuned[2]: adapter 'default'`.
        changes: By the names of parameters in memory, as in the state dict of the model without the adapter.
        modules: How many modules it changes, for "N of N adapter modules placed".
        owner_of: Of each parameter, the module in the adapter that changes it.
        notes: What a user should know of it, a line each.
    """

    name: str
    changes: Mapping[str, Change[T]]
    modules: int
    owner_of: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
