"""The conformance cases and tolerances, read into frozen dataclasses; `attention.md` is normative.

A file of `cases/` holds a family: `[defaults]`, merged under each of its `[[case]]` tables. `axes`
expands a case into one for each combination of values, addressed `family/name[value,value]`: a key
of it is a path such as "dtype" or "sizes.head_dim", its list holds the values, or tables to merge.
Unknown keys, wrong kinds and values out of range are errors.
"""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from .schema import ARGUMENTS, DTYPES, QUANTITIES, Case

__all__ = ["Case", "SpecError", "cases", "declared", "expand", "rules", "tolerances"]

FOLDER = Path(__file__).parent
WORK = {"small": 2**17, "medium": 2**20, "large": 2**31}
"""Bound of `Case.work` for each size."""

Table = dict[str, Any]


class SpecError(ValueError):
    """A case or a tolerance is not what the schema says; the message says where."""


@cache
def rules() -> tuple[str, ...]:
    """Ids of the rules that `attention.md` defines, in its order."""
    text = (FOLDER / "attention.md").read_text(encoding="utf-8")
    return tuple(re.findall(r"^\*\*([A-Z]\d) ", text, flags=re.MULTILINE))


@cache
def cases() -> Mapping[str, Case]:
    """Every case by its id, axes expanded."""
    found: dict[str, Case] = {}
    for family, table in declared():
        for case in expand(family, table):
            if case.id in found:
                raise SpecError(f"{case.id}: this id is taken")
            found[case.id] = case
    return MappingProxyType(found)


def declared() -> list[tuple[str, Table]]:
    """`(family, table)` of every case as written, defaults merged in, axes not expanded."""
    found = []
    for path in sorted((FOLDER / "cases").glob("*.toml")):
        file = tomllib.loads(path.read_text(encoding="utf-8"))
        unknown = file.keys() - {"defaults", "case"}
        if unknown or "case" not in file:
            raise SpecError(f"{path.name}: got {sorted(file)}, expected [defaults] and [[case]]")
        found += [(path.stem, _merge(file.get("defaults", {}), case)) for case in file["case"]]
    return found


def expand(family: str, table: Table) -> list[Case]:
    """The cases that one table of a family stands for."""
    table = dict(table)
    axes = table.pop("axes", {})
    name = f"{family}/{table.pop('id', '')}"
    if not re.fullmatch(r"[a-z0-9-]+/[a-z0-9-]+", name):
        raise SpecError(f"{name}: an id is made of a-z, 0-9 and -")
    if not all(isinstance(values, list) and values for values in axes.values()):
        raise SpecError(f"{name}: each axis is a list of values, not an empty one")
    found = []
    for values in itertools.product(*axes.values()):
        point = table
        for path, value in zip(axes, values, strict=True):
            point = _merge(point, _nest(path.split("."), value))
        label = ",".join(_label(value) for value in values)
        found.append(_case(f"{name}[{label}]" if values else name, point))
    return found


@cache
def tolerances() -> Mapping[str, Mapping[str, float]]:
    """The floor of N1: dtype -> quantity -> error in units of max(1, largest |x64|)."""
    path = FOLDER / "tolerances.toml"
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    if tuple(table) != DTYPES or any(tuple(row) != QUANTITIES for row in table.values()):
        raise SpecError(f"{path.name}: expected the tables {DTYPES}, each of {QUANTITIES}")
    if not all(isinstance(x, float) and x >= 0 for row in table.values() for x in row.values()):
        raise SpecError(f"{path.name}: every floor is a float >= 0")
    return MappingProxyType({key: MappingProxyType(row) for key, row in table.items()})


def _case(name: str, table: Table) -> Case:
    table = _merge(table, {"id": name, "sizes": _fill_sizes(name, table)})
    if isinstance(table.get("intervals"), dict):
        table["intervals"] = [table["intervals"]]
    if "grads" not in table:
        given = {"q", "k", "v"} | ({"bias"} & table.keys())
        given |= {"gate_q", "gate_k"} if "gates" in table else set()
        none = "cache" in table or "reject" in table
        table["grads"] = [] if none else [x for x in ARGUMENTS if x in given]
    case = _read(Case, table, name)
    _check(case)
    return case


def _fill_sizes(name: str, table: Table) -> Table:
    """Sizes with what a case may leave out."""
    sizes = dict(table.get("sizes", {}))
    if "packed" in table:
        derived = {"batch", "seqlen_q", "seqlen_k"} & sizes.keys()
        if derived:
            raise SpecError(f"{name}: {sorted(derived)} follow from the packed lengths")
        packed = table["packed"]
        lengths_q, lengths_k = (packed.get(f"lengths_{x}", []) for x in "qk")
        spare_q, spare_k = (packed.get(f"spare_{x}", 0) for x in "qk")
        sizes |= {"batch": len(lengths_q)}
        sizes |= {"seqlen_q": sum(lengths_q) + spare_q, "seqlen_k": sum(lengths_k) + spare_k}
    defaults = {"seqlen_k": "seqlen_q", "heads_kv": "heads_q", "head_dim_v": "head_dim"}
    for missing, source in defaults.items():
        if source in sizes:
            sizes.setdefault(missing, sizes[source])
    return sizes


def _check(case: Case) -> None:
    """What the types of single fields do not say."""
    sizes = case.sizes
    lengths_q, lengths_k = (
        (case.packed.lengths_q, case.packed.lengths_k) if case.packed else ((), ())
    )
    page, lengths = (case.cache.page, case.cache.lengths) if case.cache else (0, ())
    shapes = [(x.shape, 4) for x in (case.mask, case.bias) if x]
    shapes += [(x.shape, 2) for x in (*case.intervals, case.block_map) if x]
    symbols = (("1", "B"), ("1", "Hkv", "Hq"), ("1", "Sq"), ("1", "Sk"))
    conditions = {
        f"rules are among {rules()}": all(x in rules() for x in case.rules),
        "an invalid case asks for no gradient": not (case.reject and case.grads),
        "heads_q is a multiple of heads_kv": sizes.heads_q % sizes.heads_kv == 0,
        f"size {case.size} means at most {WORK[case.size]} pairs": case.work <= WORK[case.size],
        "packed lengths agree in number": len(lengths_q) == len(lengths_k),
        "packed and cache exclude each other": not (case.packed and case.cache),
        "lengths are one a sequence": len(lengths) in (0, sizes.batch),
        "lengths fit the cache": all(x <= sizes.seqlen_k for x in lengths),
        "pages need lengths and fill the cache": not page
        or (bool(lengths) and sizes.seqlen_k % page == 0),
        "gradients are of arguments that are given": set(case.grads)
        <= {"q", "k", "v"}
        | ({"bias"} if case.bias else set())
        | ({"gate_q", "gate_k"} if case.gates else set()),
        "a block size has two sides": not case.block_map or len(case.block_map.block_size) == 2,
        "each symbol of a shape is allowed where it stands": all(
            len(shape.split()) == rank
            and all(x in allowed for x, allowed in zip(shape.split(), symbols, strict=False))
            for shape, rank in shapes
        ),
    }
    broken = [text for text, holds in conditions.items() if not holds]
    if broken:
        raise SpecError(f"{case.id}: not so: {'; '.join(broken)}")


def _merge(under: Table, over: Table) -> Table:
    """`over` on top of `under`, tables merged key by key."""
    both = dict(under)
    for key, value in over.items():
        inner = isinstance(value, dict) and isinstance(both.get(key), dict)
        both[key] = _merge(both[key], value) if inner else value
    return both


def _nest(path: list[str], value: Any) -> Table:
    for key in reversed(path):
        value = {key: value}
    return value


def _label(value: Any) -> str:
    if isinstance(value, dict):
        return "+".join(f"{key}={_label(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return "x".join(map(_label, value))
    return str(value).replace(" ", "x")


def _read(kind: Any, value: Any, where: str) -> Any:
    """`value` as the annotation `kind` has it, or a `SpecError` that says where it is not."""
    origin = get_origin(kind)
    if origin is Annotated:
        base, holds = get_args(kind)
        value = _read(base, value, where)
        if not holds(value):
            raise SpecError(f"{where}: {value!r} is out of range")
        return value
    if origin in (Union, UnionType):
        return _read_union(kind, value, where)
    if origin is Literal:
        if value not in get_args(kind):
            raise SpecError(f"{where}: got {value!r}, expected one of {get_args(kind)}")
        return value
    if origin is tuple and isinstance(value, list):
        inner = get_args(kind)[0]
        return tuple(_read(inner, x, f"{where}[{n}]") for n, x in enumerate(value))
    if origin is Mapping and isinstance(value, dict):
        key_kind, inner = get_args(kind)
        pairs = {
            _read(key_kind, k, where): _read(inner, x, f"{where}.{k}") for k, x in value.items()
        }
        return MappingProxyType(pairs)
    if hasattr(kind, "__dataclass_fields__") and isinstance(value, dict):
        return _read_fields(kind, value, where)
    if kind is float and type(value) is int:
        return float(value)
    if isinstance(kind, type) and type(value) is kind:
        return value
    raise SpecError(f"{where}: got {value!r}, expected {kind}")


def _read_union(kind: Any, value: Any, where: str) -> Any:
    """The first member that takes the value as it is."""
    for member in get_args(kind):
        if member is float and type(value) is int and int in get_args(kind):
            continue
        try:
            return _read(member, value, where)
        except SpecError as error:
            last = error
    if len(get_args(kind)) == 2 and NoneType in get_args(kind):
        return _read(get_args(kind)[0], value, where)  # its message is the more telling one
    raise SpecError(f"{where}: got {value!r}, expected {kind}") from last


def _read_fields(kind: Any, table: Table, where: str) -> Any:
    hints = get_type_hints(kind, include_extras=True)
    unknown = table.keys() - hints.keys()
    if unknown:
        raise SpecError(f"{where}: unknown keys {sorted(unknown)}, known are {sorted(hints)}")
    read = {key: _read(hints[key], value, f"{where}.{key}") for key, value in table.items()}
    try:
        return kind(**read)
    except TypeError as error:  # a required field is missing
        raise SpecError(f"{where}: {error}") from error
