"""The parts of a model: folders with weights of their own, which an index file of the model names.

sentence-transformers lists its modules in modules.json, and those of a router in router_config.json; a diffusers pipeline
lists its components in model_index.json. A part may have parts of its own.
"""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..core.errors import InputError, short_repr
from .lfs import refuse_pointer
from .reader import File
from .strict_json import parse_value
from .weights import USUAL, is_inside, refuse_links

_MODULES, _PIPELINE = "modules.json", "model_index.json"
# Old routers have the same in their config.json.
_ROUTER = "router_config.json"
CONFIG = "config.json"
_MAX_INDEX_BYTES = 10_000_000
_MAX_PARTS = 1000


def find_parts(root: Path) -> dict[str, Path | None]:
    """Find the folders of a model that may hold weights.

    Returns:
        The file that names each folder, by the folder relative to root. "" is root itself, which no file need name; if one
        names others only, root is a part if it has weights of the usual name. A pipeline has none of its own.

    Raises:
        InputError: If an index is malformed, or names a folder outside of the model.
    """
    found: dict[str, Path | None] = {}
    pending: list[tuple[str, Path | None]] = [("", None)]
    while pending:
        folder, named_by = pending.pop(0)
        if folder in found:
            continue
        if len(found) == _MAX_PARTS:
            raise InputError(f"{root}: more than {_MAX_PARTS} parts")
        found[folder] = named_by
        for index, name in _named_in(root / folder):
            part = posixpath.normpath(name) if isinstance(name, str) and name else name or "."
            if part == ".":
                found[folder] = index
                continue
            inner = posixpath.join(folder, part) if isinstance(part, str) else part
            if not is_inside(part) or not is_inside(inner):
                raise InputError(
                    f"{index}: names the part {short_repr(name)}, expected a folder of this directory"
                )
            if os.path.isdir(root / inner):  # an empty one is often missing
                refuse_links(root, inner, index)
                pending.append((inner, index))
    if len(found) > 1 and found[""] is None and not any(os.path.isfile(root / n) for n in USUAL):
        del found[""]
    return {
        folder: named_by
        for folder, named_by in found.items()
        if not os.path.isfile(root / folder / _PIPELINE)
    }


def _named_in(folder: Path) -> Iterator[tuple[Path, Any]]:
    """The paths of parts that the indexes of a folder name, each with its index."""
    modules = _read(folder / _MODULES)
    for module in modules if isinstance(modules, list) else ():
        if not isinstance(module, dict) or "path" not in module or not isinstance(module["path"], str):
            raise InputError(
                f"{folder / _MODULES}: has the module {short_repr(module)}, expected an object with a path"
            )
        yield folder / _MODULES, module["path"]
    pipeline = _read(folder / _PIPELINE)
    for name, component in pipeline.items() if isinstance(pipeline, dict) else ():
        is_component = isinstance(component, list) and len(component) == 2 and isinstance(component[1], str)
        if is_component and not name.startswith("_"):
            yield folder / _PIPELINE, name
    for index, router in ((_ROUTER, _read(folder / _ROUTER)), (CONFIG, read_config(folder))):
        types = router.get("types") if isinstance(router, dict) else None
        if isinstance(types, dict) and isinstance(router.get("structure"), dict):
            for name in types:
                yield folder / index, name


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder; empty if there is none that can be read as an object."""
    path = folder / CONFIG
    if not os.path.isfile(path):
        return {}
    file = File.at(path)
    raw = file.read(0, min(file.size, _MAX_INDEX_BYTES))
    refuse_pointer(path, raw)
    try:  # as leniently as those who load it: a time limit is Infinity in some
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _read(path: Path) -> Any:
    if not os.path.isfile(path):
        return None
    file = File.at(path)
    if file.size > _MAX_INDEX_BYTES:
        raise InputError(f"{path}: {file.size} bytes, expected an index of at most {_MAX_INDEX_BYTES}")
    return parse_value(file.read(0, file.size), path, "index")
