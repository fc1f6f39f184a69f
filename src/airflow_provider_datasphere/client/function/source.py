"""A function's source as its file has it: its own lines, byte for byte, without decorators, annotations and defaults.

What runs in the job is compiled from these lines at their own line numbers, so that a traceback shows those of the
DAG's file.
"""

from __future__ import annotations
import __future__

import ast
import functools
import inspect
import linecache
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from airflow_provider_datasphere.client.errors import JobRequestError

_ANNOTATIONS_FLAG = __future__.annotations.compiler_flag
#: Flags of ``from __future__`` imports, which change how a file's code is compiled.
_FUTURE_FLAGS = functools.reduce(
    lambda flags, name: flags | getattr(__future__, name).compiler_flag, __future__.all_feature_names, 0
)

_FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class FunctionSource:
    """A function that can be run elsewhere.

    :param name: its name.
    :param text: a file that defines it, at the line numbers of the original.
    :param filename: the original.
    :param flags: of ``from __future__`` imports, for :func:`compile`.
    :param parameters: names of its parameters, in their order.
    :param node: its syntax tree, as in the original.
    """

    name: str
    text: str
    filename: str
    flags: int
    parameters: tuple[str, ...]
    node: ast.FunctionDef

    @property
    def has_future_annotations(self) -> bool:
        """Whether annotations in the function aren't evaluated."""
        return bool(self.flags & _ANNOTATIONS_FLAG)


def read_source(function: Callable[..., Any], python_version: str) -> FunctionSource:
    """Return the source of a function.

    :param python_version: the job's: ``3.11``.
    :raises JobRequestError: it isn't a plain function, its source isn't there or isn't what runs, or the job's Python
        can't parse it.
    """
    name = _require_plain(function)
    code = function.__code__
    linecache.checkcache(code.co_filename)
    lines = linecache.getlines(code.co_filename, function.__globals__)
    if not lines:
        raise JobRequestError(
            f"The source of {name} isn't there ({code.co_filename}): define it in a file, such as the DAG's."
        )
    text = "".join(lines)
    node = _node_of(text, function)
    if node is None or not _is_what_runs(text, node, function):
        raise JobRequestError(
            f"The source of {name} in {code.co_filename} isn't what runs: the file has changed, or the function was "
            "made in another way. Parse the DAG again."
        )
    assert isinstance(node, ast.FunctionDef)
    source = FunctionSource(
        name=name,
        text=_shipped(lines, node, name),
        filename=code.co_filename,
        flags=code.co_flags & _FUTURE_FLAGS,
        parameters=tuple(inspect.signature(function).parameters),
        node=node,
    )
    _check_version(source, python_version)
    return source


def _require_plain(function: Any) -> str:
    """Return the name of a plain function.

    :raises JobRequestError: it is something else that can be called.
    """
    ship = "write a plain function that calls it"
    if isinstance(function, functools.partial):
        raise JobRequestError(f"@task.datasphere takes no functools.partial, which has no source: {ship}.")
    if isinstance(function, types.MethodType):
        raise JobRequestError(
            f"@task.datasphere takes no method ({function.__qualname__}), whose object isn't in the job."
        )
    if not isinstance(function, types.FunctionType):
        raise JobRequestError(f"@task.datasphere takes a function, not a {type(function).__name__}: {ship}.")
    name = function.__name__
    if name == "<lambda>":
        raise JobRequestError("@task.datasphere takes no lambda: write a function with def.")
    if hasattr(function, "__wrapped__"):
        raise JobRequestError(
            f"{name} is wrapped by another decorator, which wouldn't run in the job: remove it, or do inside the "
            "function what it does."
        )
    if inspect.isasyncgenfunction(function) or inspect.iscoroutinefunction(function):
        raise JobRequestError(f"{name} is an async function: write a plain one, and call asyncio.run() inside.")
    if inspect.isgeneratorfunction(function):
        raise JobRequestError(f"{name} is a generator, which returns nothing that can be sent: return a list.")
    if "<locals>" not in function.__qualname__ and "." in function.__qualname__:
        raise JobRequestError(f"{function.__qualname__} is defined in a class: write a function outside of it.")
    return name


def _node_of(text: str, function: Callable[..., Any]) -> _FunctionNode | None:
    """Return the node of the function in its file: of its name, and beginning at its line."""
    code = function.__code__
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == code.co_name:
            # The code begins with its first decorator.
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            if code.co_firstlineno in (first, node.lineno):
                return node
    return None


def _is_what_runs(text: str, node: _FunctionNode, function: Callable[..., Any]) -> bool:
    """Return whether the file still compiles to the function's code."""
    if "@pytest_ar" in function.__globals__:
        return True  # pytest has rewritten its assertions
    code = function.__code__
    flags = code.co_flags & _FUTURE_FLAGS
    found = _code_at(compile(text, code.co_filename, "exec", flags=flags, dont_inherit=True), code)
    return found is not None and found.co_code == code.co_code and found.co_names == code.co_names


def _code_at(module: types.CodeType, code: types.CodeType) -> types.CodeType | None:
    to_search = [module]
    while to_search:
        one = to_search.pop()
        if one.co_name == code.co_name and one.co_firstlineno == code.co_firstlineno:
            return one
        to_search += [constant for constant in one.co_consts if isinstance(constant, types.CodeType)]
    return None


def _shipped(lines: list[str], node: ast.FunctionDef, name: str) -> str:
    """Return a file with the function at its own lines: a new head, and its body as it was written."""
    first = _first_line(node.body[0])
    indent = lines[node.lineno - 1][: node.col_offset]
    head = f"def {name}({_parameters(node.args)}):"
    if first == node.lineno or not _begins_its_line(lines, node.body[0], first):
        # The body begins on the line of the head: what stands before it there is replaced.
        body = _bytes_from(lines[first - 1], node.body[0].col_offset)
        kept = [f"{indent}{head} {body}", *lines[first : node.end_lineno]]
        before = first - 1
    else:
        kept = lines[first - 1 : node.end_lineno]
        before = first - 2
    padding = ["\n"] * max(0, before)
    if kept and first != node.lineno and before == first - 2:
        padding.append(f"{indent}{head}\n")
    if indent:
        # A function within others: a block of any indentation.
        return "".join([*_with_block(padding), *kept])
    return "".join([*padding, *kept])


def _with_block(padding: list[str]) -> list[str]:
    """Put the head of a block on a line before the function's; nested functions never begin in the first."""
    position = next(number for number, line in enumerate([*padding, "def"]) if line.strip()) - 1
    return [*padding[:position], "if True:\n", *padding[position + 1 :]]


def _first_line(statement: ast.stmt) -> int:
    decorators: list[ast.expr] = getattr(statement, "decorator_list", [])
    return min([statement.lineno, *(decorator.lineno for decorator in decorators)])


def _begins_its_line(lines: Sequence[str], statement: ast.stmt, first: int) -> bool:
    return first != statement.lineno or not lines[first - 1].encode()[: statement.col_offset].strip()


def _bytes_from(line: str, offset: int) -> str:
    """Return the rest of a line from a place that ``ast`` counts in bytes of UTF-8."""
    return line.encode()[offset:].decode()


def _parameters(arguments: ast.arguments) -> str:
    """Return the parameters without annotations; defaults are given by the caller, and only kept in their places."""
    plain = ast.arguments(
        posonlyargs=[ast.arg(one.arg) for one in arguments.posonlyargs],
        args=[ast.arg(one.arg) for one in arguments.args],
        vararg=ast.arg(arguments.vararg.arg) if arguments.vararg else None,
        kwonlyargs=[ast.arg(one.arg) for one in arguments.kwonlyargs],
        kw_defaults=[None] * len(arguments.kwonlyargs),
        kwarg=ast.arg(arguments.kwarg.arg) if arguments.kwarg else None,
        defaults=[],
    )
    return ast.unparse(plain)


def _check_version(source: FunctionSource, python_version: str) -> None:
    """
    :raises JobRequestError: the job's Python can't parse the function, as far as this one knows.
    """
    try:
        ast.parse(source.text, source.filename, feature_version=(3, int(python_version.split(".")[1])))
    except SyntaxError as error:
        raise JobRequestError(
            f"Python {python_version} of the job can't parse {source.name} (near line {error.lineno}): {error.msg}. "
            "Set python_version, or write it in an older way."
        ) from error
