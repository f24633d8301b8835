"""LoRA adapters as PEFT writes them: which parameter of a model each of their tensors changes, and how.

Nothing here depends on where the tensors are: T is a TensorRef of a file, or a tensor of torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

from ..core.dtypes import FLOAT_SIZES, INTEGER_DTYPES
from ..core.errors import InputError, short_repr
from ..core.regex import LinearPattern
from ..core.unmergeable import factor_advice

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
        columns: Of some columns of A only, of one dimension: begin and end. None: of all.
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
    columns: tuple[int, int] | None = None


class Shift(NamedTuple, Generic[T]):
    """What is added to a parameter: scale · value, of its shape. lora_bias."""

    value: T
    scale: float


class Replacement(NamedTuple, Generic[T]):
    """A whole parameter: modules_to_save, biases, unless `rows` has the rows of the parameter that value's rows replace."""

    value: T
    rows: tuple[int, ...] | None = None


Change: TypeAlias = "Product[T] | Shift[T] | Replacement[T]"


def parts_of(change: Change[T] | None) -> tuple[T, ...]:
    """What a change is made of: factors A and B, or one tensor; nothing of None."""
    if change is None:
        return ()
    return (change.a, change.b) if isinstance(change, Product) else (change.value,)


def refuse_types(
    changes: Mapping[str, Change[T]],
    dtype_of: Callable[[T], str],
    base: Mapping[str, str],
    name: str,
    label: Callable[[str], str],
) -> None:
    """Raise InputError if an adapter changes what is not of a type that is merged, or with what is not.

    Args:
        changes: What it changes, by the base's names.
        dtype_of: The type of a tensor of it.
        base: The types of the base's tensors.
        name: What errors call the adapter.
        label: What errors call a tensor of the base.
    """
    for tensor, change in changes.items():
        types = sorted({dtype_of(part) for part in parts_of(change)} - FLOAT_SIZES.keys())
        if INTEGER_DTYPES.issuperset({*types, base[tensor]}) and types:
            continue  # a counter of a module that was saved: the base's, as in every merge
        if base[tensor] not in FLOAT_SIZES or types:
            found = (
                f"{base[tensor]}, but {name} changes it"
                if base[tensor] not in FLOAT_SIZES
                else f"{name} has {types[0]}"
            )
            raise InputError(f"{label(tensor)}: {found}, expected one of {', '.join(FLOAT_SIZES)}")


class Parameter(NamedTuple):
    """A parameter that the factors of a module may be of.

    Attributes:
        name: Its own name, without the module's.
        rank: r, if they are.
        scale: s, if they are.
        is_weight: Whether it is the weight of a module that target_modules names; else target_parameters names it.
    """

    name: str
    rank: int
    scale: float
    is_weight: bool = False


class Nested(NamedTuple, Generic[T]):
    """Factors of parameters whose names are not in the keys (target_parameters): shapes of the model tell.

    Attributes:
        levels: Factors A and B by how deep the key is nested, the deepest first: that parameter is the module's first.
        parameters: Which it may be.
        transposed: fan_in_fan_out, for a weight.
        swaps: Whether experts are (experts, out, in) for PEFT unless their module says otherwise, which it has held since 0.19; None
            if its version is not known.
    """

    levels: tuple[tuple[T, T], ...]
    parameters: tuple[Parameter, ...]
    transposed: bool = False
    swaps: bool | None = None


@dataclass(frozen=True)
class Adapter(Generic[T]):
    """An adapter.

    Attributes:
        name: What errors call it: its path, or `finetuned[2]: adapter 'default'`.
        changes: By the names of parameters in memory, as in the state dict of the model without the adapter.
        modules: How many modules it changes, for "N of N adapter modules placed".
        owner_of: Of each parameter, the module in the adapter that changes it.
        notes: What a user should know of it, a line each.
        nested: By module, what target_parameters names; checkpoints/placing.py makes changes of it.
        copies: By the names of parameters, copies of what the base has: they must be equal.
        flexible: Parameters whose product is transposed or not by fan_in_fan_out, where their shape does not tell.
        shape_of: The shape of a tensor.
        model_class: The class of transformers that its base had in memory, if its configuration says so.
    """

    name: str
    changes: Mapping[str, Change[T]]
    modules: int
    owner_of: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    nested: Mapping[str, Nested[T]] = field(default_factory=dict)
    copies: Mapping[str, T] = field(default_factory=dict)
    flexible: frozenset[str] = frozenset()
    shape_of: Callable[[T], tuple[int, ...]] = field(default=lambda tensor: tensor.shape)
    model_class: str = ""

    def renamed(self, rename: Callable[[str], str]) -> Adapter[T]:
        """The adapter with other names of parameters.

        Raises:
            InputError: If two become one.
        """
        changes = {rename(name): change for name, change in self.changes.items()}
        copies = {rename(name): value for name, value in self.copies.items()}
        if len(changes) < len(self.changes) or len(copies) < len(self.copies):
            raise InputError(f"{self.name}: rename makes one name of two, expected different names")
        nested = {}
        for module, each in self.nested.items():
            # Of a module there is no name to rename: that of a parameter in it has one.
            ending = f".{each.parameters[0].name}"
            nested[rename(module + ending).removesuffix(ending)] = each
        owner_of = {rename(name): owner for name, owner in self.owner_of.items()}
        flexible = frozenset(map(rename, self.flexible))
        return replace(
            self, changes=changes, owner_of=owner_of, nested=nested, copies=copies, flexible=flexible
        )


def matrices(product: Product[Any], a: Any, b: Any) -> tuple[Any, Any]:
    """The factors of LowRank (core/low_rank.py): left (matrices, rows, rank) and right (matrices, rank, columns).

    Args:
        product: The product.
        a: Factor A, as stored: an array of numpy, or a tensor of torch.
        b: Factor B.

    Returns:
        Views where the arrays allow it; in row-major order, left @ right · scale has the elements of the tensor in their order.
    """
    experts, rank = product.experts, product.rank
    right = a.reshape(experts, rank, -1)
    left = b.reshape(b.shape[0], rank, experts).swapaxes(0, 2).swapaxes(1, 2)
    if product.expert is not None:
        left, right = (each[product.expert : product.expert + 1] for each in (left, right))
    if product.rows is not None:
        left = left[:, product.rows[0] : product.rows[1]]
    if product.columns is not None:
        right = right[:, :, product.columns[0] : product.columns[1]]
    if product.transposed:
        left, right = right.swapaxes(1, 2), left.swapaxes(1, 2)
    return left, right


# Fields of a configuration that say how an adapter was trained or where it is put, not what it adds.
_HARMLESS = frozenset({
    "arrow_task_adapter_names", "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_config", "megatron_core", "merge_weights", "modules_to_tie", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "target_modules", "target_modules_to_tie", "task_type",
})  # fmt: skip
_READ = frozenset({
    "alpha_pattern", "bias", "fan_in_fan_out", "init_lora_weights", "lora_alpha", "lora_bias", "modules_to_save", "peft_type", "r",
    "rank_pattern", "target_parameters", "trainable_token_indices", "use_rslora",
})  # fmt: skip
# What PEFT calls a variant, whose difference is another formula, and what else is not read; each with what it is.
_REFUSED = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "alora_invocation_string": "activated LoRA",
    "arrow_config": "a router of several adapters (Arrow)",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "Monte Carlo LoRA",
    "layer_replication": "layers that are copies of the base's",
}
# These change the base when training begins, so B·A is no difference to it.
_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")
_INITS = ("gaussian", "eva", "orthogonal")

_KEY = re.compile(
    r"(?P<module>.+)\.(?P<kind>lora_[AB]\.weight|lora_B\.bias|lora_embedding_[AB]|token_adapter\.trainable_tokens_delta)"
)
_PREFIX = "base_model.model."


def read_adapter(
    config: Mapping[str, Any], tensors: Mapping[str, T], shape_of: Callable[[T], tuple[int, ...]], name: str
) -> Adapter[T]:
    """Read what a LoRA adapter of PEFT changes of its base.

    Read:
        r, lora_alpha (missing: r), rank_pattern, alpha_pattern (the first match counts), use_rslora: the scale of B·A.
        fan_in_fan_out: B·A is transposed.
        bias ("all", "lora_only"): whole biases that replace the base's.
        lora_bias: scale · lora_B.bias is added to the base's bias.
        modules_to_save, and embeddings that were saved whole: they replace the base's.
        trainable_token_indices: rows of an embedding that replace the base's.
        Embeddings (lora_embedding_A, lora_embedding_B): (B·A)ᵀ.
        target_parameters: parameters of two dimensions, and experts in one parameter of three.
        Convolutions whose lora_B is 1 × 1, without groups.
        Copies of the base's weights beside an adapted layer (base_layer.weight): they must be equal to the base's.

    Refused, by name:
        Every peft_type but LORA, and every variant: DoRA, QALoRA, block-diagonal, activated, Arrow, KaSA, VeLoRA, Monte Carlo, MiCA.
        init_lora_weights that change the base: PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ, unless converted when they were saved.
        layer_replication, and every field that is not known and is set.
        A tensor that is not understood, a factor without the other, and a shape that is not of the rank.
        torch.nn.MultiheadAttention, whose out_proj PEFT changes twice (at least up to 0.21).
        Regular expressions with lookarounds or references to groups.

    Args:
        config: What adapter_config.json says, or PeftConfig.to_dict.
        tensors: The tensors as adapter_model.safetensors names them, or get_peft_model_state_dict.
        shape_of: The shape of one.
        name: What errors call the adapter.

    Raises:
        InputError: If it is malformed, or not of those that are read.
    """
    return _Reading(_Settings(config, name), tensors, shape_of, name).adapter()


def has_factors(names: Iterable[str]) -> bool:
    """Whether some names are those of factors as PEFT saves them."""
    return any(_KEY.fullmatch(name) for name in names)


def refuse_others(config: Mapping[str, Any], name: str) -> None:
    """Raise InputError for a configuration of anything but a LoRA adapter that can be merged. name is what errors call it."""
    if (kind := _plain(config.get("peft_type"))) != "LORA":
        raise _config_error(name, "peft_type", kind, "LORA: merge this adapter into its model first")
    for key, what in _REFUSED.items():
        if config.get(key):
            raise InputError(
                f"{name}: {key} is set ({what}), expected plain LoRA: merge it into its model first"
            )
    for key, value in config.items():
        if value and key not in _HARMLESS and key not in _READ:
            raise _config_error(
                name,
                short_repr(key),
                value,
                "only fields of LoraConfig that are known here: merge it into its model first",
            )
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_CHANGING_INITS):
        raise _config_error(name,
            "init_lora_weights", init, "an adapter of the unchanged base, as "
            "save_pretrained(path_initial_model_for_weight_conversion=…) makes of it: this one changed its base when training began"
        )  # fmt: skip
    if not (init is None or isinstance(init, bool) or (isinstance(init, str) and init.lower() in _INITS)):
        raise _config_error(name, "init_lora_weights", init, f"true, false, {', '.join(_INITS)}")


def _config_error(name: str, key: str, value: object, expected: str) -> InputError:
    return InputError(f"{name}: {key} is {short_repr(value)}, expected {expected}")


class _Settings:
    """A configuration, checked: it may be anybody's."""

    def __init__(self, config: Mapping[str, Any], name: str) -> None:
        self._config, self._name = config, name
        refuse_others(config, name)
        self._r = self._number("r", config.get("r", 8), integer=True)
        alpha = config.get("lora_alpha")
        self._alpha = None if alpha is None else self._number("lora_alpha", alpha)
        self._ranks = self._pattern("rank_pattern", integer=True)
        self._alphas = self._pattern("alpha_pattern")
        self._use_rslora = self._flag("use_rslora")
        self.fan_in_fan_out = self._flag("fan_in_fan_out")
        self.lora_bias = self._flag("lora_bias")
        self.bias = config.get("bias") or "none"
        if self.bias not in ("none", "all", "lora_only"):
            raise self._error("bias", self.bias, "none, all or lora_only")
        self.modules_to_save = self._texts("modules_to_save")
        self.target_parameters = self._texts("target_parameters")
        self.token_indices = self._token_indices()
        self.swaps = self._swaps()
        mapping = config.get("auto_mapping")
        model_class = mapping.get("base_model_class") if isinstance(mapping, Mapping) else None
        self.model_class = model_class if isinstance(model_class, str) else ""
        self.notes = (f"{name}: no lora_alpha, so the scale is that of lora_alpha = r",) * (alpha is None)

    def _error(self, key: str, value: object, expected: str) -> InputError:
        return _config_error(self._name, key, value, expected)

    def _number(self, key: str, value: Any, integer: bool = False) -> float:
        if integer and type(value) is int and 1 <= value < 1 << 31:
            return value
        if not integer and type(value) in (int, float) and abs(value) < 1e30:
            return float(value)
        raise self._error(key, value, "a rank of at least 1" if integer else "a number")

    def _flag(self, key: str) -> bool:
        value = self._config.get(key)
        if value is None or isinstance(value, bool):
            return bool(value)
        raise self._error(key, value, "true or false")

    def _texts(self, key: str) -> tuple[str, ...]:
        value = self._config.get(key)
        if value is None:
            return ()
        if isinstance(value, (list, tuple, set, frozenset)) and all(
            isinstance(each, str) and each for each in value
        ):
            return tuple(sorted(value) if isinstance(value, (set, frozenset)) else dict.fromkeys(value))
        raise self._error(key, value, "a list of names")

    def _pattern(self, key: str, integer: bool = False) -> list[tuple[Callable[[str], bool], float]]:
        value = self._config.get(key)
        if value is None:
            return []
        if not isinstance(value, Mapping):
            raise self._error(key, value, "an object of regular expressions and numbers")
        found, steps = [], [0]
        for pattern, number in value.items():
            checked = self._number(f"{key}[{short_repr(pattern)}]", number, integer)
            try:
                found.append((_matcher(pattern, steps), checked))
            except InputError as error:
                raise InputError(f"{self._name}: {key}: {error}") from None
        return found

    def _token_indices(self) -> dict[str, tuple[int, ...]]:
        """The indices by the module's name; '' of one whose name is not given."""
        value = self._config.get("trainable_token_indices")
        if value is None:
            return {}
        found = value if isinstance(value, Mapping) else {"": value}
        for rows in found.values():
            good = isinstance(rows, (list, tuple)) and all(type(row) is int and row >= 0 for row in rows)
            if not good or len(set(rows)) < len(rows):
                raise self._error("trainable_token_indices", value, "lists of different numbers of rows")
        return {module: tuple(rows) for module, rows in found.items()}

    def _swaps(self) -> bool | None:
        found = re.match(r"(\d{1,4})\.(\d{1,4})", str(self._config.get("peft_version") or ""))
        return (int(found[1]), int(found[2])) >= (0, 19) if found else None

    def scale(self, module: str) -> tuple[int, float]:
        """The rank and the scale of a module."""
        rank = int(self._first_match(self._ranks, module, self._r))
        alpha = self._first_match(self._alphas, module, rank if self._alpha is None else self._alpha)
        return rank, alpha / (math.sqrt(rank) if self._use_rslora else rank)

    def _first_match(
        self, patterns: list[tuple[Callable[[str], bool], float]], module: str, default: float
    ) -> float:
        try:
            return next((number for matches, number in patterns if matches(module)), default)
        except InputError as error:
            raise InputError(f"{self._name}: rank_pattern or alpha_pattern: {error}") from None

    def parameters(self, module: str) -> tuple[Parameter, ...]:
        """Which parameters of a module target_parameters may mean."""
        found = []
        for name in self.target_parameters:
            parent, _, parameter = name.rpartition(".")
            if not parent or f".{module}".endswith(f".{parent}"):
                found.append(Parameter(parameter, *self.scale(f"{module}.{parameter}")))
        return tuple(dict.fromkeys(found))

    def rows(self, module: str) -> tuple[int, ...] | None:
        """The rows of an embedding that are trained."""
        return next(
            (
                rows
                for name, rows in self.token_indices.items()
                if not name or f".{module}".endswith(f".{name}")
            ),
            None,
        )

    def is_saved(self, parameter: str) -> bool:
        """Whether modules_to_save names the module of a parameter, or one around it."""
        parts = parameter.split(".")
        return any(".".join(parts[:k]).endswith(self.modules_to_save) for k in range(1, len(parts)))


def _plain(value: Any) -> Any:
    """The value of an enum, as JSON has it."""
    return value.value if hasattr(value, "value") else value


def _matcher(pattern: Any, steps: list[int]) -> Callable[[str], bool]:
    """PEFT's re.match((.*\\.)?(PATTERN)$), for patterns of anybody."""
    if not isinstance(pattern, str):
        raise InputError(f"{short_repr(pattern)}, expected a regular expression")
    if re.fullmatch(
        r"[\w-]+(\\?\.[\w-]+)*", pattern
    ):  # all that most adapters have: plain names, whose dots are any character
        found = re.compile(rf"(?:.*\.)?{pattern}$")
        return lambda name: len(name) < 1 << 12 and found.match(name) is not None
    return LinearPattern(rf"(.*\.)?({pattern})$", steps).match


class _Reading(Generic[T]):
    """The tensors of an adapter, and what becomes of them."""

    def __init__(
        self,
        settings: _Settings,
        tensors: Mapping[str, T],
        shape_of: Callable[[T], tuple[int, ...]],
        name: str,
    ) -> None:
        self.settings, self.tensors, self.shape_of, self.name = settings, tensors, shape_of, name
        self.changes: dict[str, Change[T]] = {}
        self.owner_of: dict[str, str] = {}
        self.nested: dict[str, Nested[T]] = {}
        self.copies: dict[str, T] = {}
        self.flexible: set[str] = set()
        # By module, as its keys name it without the prefix: the keys of its factors by their kind.
        self.factors: dict[str, dict[str, str]] = {}
        self.wholes: list[tuple[str, str]] = []

    def adapter(self) -> Adapter[T]:
        if not self.tensors:
            raise InputError(f"{self.name}: no tensors, expected the factors of an adapter")
        self._sort()
        self._read_factors()
        for key, parameter in self.wholes:
            self._read_whole(key, parameter)
        modules = len(set(self.owner_of.values())) + sum(len(each.levels) for each in self.nested.values())
        if not modules:
            raise InputError(f"{self.name}: no factors (lora_A, lora_B), expected a LoRA adapter")
        return Adapter(
            self.name,
            self.changes,
            modules,
            self.owner_of,
            self.settings.notes,
            self.nested,
            self.copies,
            frozenset(self.flexible),
            self.shape_of,
            self.settings.model_class,
        )

    def _error(self, key: str, problem: str) -> InputError:
        return InputError(f"{self.name}: tensor {short_repr(key)}: {problem}")

    def _sort(self) -> None:
        """Tell factors from whole tensors."""
        for key in self.tensors:
            name = key.removeprefix(_PREFIX)
            if advice := factor_advice(key):
                raise self._error(
                    key,
                    f"{advice}, expected lora_A.weight, lora_B.weight and the like, as PEFT saves an adapter",
                )
            if match := _KEY.fullmatch(name):
                self.factors.setdefault(match["module"], {})[match["kind"]] = key
            else:
                self.wholes.append((key, name))

    def _read_factors(self) -> None:
        levels: dict[str, dict[int, str]] = {}
        for module, kinds in self.factors.items():
            if ".base_layer." in module:
                raise self._error(
                    next(iter(kinds.values())), "of torch.nn.MultiheadAttention, where PEFT adds the difference of out_proj twice, "
                    "at least up to 0.21: merge it into its model first"
                )  # fmt: skip
            outer = module
            while outer.endswith(".base_layer"):
                outer = outer.removesuffix(".base_layer")
            levels.setdefault(outer, {})[(len(module) - len(outer)) // len(".base_layer")] = module
        for outer, found in levels.items():
            kinds = self.factors[found[0]] if 0 in found else {}
            parameters = self.settings.parameters(outer)
            if (
                len(found) > 1
                or 0 not in found
                or (parameters and self._is_matrix(kinds.get("lora_A.weight")))
            ):
                self._read_nested(outer, found, parameters)
            else:
                self._read_module(outer, kinds)

    def _is_matrix(self, key: str | None) -> bool:
        return key is not None and len(self.shape_of(self.tensors[key])) == 2

    def _pair(self, module: str, kinds: dict[str, str], a: str, b: str) -> tuple[str, str]:
        for has, lacks in ((a, b), (b, a)):
            if has in kinds and lacks not in kinds:
                raise self._error(kinds[has], f"without {lacks} of the same module, expected both factors")
        return kinds[a], kinds[b]

    def _read_nested(self, module: str, found: dict[int, str], parameters: tuple[Parameter, ...]) -> None:
        """Factors of parameters that target_parameters names: which of them each is, shapes of the base tell."""
        levels = []
        for depth in sorted(found, reverse=True):
            kinds = self.factors[found[depth]]
            if odd := kinds.keys() - {"lora_A.weight", "lora_B.weight"}:
                raise self._error(kinds[min(odd)], "not understood in a module of target_parameters")
            key_a, key_b = self._pair(found[depth], kinds, "lora_A.weight", "lora_B.weight")
            a, b = (self.shape_of(self.tensors[key]) for key in (key_a, key_b))
            if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in (*a, *b):
                raise self._error(
                    key_b, f"shape {b} beside lora_A of {a}, expected (rows, ranks) and (ranks, columns)"
                )
            levels.append((self.tensors[key_a], self.tensors[key_b]))
        if sorted(found) != list(range(len(found))) or (len(found) > 1 and len(parameters) < len(found)):
            key = self.factors[found[max(found)]]["lora_A.weight"]
            raise self._error(
                key,
                f"nested {max(found)} deep, but target_parameters names {len(parameters)} parameters of {short_repr(module)}",
            )
        if len(found) == 1:
            parameters = (*parameters, Parameter("weight", *self.settings.scale(module), is_weight=True))
        settings = self.settings
        self.nested[module] = Nested(tuple(levels), parameters, settings.fan_in_fan_out, settings.swaps)

    def _read_module(self, module: str, kinds: dict[str, str]) -> None:
        """The factors of a module of target_modules, or the trained rows of an embedding."""
        rank, scale = self.settings.scale(module)
        pairs = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))
        for a, b in pairs:
            if a in kinds or b in kinds:
                keys = self._pair(module, kinds, a, b)
                embedding = a == "lora_embedding_A"
                product = self._product(keys, rank, scale, embedding)
                self._add(f"{module}.weight", product, module, keys[0])
                if not embedding:
                    self.flexible.add(f"{module}.weight")
        if key := kinds.get("lora_B.bias"):
            if not self.settings.lora_bias or "lora_B.weight" not in kinds:
                raise self._error(
                    key, "a bias of a factor, expected lora_bias in the configuration, and lora_B.weight"
                )
            if self.shape_of(self.tensors[key]) != (
                found := self.shape_of(self.tensors[kinds["lora_B.weight"]])[:1]
            ):
                raise self._error(
                    key, f"shape {self.shape_of(self.tensors[key])}, expected {found} as of lora_B.weight"
                )
            self._add(f"{module}.bias", Shift(self.tensors[key], scale), module, key)
        if key := kinds.get("token_adapter.trainable_tokens_delta"):
            self._add(f"{module}.weight", self._rows(key, module), module, key)

    def _product(self, keys: tuple[str, str], rank: int, scale: float, embedding: bool) -> Product[T]:
        a, b = (self.shape_of(self.tensors[key]) for key in keys)
        expected = f"({rank}, …) for the rank {rank} of its configuration"
        if len(a) < 2 or a[0] != rank or 0 in a:
            raise self._error(keys[0], f"shape {a}, expected {expected}")
        if len(b) == len(a) > 2 and b[1] != rank and rank % max(b[1], 1) == 0:
            raise self._error(
                keys[1],
                f"shape {b} of a convolution in groups, expected one group: merge it into its model first",
            )
        if len(b) != len(a) or b[1] != rank or 0 in b:
            raise self._error(
                keys[1],
                f"shape {b}, expected (…, {rank}{', …' * (len(a) > 2)}) for the rank {rank} of its configuration",
            )
        if any(extent != 1 for extent in b[2:]):
            raise self._error(keys[1], f"shape {b}, expected a kernel of 1")
        transposed = embedding or (self.settings.fan_in_fan_out and len(a) == 2)
        return Product(self.tensors[keys[0]], self.tensors[keys[1]], rank, scale, transposed)

    def _rows(self, key: str, module: str) -> Replacement[T]:
        rows, shape = self.settings.rows(module), self.shape_of(self.tensors[key])
        if rows is None:
            raise self._error(
                key, f"no trainable_token_indices of {short_repr(module)}, expected the rows that it replaces"
            )
        if len(shape) != 2 or shape[0] != len(rows) or not rows:
            raise self._error(key, f"shape {shape}, expected {len(rows)} rows as trainable_token_indices has")
        return Replacement(self.tensors[key], rows)

    def _read_whole(self, key: str, name: str) -> None:
        """A tensor that is no factor: one that replaces the base's, or a copy of the base's."""
        settings, value = self.settings, self.tensors[key]
        parts = name.split(".")
        parameter = ".".join(
            p for p in parts if p not in ("base_layer", "original_module", "modules_to_save", "token_adapter")
        )
        module, _, last = parameter.rpartition(".")
        if "modules_to_save" in parts[:-1] and key[: -len(name)] + parameter in self.tensors:
            return  # with bias "all" PEFT saves it twice, and loads the other one
        is_trained = "bias" in last and settings.bias != "none" and "original_module" not in parts
        if not {"base_layer", "original_module"}.isdisjoint(parts[:-1]) and not is_trained:
            if parameter in self.copies:
                raise self._error(key, f"{short_repr(parameter)} is there twice")
            self.copies[parameter] = value
        elif (
            settings.is_saved(parameter)
            or (settings.bias != "none" and "bias" in name)
            or self._is_embedding(key, last)
        ):
            self._add(parameter, Replacement(value), module, key)
        else:
            raise self._error(key, "not understood: no factor, and neither modules_to_save nor bias names it")

    def _is_embedding(self, key: str, last: str) -> bool:
        """Whether it may be an embedding or output layer that was saved whole, because it was resized or on demand."""
        return last == "weight" and len(self.shape_of(self.tensors[key])) == 2

    def _add(self, parameter: str, change: Change[T], module: str, key: str) -> None:
        if parameter in self.changes:
            raise self._error(
                key, f"changes {short_repr(parameter)}, which another tensor of the adapter changes, too"
            )
        self.changes[parameter] = change
        self.owner_of[parameter] = module
