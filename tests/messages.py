"""The messages that a package's code can give, read off its source.

A message is what is raised, what ``refuse`` is called with, and what is logged as a warning or
worse. Where code puts a value into a message, the message here has ``…``, unless the value is a
string that another module defines (``settings.CACHE``). A message that comes from a function
(``return "…"``) or a name is followed there. In C++ it is what ``fail`` is called with.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HOLE = "…"
_LEVELS = {"warning", "warning_once", "error", "exception", "critical"}
_DEPTH = 4
_DIRECTIVE = r"%[.\d]*(?:ll)?[sdgrf]"
_FAIL = re.compile(r'\bfail\(\s*((?:"(?:[^"\\]|\\.)*"\s*)+)')


@dataclass(frozen=True)
class Message:
    """One message, and where it is given."""

    text: str
    where: str


@dataclass
class _Scope:
    """Where a name in a message may come from: the enclosing function, then its module."""

    function: ast.AST
    module: ast.Module

    def value(self, name: str) -> ast.expr | None:
        for place in (self.function, self.module):
            for node in ast.walk(place):
                if isinstance(node, ast.NamedExpr | ast.Assign | ast.AnnAssign) and node.value:
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    if any(isinstance(t, ast.Name) and t.id == name for t in targets):
                        return node.value
        return None


class Source:
    """All modules in ``folders``.

    Args:
        folders: of packages; functions that messages come from are looked up in all of them.
    """

    def __init__(self, *folders: Path) -> None:
        self.modules = {
            file: ast.parse(file.read_text(encoding="utf-8"))
            for folder in folders
            for file in sorted(folder.rglob("*.py"))
        }
        self.cpp = {
            file: file.read_text(encoding="utf-8")
            for folder in folders
            for file in sorted([*folder.rglob("*.cpp"), *folder.rglob("*.h")])
        }
        self.functions: dict[str, list[_Scope]] = {}
        for module in self.modules.values():
            for node in ast.walk(module):
                if isinstance(node, ast.FunctionDef):
                    self.functions.setdefault(node.name, []).append(_Scope(node, module))

    def messages(self, folder: Path) -> Iterator[Message]:
        """Of the modules below ``folder``; one that cannot be read off has no letters."""
        for file, module in self.modules.items():
            if not file.is_relative_to(folder):
                continue
            for function in [n for n in ast.walk(module) if isinstance(n, ast.FunctionDef)]:
                if function.name == "refuse":  # passes on what it is given
                    continue
                scope = _Scope(function, module)
                for node in _own_nodes(function):
                    expression = _message_of(node)
                    if expression is not None:
                        where = f"{file.name}:{node.lineno}"
                        yield from (Message(t, where) for t in self._texts(expression, scope))

        for file, text in self.cpp.items():
            for found in _FAIL.finditer(text) if file.is_relative_to(folder) else ():
                parts = re.findall(r'"((?:[^"\\]|\\.)*)"', found[1])
                where = f"{file.name}:{text.count(chr(10), 0, found.start()) + 1}"
                yield Message(re.sub(_DIRECTIVE, HOLE, "".join(parts)), where)

    def _texts(self, node: ast.expr, scope: _Scope, depth: int = _DEPTH) -> list[str]:
        """What ``node`` may be as a string, with holes."""
        if isinstance(node, ast.Constant):
            if not isinstance(node.value, str):
                return []
            return [re.sub(rf"{_DIRECTIVE}|\{{\w*\}}", HOLE, node.value)]
        if isinstance(node, ast.JoinedStr):
            return self._joined(node, scope, depth)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            left, right = (self._texts(side, scope, depth) for side in (node.left, node.right))
            return [a + b for a in left for b in right]
        if isinstance(node, ast.IfExp):
            branches = (self._texts(branch, scope, depth) for branch in (node.body, node.orelse))
            return [text for branch in branches for text in branch]
        if isinstance(node, ast.Call) and depth:
            return self._called(node, scope, depth)
        if isinstance(node, ast.Name) and depth and (value := scope.value(node.id)) is not None:
            return self._texts(value, scope, depth - 1)
        return [HOLE]

    def _joined(self, node: ast.JoinedStr, scope: _Scope, depth: int) -> list[str]:
        texts = [""]
        for part in node.values:
            more = [HOLE]
            if isinstance(part, ast.Constant):
                more = [str(part.value)]
            elif isinstance(part, ast.FormattedValue):
                more = [self._constant(part.value) or HOLE]
            texts = [a + b for a in texts for b in more]
        if any(has_words(text) for text in texts):
            return texts
        # All of it is put in: the message is what the last value is.
        values = [part.value for part in node.values if isinstance(part, ast.FormattedValue)]
        return self._texts(values[-1], scope, depth - 1) if values and depth else texts

    def _constant(self, node: ast.expr) -> str | None:
        """The string that ``module.NAME`` is, None for anything else."""
        if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
            return None
        for file, module in self.modules.items():
            if file.stem == node.value.id:
                value = _Scope(module, module).value(node.attr)
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    return value.value
        return None

    def _called(self, node: ast.Call, scope: _Scope, depth: int) -> list[str]:
        function = node.func
        if isinstance(function, ast.Attribute) and function.attr == "format":
            return self._texts(function.value, scope, depth - 1)
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        found = []
        for inner in self.functions.get(name, []):
            for part in ast.walk(inner.function):
                if isinstance(part, ast.Return) and part.value is not None:
                    found += self._texts(part.value, inner, depth - 1)
        return [text for text in found if has_words(text)] or [HOLE]


def has_words(text: str) -> bool:
    """Whether ``text`` says something by itself."""
    return re.search(r"[A-Za-z]{3,}", text.replace(HOLE, " ")) is not None


def _own_nodes(function: ast.FunctionDef) -> Iterator[ast.stmt | ast.expr]:
    """Statements and expressions of ``function``, not of functions in it."""
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop(0)
        if isinstance(node, ast.FunctionDef):
            continue
        if isinstance(node, ast.stmt | ast.expr):
            yield node
        waiting += ast.iter_child_nodes(node)


def _message_of(node: ast.AST) -> ast.expr | None:
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
        return node.exc.args[0]
    if not isinstance(node, ast.Call) or not node.args:
        return None
    function = node.func
    if not isinstance(function, ast.Attribute):
        return None
    if function.attr == "refuse":
        return node.args[0]
    owner = function.value
    if function.attr in _LEVELS and isinstance(owner, ast.Name) and owner.id == "logger":
        return _logged(node.args[0], node.args[1:])
    return None


def _logged(first: ast.expr, values: list[ast.expr]) -> ast.expr:
    """What a logger makes of a format and its values."""
    if not isinstance(first, ast.Constant) or not isinstance(first.value, str):
        return first
    if first.value == "%s":
        return values[0]
    texts = re.split(_DIRECTIVE, first.value)
    if len(texts) != len(values) + 1 or not has_words("".join(texts)):
        return first
    parts: list[ast.expr] = [ast.Constant(texts[0])]
    for value, text in zip(values, texts[1:], strict=True):
        parts += [ast.FormattedValue(value, -1), ast.Constant(text)]
    return ast.JoinedStr(parts)
