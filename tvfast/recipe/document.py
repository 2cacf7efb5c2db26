"""YAML text as a tree of values that know where they stand; size and depth are bounded while it is read."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any, NoReturn, TypeAlias

import yaml
from yaml.reader import Reader

from tvfast.errors import RecipeError

MAX_CHARACTERS = 1_000_000
MAX_NODES = 100_000  # aliases count as what they stand for
MAX_DEPTH = 32
MAX_NUMBER = 64  # characters of a scalar that is read as a number
SHOWN = 60  # characters of a value in a message
MOST_SHOWN = 300  # of what the YAML parser says

Scalar: TypeAlias = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Node:
    """One value of the document; `size` counts it and everything below. Aliases share one."""

    value: Scalar | tuple[Node, ...] | dict[str, tuple[int | None, Node]]
    line: int | None
    size: int = 1


@dataclass(frozen=True, slots=True)
class Value:
    """A node at one place of the document.

    Attributes:
        node: what is there.
        path: keys and positions that lead to it, such as `models[0].parameters`; empty for the document.
        line: of its key, from 1; None where there was no text.
        where: the file, or what stands for it.
    """

    node: Node
    path: str
    line: int | None
    where: str

    @property
    def plain(self) -> Any:
        """The scalar itself; a tuple or dict for anything else."""
        return self.node.value

    @property
    def found(self) -> str:
        """What it is, in a few words."""
        value = self.node.value
        if isinstance(value, tuple):
            return f"a list of {len(value)}" if value else "an empty list"
        if isinstance(value, dict):
            keys = shortened(", ".join(value))
            return f"a mapping with {keys}" if value else "an empty mapping"
        if value is None:
            return "empty (null)"
        if isinstance(value, bool):
            return "true" if value else "false"
        return shortened(repr(value))

    def error(self, message: str) -> RecipeError:
        """An error about this place."""
        line = "" if self.line is None else f", line {self.line}"
        path = f"{self.path}: " if self.path else ""
        return RecipeError(f"{self.where}{line}: {path}{message}")

    def expected(self, what: str) -> RecipeError:
        """The error that something else was expected here."""
        return self.error(f"is {self.found}; expected {what}.")

    def mapping(self, known: Sequence[str] | None = None, what: str = "a mapping") -> dict[str, Value]:
        """The entries of a mapping.

        Args:
            known: keys that it may have; None: any.

        Raises:
            RecipeError: it is none, or has an unknown key; the nearest known one is named.
        """
        entries = self.node.value
        if not isinstance(entries, dict):
            raise self.expected(what)
        dot = f"{self.path}." if self.path else ""
        found = {
            key: Value(node, dot + shortened(key), line, self.where) for key, (line, node) in entries.items()
        }
        for key, value in found.items():
            if known is not None and key not in known:
                raise value.error(
                    f"no such key.{nearest(key, known)} Expected {', '.join(known[:-1])} or {known[-1]}."
                )
        return found

    def sequence(self, what: str) -> list[Value]:
        """The items of a list.

        Raises:
            RecipeError: it is none.
        """
        items = self.node.value
        if not isinstance(items, tuple):
            raise self.expected(what)
        return [Value(node, f"{self.path}[{i}]", node.line, self.where) for i, node in enumerate(items)]

    def text(self, what: str) -> str:
        """A text that is not empty.

        Raises:
            RecipeError: it is none.
        """
        if not isinstance(self.node.value, str) or not self.node.value:
            raise self.expected(what)
        return self.node.value


def plain_data(value: Value) -> Any:
    """Plain Python data again."""
    if isinstance(value.plain, dict):
        return {key: plain_data(item) for key, item in value.mapping().items()}
    if isinstance(value.plain, tuple):
        return [plain_data(item) for item in value.sequence("a list")]
    return value.plain


def nearest(found: str, known: Sequence[str]) -> str:
    """ " Did you mean 'x'?" for the nearest known word, in upper or lower case, or nothing."""
    words = {word.lower(): word for word in known}
    matches = get_close_matches(found[:SHOWN].lower(), words, n=1)
    return f" Did you mean {words[matches[0]]!r}?" if matches else ""


def shortened(text: str, most: int = SHOWN) -> str:
    """At most so many characters, all of them printable."""
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= most else text[: most - 3] + "..."


# -- from Python objects --------------------------------------------------------------------------------


def from_mapping(source: Mapping[str, Any], where: str) -> Value:
    """The same tree from plain Python data.

    Raises:
        RecipeError: a key or value that YAML could not hold, or too many of them.
    """
    n_nodes = 0

    def build(value: Any, path: str, depth: int) -> Node:
        nonlocal n_nodes
        n_nodes += 1
        if n_nodes > MAX_NODES or depth > MAX_DEPTH:
            raise RecipeError(
                f"{where}: {shortened(path)}: deeper than {MAX_DEPTH}, or more than {MAX_NODES} values; "
                "expected a recipe."
            )
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if isinstance(value, Mapping):
            entries: dict[str, tuple[int | None, Node]] = {}
            for key, item in value.items():
                if not isinstance(key, str):
                    raise RecipeError(
                        f"{where}: {path or 'the recipe'} has the key {shortened(repr(key))}; "
                        "expected texts as keys."
                    )
                entries[key] = (None, build(item, f"{path}.{key}" if path else key, depth + 1))
            return Node(entries, None)
        if isinstance(value, list | tuple):
            items = tuple(build(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value))
            return Node(items, None)
        if value is None or isinstance(value, str | bool):
            return Node(value, None)
        if isinstance(value, Integral):
            return Node(int(value), None)
        if isinstance(value, Real):
            return Node(float(value), None)
        raise RecipeError(
            f"{where}: {path}: is a {type(value).__name__}; expected text, a number, true, false, null, a "
            "list or a mapping."
        )

    return Value(build(source, "", 0), "", None, where)


# -- from text ------------------------------------------------------------------------------------------

try:
    from yaml import CSafeLoader as _Base
except ImportError:  # PyYAML was built without libyaml
    from yaml import SafeLoader as _Base  # type: ignore[assignment]

_TAG = "tag:yaml.org,2002:"
_READ = {f"{_TAG}{name}" for name in ("int", "float", "bool", "null")}
_TEXT = {f"{_TAG}{name}" for name in ("str", "timestamp", "value", "merge")}  # the last three: texts to us
_MERGE = "<<"
_CONTROL = Reader.NON_PRINTABLE


class _Loader(_Base):
    """PyYAML's safe loader, of which events and the reading of scalars are used; it builds nothing itself."""

    def read(self, event: yaml.ScalarEvent) -> Scalar:
        """A scalar as YAML 1.1 reads it; dates stay texts.

        Raises:
            ValueError: the text does not fit its tag.
        """
        tag = event.tag
        if tag is None or tag == "!":
            implicit = event.implicit if tag is None else (False, True)
            tag = self.resolve(yaml.ScalarNode, event.value, implicit)  # type: ignore[no-untyped-call]
        if tag in _TEXT:
            return str(event.value)
        if tag not in _READ:
            raise ValueError(f"the tag {shortened(str(tag))} is not supported; remove it")
        if len(event.value) > MAX_NUMBER:
            raise ValueError(f"a number of {len(event.value)} characters; expected at most {MAX_NUMBER}")
        node = yaml.ScalarNode(tag, event.value)
        try:
            value: Scalar = self.yaml_constructors[tag](self, node)
        except (ValueError, KeyError, IndexError, OverflowError, AttributeError):
            raise ValueError(f"{shortened(repr(event.value))} is no {tag.removeprefix(_TAG)}") from None
        return value


@dataclass(slots=True)
class _Open:
    """A collection that has begun."""

    is_mapping: bool
    line: int
    anchor: str | None
    nodes: list[Node]  # items, or keys and values in turn


class _Composer:
    """Events to nodes, with a stack of its own: neither depth nor aliases can exhaust anything."""

    def __init__(self, text: str, where: str) -> None:
        self.where = where
        self.loader = _Loader(text)
        self.anchors: dict[str, Node] = {}
        self.open: list[_Open] = []
        self.n_nodes = 0

    def documents(self) -> list[Node]:
        """Every document of the text that is not empty, with its own anchors."""
        found: list[Node] = []
        root: Node | None = None
        event: Any
        while self.loader.check_event():
            event = self.loader.get_event()
            line = event.start_mark.line + 1
            if isinstance(event, yaml.DocumentStartEvent):
                root = None
                self.anchors.clear()
            elif isinstance(event, yaml.DocumentEndEvent):
                if root is not None and root.value is not None:
                    found.append(root)
            elif isinstance(event, yaml.CollectionStartEvent):
                self.begin(event, line)
            elif isinstance(event, yaml.CollectionEndEvent):
                root = self.add(self.end())
            elif isinstance(event, yaml.ScalarEvent):
                root = self.add(self.scalar(event, line))
            elif isinstance(event, yaml.AliasEvent):
                root = self.add(self.alias(event.anchor or "", line))
        return found

    def fail(self, line: int, message: str) -> NoReturn:
        raise RecipeError(f"{self.where}, line {line}: {message}")

    def begin(self, event: yaml.CollectionStartEvent, line: int) -> None:
        is_mapping = isinstance(event, yaml.MappingStartEvent)
        if event.tag not in (None, "!", f"{_TAG}{'map' if is_mapping else 'seq'}"):
            self.fail(line, f"the tag {shortened(str(event.tag))} is not supported; remove it.")
        if len(self.open) >= MAX_DEPTH:
            self.fail(line, f"nested deeper than {MAX_DEPTH}. Expected a recipe.")
        self.count(1, line)
        self.open.append(_Open(is_mapping, line, event.anchor, []))

    def end(self) -> Node:
        done = self.open.pop()
        size = 1 + sum(node.size for node in done.nodes)
        if done.is_mapping:
            node = Node(self.entries(done.nodes), done.line, size)
        else:
            node = Node(tuple(done.nodes), done.line, size)
        return self.named(node, done.anchor)

    def scalar(self, event: yaml.ScalarEvent, line: int) -> Node:
        self.count(1, line)
        try:
            value = self.loader.read(event)
        except ValueError as error:
            self.fail(line, f"{error}.")
        return self.named(Node(value, line), event.anchor)

    def alias(self, anchor: str, line: int) -> Node:
        if anchor not in self.anchors:
            name = shortened(anchor)
            self.fail(
                line, f"the alias *{name} stands for nothing that ends before it; expected &{name} there."
            )
        node = self.anchors[anchor]
        self.count(node.size, line)
        return node

    def named(self, node: Node, anchor: str | None) -> Node:
        if anchor is not None:
            self.anchors[anchor] = node
        return node

    def add(self, node: Node) -> Node:
        if self.open:
            self.open[-1].nodes.append(node)
        return node

    def count(self, n_nodes: int, line: int) -> None:
        self.n_nodes += n_nodes
        if self.n_nodes > MAX_NODES:
            self.fail(line, f"more than {MAX_NODES} values; an alias counts as what it stands for.")

    def entries(self, nodes: list[Node]) -> dict[str, tuple[int | None, Node]]:
        """Keys and values in turn as a mapping; `<<` adds the entries of others."""
        own: dict[str, tuple[int | None, Node]] = {}
        merged: dict[str, tuple[int | None, Node]] = {}
        for key, value in zip(nodes[::2], nodes[1::2], strict=True):
            line = key.line or 0
            if not isinstance(key.value, str):
                shown = Value(key, "", None, "").found
                self.fail(line, f"a key is {shown}; expected a text. Put it in quotes.")
            if key.value == _MERGE:
                for entry, item in self.sources(value, line):
                    merged.setdefault(entry, item)
            elif key.value in own:
                first = own[key.value][0]
                self.fail(
                    line, f"key {shortened(key.value)!r} is there twice, first in line {first}. Remove one."
                )
            else:
                own[key.value] = (line, value)
        return {**{key: item for key, item in merged.items() if key not in own}, **own}

    def sources(self, value: Node, line: int) -> list[tuple[str, tuple[int | None, Node]]]:
        """The entries that `<<` adds, the first to win first."""
        mappings = value.value if isinstance(value.value, tuple) else (value,)
        found: list[tuple[str, tuple[int | None, Node]]] = []
        for mapping in mappings:
            if not isinstance(mapping.value, dict):
                self.fail(line, "'<<' stands before something else; expected a mapping, or a list of them.")
            found += mapping.value.items()
        return found


def compose(text: str, where: str) -> Value:
    """The one document of a text.

    Raises:
        RecipeError: as `compose_all`; or there are several.
    """
    found = compose_all(text, where)
    if len(found) > 1:
        raise found[1].error("a second document begins; expected one per file. Split the file.")
    return found[0]


def compose_all(text: str, where: str) -> list[Value]:
    """The documents of a text, at least one.

    Raises:
        RecipeError: no YAML, or YAML that no recipe needs: too large, too deep, tags other than those of
            scalars, equal keys, keys that are no texts.

    Notes:
        Linear in the text. An alias costs nothing, but counts.
    """
    if len(text) > MAX_CHARACTERS:
        raise RecipeError(f"{where}: has {len(text)} characters; expected at most {MAX_CHARACTERS}.")
    if bad := _CONTROL.search(text):
        line = text.count("\n", 0, bad.start()) + 1
        column = bad.start() - text.rfind("\n", 0, bad.start())
        raise RecipeError(
            f"{where}, line {line}, column {column}: has the character U+{ord(bad[0]):04X}; expected text."
        )
    try:
        nodes = _Composer(text, where).documents()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = shortened(", ".join(part for part in (error.context, error.problem) if part), MOST_SHOWN)
        advice = "Expected YAML; check indentation, brackets and quotes."
        raise RecipeError(f"{where}{place}: {what}. {advice}") from None
    except yaml.YAMLError as error:
        what = shortened(str(error).splitlines()[0]) if str(error) else "broken YAML"
        raise RecipeError(f"{where}: {what}. Expected YAML text.") from None
    if not nodes:
        raise RecipeError(f"{where}: is empty; expected a mapping with merge_method and models.")
    return [Value(node, "", node.line, where) for node in nodes]
