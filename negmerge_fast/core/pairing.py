"""Pairing of a model's tensors with the base's by name, where libraries have written the names in different ways.

Names are changed only if all of them match afterwards. What was changed is told by notes().
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, takewhile
from typing import Protocol, TypeAlias

from .dtypes import FLOAT_SIZES, INTEGER_DTYPES
from .errors import InputError, short_repr, some_names
from .schema import TensorSpec

# Which of some tensors of one model are the same as another of its tensors: tied weights.
Twins = Callable[[str, Collection[str]], Sequence[str]]
Chosen = Callable[[str], bool]
Renames = Callable[[str], str]
# Regular expressions and what replaces their matches, in order.
Rename: TypeAlias = "Mapping[str, str] | Sequence[tuple[str, str]]"


class Patterns(Protocol):
    """What compiles regular expressions: this module, or what bounds their time."""

    def choice(self, include: str | None, exclude: str | None) -> Chosen | None: ...

    def compile_renames(self, rename: Rename) -> Renames | None: ...


# Components that wrap a module and not a weight: torch.compile, FSDP 1, activation checkpointing; DDP's is the first one.
_WRAPPERS = re.compile(r"(?:(?<=[./])|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PARALLEL = re.compile(r"(?:(?<=/)|^)(?:module\.)+")

# Old names on the right: of TensorFlow's LayerNorm, and of torch's weight_norm before there were parametrizations.
_OLD_NAMES = (
    (re.compile(r"\bparametrizations\.(\w+)\.original0$"), r"\1_g"),
    (re.compile(r"\bparametrizations\.(\w+)\.original1$"), r"\1_v"),
    (re.compile(r"\bgamma$"), "weight"),
    (re.compile(r"\bbeta$"), "bias"),
)

# With the dot or the slash before it.
_COMPONENT = re.compile(r"[./]?[^./]+")

# More tensors than these are not tied: each is compared with all of its shape.
_MAX_TIED = 64


@dataclass
class Pairing:
    """How the tensors of one model are paired with the base's.

    Attributes:
        names: The model's name of each tensor, by the base's name; by its own if the base has no such tensor.
        tied: Names that the model lacks, and the base's names to which the base ties them. names has both.
        surplus: The model's names of tensors that the base lacks, and those to which the model ties them. names has none.
        missing_integers: The base's names of integer tensors that the model lacks.
        surplus_integers: The model's names of integer tensors that the base lacks.
    """

    names: dict[str, str]
    tied: dict[str, str] = field(default_factory=dict)
    surplus: dict[str, str] = field(default_factory=dict)
    missing_integers: list[str] = field(default_factory=list)
    surplus_integers: list[str] = field(default_factory=list)


def choice(include: str | None, exclude: str | None) -> Chosen | None:
    """Whether a tensor is merged, by its name: if include matches it and exclude does not. None if all are.

    Raises:
        InputError: If one is no regular expression.
    """

    def pattern(label: str, text: str | None, default: str) -> re.Pattern[str]:
        try:
            return re.compile(default if text is None else text)
        except (re.error, OverflowError, RecursionError, TypeError) as error:
            raise InputError(f"{label}: {short_repr(text)} is not a regular expression ({error})") from None

    if include is None and exclude is None:
        return None
    wanted, unwanted = pattern("include", include, ""), pattern("exclude", exclude, r"(?!)")
    return lambda name: bool(wanted.search(name) and not unwanted.search(name))


def rename_pairs(rename: Rename) -> tuple[tuple[str, str], ...]:
    """Replacements as pairs. Raises InputError if they are none."""
    try:
        pairs = list(rename.items() if isinstance(rename, Mapping) else rename)
        if any(isinstance(pair, str) for pair in pairs):  # one of two characters is no pair
            raise ValueError
        return tuple((pattern, text) for pattern, text in pairs)
    except (TypeError, ValueError):
        found = short_repr(rename)
        raise InputError(
            f"rename: {found}, expected pairs of a regular expression and a text, or a mapping"
        ) from None


def compile_renames(rename: Rename) -> Renames | None:
    """What replaces the matches of regular expressions in a name, in order; None if there are none.

    Raises:
        InputError: If one is no regular expression, or a replacement is none.
    """
    compiled: list[tuple[re.Pattern[str], str]] = []
    for pattern, text in rename_pairs(rename):
        try:
            compiled.append((re.compile(pattern), text))
            re.compile(f"{pattern}|").sub(text, "")  # refuses a reference to a group that there is not
        except (re.error, IndexError, OverflowError, RecursionError, TypeError) as error:
            raise InputError(f"rename: {short_repr(pattern)} to {short_repr(text)}: {error}") from None

    def renamed(name: str) -> str:
        for pattern, text in compiled:
            name = pattern.sub(text, name)
        return name

    return renamed if compiled else None


def pair_names(
    base: Mapping[str, TensorSpec],
    model: Mapping[str, TensorSpec],
    twins_in_base: Twins,
    twins_in_model: Twins,
    chosen: Chosen = lambda name: True,
    renames: Renames | None = None,
    where: str = "model",
) -> Pairing:
    """Pair the tensors of a model with those of the base.

    Args:
        base: The specs of all of the base's tensors.
        model: The specs of the model's tensors.
        twins_in_base: Finds tied weights of the base.
        twins_in_model: Finds tied weights of the model.
        chosen: Whether a tensor is merged, by the base's name. The names of others need not match.
        renames: What the model's names are changed to first.
        where: The model, in errors.

    Returns:
        The first pairing, of names as they are and then of names in other spellings, in which all match. If there is none,
        names as they are: schema.mismatches says what does not match.

    Raises:
        InputError: If two of a model's tensors get one name.
    """
    if not renames and model.keys() == base.keys():
        return Pairing({name: name for name in base})
    as_is = None
    for names in _spellings(base, _by_new_name(model, renames or str, where)):
        pairing = Pairing(names)
        if _complete(pairing, base, model, twins_in_base, twins_in_model, chosen):
            return pairing
        as_is = as_is or pairing
    assert as_is is not None
    return as_is


def _by_new_name(model: Iterable[str], renames: Renames, where: str) -> dict[str, str]:
    names: dict[str, str] = {}
    for name in model:
        new = renames(name)
        if new in names:
            both = f"{short_repr(names[new])} and {short_repr(name)}"
            raise InputError(f"{where}: rename makes {short_repr(new)} of {both}, expected different names")
        names[new] = name
    return names


def _spellings(base: Iterable[str], model: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Yield the model's names by those of the base: as they are, then with each kind of difference taken off."""
    for spell in (str, _unwrapped, _old, lambda name: _old(_unwrapped(name))):
        of_base = {spell(name): name for name in base}
        of_model = {spell(name): own for name, own in model.items()}
        if len(of_model) < len(model) or len(of_base) < len(set(base)):
            continue  # two names would become one
        named = list(of_model.items())
        spelled = [{of_base.get(name, name): own for name, own in named}]
        spelled += [
            {of_base.get(name.removeprefix(prefix), name): own for name, own in named}
            for prefix in _prefixes(of_model, of_base)
        ]
        spelled += [
            {of_base.get(prefix + name, of_base.get(name, name)): own for name, own in named}
            for prefix in _prefixes(of_base, of_model)
        ]
        yield from (names for names in spelled if len(names) == len(model))


def _unwrapped(name: str) -> str:
    return _PARALLEL.sub("", _WRAPPERS.sub("", name))


def _old(name: str) -> str:
    for pattern, text in _OLD_NAMES:
        name = pattern.sub(text, name)
    return name


def _prefixes(names: Collection[str], others: Iterable[str]) -> Iterator[str]:
    """Yield the prefixes, of whole components, that most of the names share and not all of the others.

    What does not have one has to be tied to what has: transformer.wte.weight and lm_head.weight.
    """
    by_component: dict[str, list[str]] = {}
    for name in names:
        by_component.setdefault(re.split(r"[./]", name)[0], []).append(name)
    sharing = max(by_component.values(), key=len, default=[])
    if len(sharing) <= len(names) // 2:
        return
    first, last = min(sharing), max(sharing)  # what these two share, all of them do
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))
    for end in (match.end() for match in re.finditer(r"[./]", first[:shared])):
        if not all(name.startswith(first[:end]) for name in others):
            yield first[:end]


def _complete(
    pairing: Pairing,
    base: Mapping[str, TensorSpec],
    model: Mapping[str, TensorSpec],
    twins_in_base: Twins,
    twins_in_model: Twins,
    chosen: Chosen,
) -> bool:
    """Whether all tensors match; tied weights and integers that only one side has are then sorted out."""
    names = pairing.names
    missing = [name for name in base if name not in names and chosen(name)]
    surplus = [name for name in names if name not in base and chosen(name)]
    pairing.missing_integers = [name for name in missing if base[name].dtype in INTEGER_DTYPES]
    pairing.surplus_integers = [names[n] for n in surplus if model[names[n]].dtype in INTEGER_DTYPES]
    missing = [name for name in missing if base[name].dtype not in INTEGER_DTYPES]
    surplus = [name for name in surplus if model[names[name]].dtype not in INTEGER_DTYPES]
    paired = [name for name in base if name in names and base[name].dtype in FLOAT_SIZES]
    if max(len(missing), len(surplus)) > min(_MAX_TIED, len(paired)):
        return False
    for name in (n for n in missing if base[n].dtype in FLOAT_SIZES):
        owners = twins_in_base(name, [p for p in paired if base[p] == base[name]])
        versions = [names[owner] for owner in owners]
        if owners and len(twins_in_model(versions[0], versions[1:])) == len(versions) - 1:
            pairing.tied[name] = owners[0]
    for name in (n for n in surplus if model[names[n]].dtype in FLOAT_SIZES):
        own = names[name]
        if owners := twins_in_model(own, [names[p] for p in paired if model[names[p]] == model[own]]):
            pairing.surplus[own] = owners[0]
            del names[name]
    names.update({name: names[owner] for name, owner in pairing.tied.items()})
    return len(pairing.tied) == len(missing) and len(pairing.surplus) == len(surplus)


def is_extra_state(name: object) -> bool:
    """Whether a name of a state dict is that of a module's extra state, which may be anything and is never merged."""
    text = str(name)
    return text.endswith("_extra_state") and text[:-12][-1:] in ("", ".")


def notes(pairing: Pairing, reference: str = "base", ties: bool = True) -> list[str]:
    """Describe what was done to pair the tensors, one phrase each, for a line that begins with the model.

    Args:
        pairing: What pair_names returned.
        reference: What the base is called.
        ties: Whether to tell of tied weights.
    """
    said = []
    renamed = [(own, n) for n, own in pairing.names.items() if n != own and n not in pairing.tied]
    if renamed:
        own, name = renamed[0]
        said.append(f"{short_repr(own)} is taken for {short_repr(name)}{_more(renamed)}")
    if ties and pairing.tied:
        name, owner = next(iter(pairing.tied.items()))
        more = _more(pairing.tied)
        said.append(
            f"lacks {short_repr(name)}, which {reference} ties to {short_repr(owner)}: that is taken{more}"
        )
    if ties and pairing.surplus:
        name, owner = next(iter(pairing.surplus.items()))
        more = _more(pairing.surplus)
        said.append(
            f"{short_repr(name)} is not in {reference}, but tied to {short_repr(owner)}: skipped{more}"
        )
    if names := pairing.missing_integers:
        said.append(f"lacks {some_names(names)}: {reference} has integers there, which are kept")
    if names := pairing.surplus_integers:
        said.append(f"{some_names(names)} of integers: not in {reference}, skipped")
    return said


def _more(names: Collection[object]) -> str:
    return f", and {len(names) - 1:,} more in the same way" if len(names) > 1 else ""


def hint(base: Collection[str], model: Collection[str]) -> str | None:
    """What to try where names do not match: the prefixes by which most of the names that only one side has differ.

    Names in memory may be other than strings: they have no prefixes.
    """
    only_base = list(islice((name for name in base if name not in model and isinstance(name, str)), 1000))
    by_end: dict[tuple[str, ...], list[str]] = {}
    for name in only_base:
        by_end.setdefault(_end(name), []).append(name)
    pairs: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], tuple[str, str]] = {}
    for own in islice((name for name in model if name not in base and isinstance(name, str)), 1000):
        for name in by_end.get(_end(own), ()):
            shared = _shared_end(own, name)
            prefixes = own[: len(own) - shared], name[: len(name) - shared]
            pairs[prefixes] += 1
            examples.setdefault(prefixes, (own, name))
    if not pairs:
        return None
    (theirs, ours), _ = pairs.most_common(1)[0]
    own, name = examples[theirs, ours]
    return (
        f"{short_repr(own)} may be {short_repr(name)}, with the prefix {short_repr(theirs)} for {short_repr(ours)} "
        f"(rename '^{re.escape(theirs)}={ours}')"
    )


def _end(name: str) -> tuple[str, ...]:
    return tuple(re.split(r"[./]", name)[-2:])


def _shared_end(left: str, right: str) -> int:
    """The length of the components that two names share at their ends."""
    pairs = zip(reversed(_COMPONENT.findall(left)), reversed(_COMPONENT.findall(right)), strict=False)
    shared = [a for a, _ in takewhile(lambda pair: pair[0].strip("./") == pair[1].strip("./"), pairs)]
    return len("".join(shared[::-1]).lstrip("./"))
