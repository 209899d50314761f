"""The one loader of YAML: limits of size, depth and aliases, no duplicate keys, finite numbers, printable text.

Text that YAML 1.1 turns into something else than what was meant stays text: dates, and `8:32`, which would be 512.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Hashable
from typing import Any

import yaml

LARGEST_FILE = 4_000_000  # bytes
_DEEPEST = 50
_MOST_NODES = 200_000
"""With every alias counted as what it stands for."""
_LONGEST_INTEGER, _LONGEST_NUMBER = 18, 40  # characters; so that an integer has 64 bits
_MERGE = "tag:yaml.org,2002:merge"
_REPLACED = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class Unacceptable(ValueError):
    """YAML that is refused; the message says why, with the line."""


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # libyaml: ten times as fast
    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


# PyYAML's own patterns, without numbers in base 60.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"[-+]?(?:0b[01_]+|0[0-7_]+|0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+][0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def load(text: str) -> Any:
    """The value of a YAML document. Raises `yaml.YAMLError`, and `Unacceptable` for what is beyond the limits."""
    _check_size(text)
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_nodes(node)
        try:
            return loader.construct_document(node)
        except (ValueError, OverflowError) as error:  # for example, of `!!timestamp 2024-13-45`
            raise Unacceptable(str(error)) from error
    finally:
        loader.dispose()


def _check_size(text: str) -> None:
    """From the events alone, before anything is built."""
    if len(text) > LARGEST_FILE:
        raise Unacceptable(f"larger than {LARGEST_FILE // 1_000_000} MB")
    count = 0
    anchored: dict[str, int] = {}
    opened: list[tuple[str | None, int]] = []
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in opened):
                raise Unacceptable(f"line {_line(event)}: *{event.anchor} refers to itself")
            count += anchored.get(str(event.anchor), 0)
        elif isinstance(event, yaml.NodeEvent):
            before, count = count, count + 1
            if isinstance(event, yaml.CollectionStartEvent):
                opened.append((event.anchor, before))
            elif event.anchor:
                anchored[event.anchor] = 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            if anchor:
                anchored[anchor] = count - before
        if len(opened) > _DEEPEST:
            raise Unacceptable(f"line {_line(event)}: nested deeper than {_DEEPEST} levels")
        if count > _MOST_NODES:
            raise Unacceptable(f"line {_line(event)}: more than {_MOST_NODES:,} values, with what aliases stand for")


def _check_nodes(root: yaml.Node) -> None:
    seen: set[int] = set()
    pending: list[tuple[yaml.Node, str]] = [(root, "")]
    while pending:
        node, key = pending.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
            pending += [(value, _name(name)) for name, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            pending += [(value, key) for value in node.value]
        elif isinstance(node, yaml.ScalarNode):
            _check_scalar(node, key)


def _check_keys(node: yaml.MappingNode) -> None:
    names: set[Hashable] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise Unacceptable(f"line {_line(key)}: a list or mapping as a key")
        if not key.value.isprintable():
            raise Unacceptable(
                f"line {_line(key)}: key {key.value[:50]!r} has a line break or another control character"
            )
        if (key.tag, key.value) in names and key.tag != _MERGE:
            raise Unacceptable(f"line {_line(key)}: {_name(key)} appears twice")
        names.add((key.tag, key.value))
        _check_scalar(key, "")


def _check_scalar(node: yaml.ScalarNode, key: str) -> None:
    where = f"line {_line(node)}: {key}: " if key else f"line {_line(node)}: "
    if found := _CONTROL.search(node.value):
        raise Unacceptable(f"{where}has the control character {found[0]!r}")
    if node.tag.endswith((":int", ":float")):
        digits = node.value.lstrip("-+").replace("_", "")
        longest = _LONGEST_INTEGER if node.tag.endswith(":int") else _LONGEST_NUMBER
        if len(digits) > longest:
            raise Unacceptable(f"{where}a number of {len(digits)} characters; use at most {longest}")
        if node.tag.endswith(":int"):
            return
        value = 0.0
        with contextlib.suppress(ValueError):  # other text with the tag !!float: refused when it is read
            value = float(digits.lower().replace(".inf", "inf").replace(".nan", "nan"))
        if not math.isfinite(value):
            raise Unacceptable(f"{where}{node.value} is not a finite number")


def _line(of: Any) -> int:
    return int(of.start_mark.line) + 1


def _name(key: yaml.Node) -> str:
    return str(key.value)[:50]
