"""Running a chat template that nobody has vouched for: Jinja, cut down and on a budget.

Knows nothing about messages or tokens. Three walls: only the syntax, filters, tests, attributes and
functions listed here and in `template_filters.py` exist; all that a template makes is paid for from
a budget, by size; and all this within jinja2's own immutable sandbox. Imported when a template is
first rendered, because it imports jinja2.
"""

import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.tests import TESTS as JINJA_TESTS
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

from edgellama.template_filters import (
    FILTERS,
    Budget,
    NotAllowed,
    Worker,
    as_items,
    as_text,
    joined,
    replaced,
)

MOST_NESTED = 100  # levels of syntax; Python's own compiler gives up at 200 brackets
MOST_WORDS = 30_000  # of syntax; compiling takes about a second by then
MOST_OUTPUT = 8 * 2**20  # characters
LONGEST_RANGE = 100_000
LONGEST_DATE_FORMAT = 64
DATE_FORMAT = re.compile(r"(?:[^%]|%-?[A-Za-z%])*")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


TESTS = _words(
    """defined undefined none boolean integer float number string mapping iterable sequence
true false odd even divisibleby in == eq equalto != ne > gt greaterthan < lt lessthan >= ge
<= le"""
)

ATTRIBUTES: dict[type, frozenset[str]] = {
    str: _words(
        """strip lstrip rstrip split rsplit splitlines partition rpartition startswith endswith
        removeprefix removesuffix upper lower title capitalize find rfind index count replace join
        isdigit isalpha isalnum isspace isupper islower"""
    ),
    dict: _words("get items keys values"),
    list: _words("index count"),
    tuple: _words("index count"),
    LoopContext: _words(
        """index index0 revindex revindex0 first last length previtem nextitem depth depth0 cycle
        changed"""
    ),
}

GUARDED: dict[str, Callable[..., str]] = {
    "replace": replaced,
    "join": joined,
}  # methods of text that are paid for beforehand

SYNTAX: tuple[type[nodes.Node], ...] = (
    *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.For, nodes.If, nodes.Macro),
    nodes.FilterBlock,
    *(nodes.Assign, nodes.AssignBlock, nodes.Break, nodes.Continue, nodes.Name, nodes.NSRef),
    *(nodes.Const, nodes.Tuple, nodes.List, nodes.Dict, nodes.Pair, nodes.Keyword, nodes.CondExpr),
    *(nodes.Filter, nodes.Test, nodes.Call, nodes.Getattr, nodes.Getitem, nodes.Slice),
    *(nodes.Concat, nodes.Compare, nodes.Operand, nodes.Add, nodes.Sub, nodes.Mul, nodes.Div),
    *(nodes.FloorDiv, nodes.Mod, nodes.And, nodes.Or, nodes.Not, nodes.Neg, nodes.Pos),
)

# Filters of our own, under names that no template can write.
MADE, EACH, OUTPUT, CONCAT = "value made", "each of", "for output", "concatenation of"


class Refusal(Exception):
    """The template called raise_exception; the argument is its message."""


class Program:
    """One template, compiled. Not for two threads at once: there is one budget."""

    def __init__(self, source: str, clock: Callable[[], datetime]) -> None:
        """Raises jinja2's exceptions, NotAllowed, or what Python's compiler raises."""
        self.environment = _Sandbox(clock)
        for count, _ in enumerate(self.environment.lex(source)):
            if count > MOST_WORDS:
                raise NotAllowed("it is far longer than a chat needs")
        tree = self.environment.parse(source)
        _check_syntax(tree)
        tree = _Toll().visit(tree)
        tree.set_environment(self.environment)
        self.template = self.environment.from_string(tree)

    def render(self, variables: Mapping[str, Any], size: int) -> str:
        """The text; `size` is the number of characters in `variables`. Raises anything."""
        self.environment.budget = Budget(size)
        pieces, total = [], 0
        for piece in self.template.generate(variables):
            pieces.append(piece)
            total += len(piece)
            if total > MOST_OUTPUT:
                raise NotAllowed(f"it writes more than {MOST_OUTPUT} characters")
        return "".join(pieces)


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks what to train on: here it does nothing."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as a plain set)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment, Worker):
    """The only environment in which templates are run."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, clock: Callable[[], datetime]) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[LoopControlExtension, _Generation],
            optimized=False,  # or constants would be folded without a budget
            cache_size=0,
        )
        self.budget = Budget()
        self.filters = {name: _paid(function) for name, function in (FILTERS | _TOLLS).items()}
        self.tests = {name: JINJA_TESTS[name] for name in TESTS}
        self.globals = {
            "range": _range,
            "dict": _dict,
            "namespace": Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": lambda text: _strftime(clock(), text),
        }

    def wrap_str_format(self, value: Any) -> None:
        """No replacement for str.format: it stays an attribute that is not listed."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, Namespace):
            return not attr.startswith("_")
        return attr in ATTRIBUTES.get(type(obj), ())

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(function, "__self__", None)
        guarded = GUARDED.get(function.__name__) if isinstance(owner, str) else None
        if guarded is not None:
            scopes = ("_loop_vars", "_block_vars")  # jinja2's own, taken out by the parent else
            options = {name: value for name, value in kwargs.items() if name not in scopes}
            return guarded(self.budget, owner, *args, **options)
        self.budget.spend(len(owner) if isinstance(owner, str) else 0)
        return self.budget.charge(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Numbers; `+` also for texts and lists, and a text times a number."""
        numbers = isinstance(left, int | float), isinstance(right, int | float)
        if operator == "*" and isinstance(left, str) and isinstance(right, int):
            self.budget.spend(len(left) * max(right, 0))
        elif operator != "+" and not all(numbers):
            raise NotAllowed(f"it applies {operator} to something else than numbers")
        return self.budget.charge(super().call_binop(context, operator, left, right))


def _check_syntax(tree: nodes.Template) -> None:
    """Raise NotAllowed for anything not listed, and for syntax nested too deeply to compile."""
    waiting: list[tuple[nodes.Node, int]] = [(tree, 0)]
    while waiting:
        node, depth = waiting.pop()
        if depth > MOST_NESTED:
            raise NotAllowed(f"line {node.lineno}: it nests more than {MOST_NESTED} levels deep")
        problem = _problem(node)
        if problem:
            raise NotAllowed(f"line {node.lineno}: {problem}")
        waiting += [(child, depth + 1) for child in node.iter_child_nodes()]


def _problem(node: nodes.Node) -> str | None:
    if not isinstance(node, SYNTAX):
        return f"'{type(node).__name__.lower()}' is not supported"
    if isinstance(node, nodes.Getattr) and node.attr.startswith("_"):
        return "it reaches for a private attribute"
    if isinstance(node, nodes.For) and node.recursive:
        return "recursive loops are not supported"
    if isinstance(node, nodes.Filter) and node.name not in FILTERS:
        return f"the filter {node.name!r} is not supported"
    if isinstance(node, nodes.Test) and node.name not in TESTS:
        return f"the test {node.name!r} is not supported"
    if getattr(node, "dyn_args", None) is not None or getattr(node, "dyn_kwargs", None) is not None:
        return "arguments with * are not supported"
    return None


class _Toll(NodeTransformer):
    """Puts a filter around every expression that makes something, so that it is paid for."""

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [_filtered(child, OUTPUT) for child in node.nodes]
        return node

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, EACH)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), CONCAT)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, MADE) if isinstance(node.arg, nodes.Slice) else node

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, MADE) if node.ctx == "load" else node

    def _made(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, MADE)

    visit_List = visit_Dict = visit_Compare = visit_Test = _made


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


_TOLLS: dict[str, Callable[..., Any]] = {
    MADE: lambda env, value: value,
    EACH: lambda env, value: as_items(env.budget, value),
    OUTPUT: lambda env, value: as_text(env.budget, value),
    CONCAT: lambda env, value: joined(env.budget, "", value),
}


def _paid(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter as jinja2 calls it. One that wants the context is never run while compiling."""

    @pass_context
    def run(context: Context, *args: Any, **kwargs: Any) -> Any:
        env = context.environment
        assert isinstance(env, _Sandbox)
        env.budget.spend(0)
        return env.budget.charge(function(env, *args, **kwargs))

    return run


def _range(*args: int) -> range:
    numbers = range(*args)
    if max(map(abs, args)) > 2**31 or len(numbers) > LONGEST_RANGE:
        raise NotAllowed(f"a range of more than {LONGEST_RANGE} numbers")
    return numbers


def _dict(**items: Any) -> dict[str, Any]:
    return items


def _raise_exception(message: Any = "") -> None:
    raise Refusal(message if isinstance(message, str) else "(no text)")


def _strftime(now: datetime, text: Any) -> str:
    short = isinstance(text, str) and len(text) <= LONGEST_DATE_FORMAT
    if not short or not DATE_FORMAT.fullmatch(text):
        raise NotAllowed("strftime_now with a strange format")
    return now.strftime(text)
