"""Names that a function uses and wouldn't have in a job: those of its file, and of functions around it."""

from __future__ import annotations

import ast
import builtins
import copy
import symtable
from collections.abc import Iterator
from typing import TYPE_CHECKING

from airflow_provider_datasphere.client.errors import JobRequestError

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.function.source import FunctionSource

#: What every file has, and the driver gives.
_OF_EACH_FILE = frozenset({"__name__", "__file__", "__builtins__", "__doc__"})


def check_names(source: FunctionSource) -> None:
    """Check that a function has all its names with it.

    :raises JobRequestError: it uses names that it hasn't; the message has all of them, with their lines.
    """
    known = set(dir(builtins)) | _OF_EACH_FILE | {source.name}
    lines = [(line, name) for name, line in _outer_names(source) if name not in known]
    if not lines:
        return
    listed = ", ".join(f"{name} (line {line})" for line, name in sorted(lines))
    one = len(lines) == 1
    raise JobRequestError(
        f"{source.name} uses {listed}, which {'comes' if one else 'come'} from the DAG's file: import it inside the "
        "function, pass it as an argument, or ship its module with modules=[…] and import it inside."
        if one
        else f"{source.name} uses {listed}, which come from the DAG's file: import them inside the function, pass them "
        "as arguments, or ship their modules with modules=[…] and import them inside."
    )


def _outer_names(source: FunctionSource) -> Iterator[tuple[str, int]]:
    """Iterate over the names that the function doesn't define itself, with the line of their first use."""
    node = _without_annotations(source)
    table = symtable.symtable(ast.unparse(node), source.filename, "exec")
    names, made = set(), set()
    to_read = list(table.get_children())
    while to_read:
        scope = to_read.pop()
        to_read += scope.get_children()
        for symbol in scope.get_symbols():
            if symbol.is_global() and symbol.is_referenced():
                names.add(symbol.get_name())
            if symbol.is_global() and symbol.is_assigned():
                made.add(symbol.get_name())  # global x; x = …
    for name in names - made:
        yield name, _line_of(name, source.node)


def _line_of(name: str, node: ast.AST) -> int:
    lines = [one.lineno for one in ast.walk(node) if isinstance(one, ast.Name) and one.id == name]
    return min(lines, default=getattr(node, "lineno", 0))


def _without_annotations(source: FunctionSource) -> ast.FunctionDef:
    """Return the function as it is shipped: no decorators, defaults or annotations, and none of local variables."""
    node = copy.deepcopy(source.node)
    node.decorator_list, node.returns = [], None
    arguments = node.args
    for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
        if one is not None:
            one.annotation = None
    arguments.defaults, arguments.kw_defaults = [], [None] * len(arguments.kwonlyargs)
    node.body = [_Annotations(source.has_future_annotations).visit(statement) for statement in node.body]
    return ast.fix_missing_locations(node)


class _Annotations(ast.NodeTransformer):
    """Removes annotations that aren't evaluated."""

    def __init__(self, future: bool) -> None:
        self._future = future
        self._in_class = False

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        outside, self._in_class = self._in_class, True
        self.generic_visit(node)
        self._in_class = outside
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        self.generic_visit(node)
        # Those of local variables aren't, those of a class are.
        if self._future or (isinstance(node.target, ast.Name) and not self._in_class):
            node.annotation = ast.Constant(None)
        return node

    def visit_arg(self, node: ast.arg) -> ast.AST:
        if self._future:
            node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        outside, self._in_class = self._in_class, False
        self.generic_visit(node)
        self._in_class = outside
        if self._future:
            node.returns = None
        return node

    visit_AsyncFunctionDef = visit_FunctionDef  # type: ignore[assignment]
