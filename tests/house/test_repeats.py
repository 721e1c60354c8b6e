"""Rule 27: a function of six lines or more exists once in the repository, tests included."""

import ast
from collections import Counter, defaultdict

LINES = 6

Function = ast.FunctionDef | ast.AsyncFunctionDef


def body_of(node: Function) -> list[ast.stmt]:
    """Return the function's statements without its docstring."""
    return node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body


def code_lines(node: Function, source_lines: list[str]) -> int:
    """Count the lines of a body that hold code: no docstring, comment or blank line."""
    body = body_of(node)
    if not body:
        return 0
    lines = source_lines[body[0].lineno - 1 : body[-1].end_lineno]
    return sum(1 for line in lines if line.strip() and not line.strip().startswith("#"))


def outline(node: Function) -> tuple[object, ...]:
    """Return what equal bodies have in common and most others do not, at a hundredth of a fingerprint's cost."""
    # Not expressions and constants: a docstring of an inner function is one of each.
    kinds = Counter(type(part).__name__ for line in body_of(node) for part in ast.walk(line))
    return tuple(sorted((kind, count) for kind, count in kinds.items() if kind not in ("Expr", "Constant")))


def fingerprint(node: Function) -> str:
    """Write a body down so that renaming its arguments and variables makes no difference."""
    arguments = [item.arg for item in ast.walk(node.args) if isinstance(item, ast.arg)]
    stored = [item.id for item in ast.walk(node) if isinstance(item, ast.Name) and isinstance(item.ctx, ast.Store)]
    local = {name: f"local{number}" for number, name in enumerate(dict.fromkeys(arguments + stored))}

    class Rename(ast.NodeTransformer):
        def visit_Name(self, name: ast.Name) -> ast.Name:
            return ast.Name(local.get(name.id, name.id), name.ctx)

        def visit_arg(self, argument: ast.arg) -> ast.arg:
            return ast.arg(local.get(argument.arg, argument.arg))

        def visit_FunctionDef(self, inner: ast.FunctionDef) -> ast.AST:
            self.generic_visit(inner)
            return ast.FunctionDef("", inner.args, body_of(inner) or [ast.Pass()], [], None)

    # Parsed afresh, because the transformer changes the tree that others read.
    copy = ast.parse("\n".join(ast.unparse(line) for line in body_of(node)))
    return ast.dump(Rename().visit(copy))


def repeats(sources: dict[str, str]) -> list[str]:
    """Return one line for each body that occurs more than once, naming its places."""
    alike: dict[tuple[object, ...], list[tuple[str, Function]]] = defaultdict(list)
    for path, source in sources.items():
        lines = source.splitlines()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, Function) and code_lines(node, lines) >= LINES:
                alike[outline(node)].append((f"{path}:{node.lineno} {node.name}", node))
    places: dict[str, list[str]] = defaultdict(list)
    for place, node in (one for group in alike.values() if len(group) > 1 for one in group):
        places[fingerprint(node)].append(place)
    return [" = ".join(found) for found in places.values() if len(found) > 1]


def test_no_function_of_six_lines_exists_twice(sources: dict[str, str]) -> None:
    found = repeats(sources)
    assert not found, "\n".join(found)


ORIGINAL = '''
def pool(states, mask):
    """Mean over tokens."""
    total = 0
    count = 0
    for state, keep in zip(states, mask):
        if keep:
            total += state
            count += 1
    return total / count
'''
RENAMED = """
class Pooler:
    def mean(self_like, flags):
        # the same thing
        acc = 0

        n = 0
        for row, flag in zip(self_like, flags):
            if flag:
                acc += row
                n += 1
        return acc / n
"""


def test_a_copy_with_other_names_is_caught() -> None:
    assert repeats({"bge/a.py": ORIGINAL, "tests/b.py": RENAMED}) == ["bge/a.py:2 pool = tests/b.py:3 mean"]


def test_another_calculation_or_a_short_one_is_no_copy() -> None:
    other = RENAMED.replace("acc / n", "acc * n")
    short = "def f(x):\n    y = x\n    return y\n"
    assert repeats({"bge/a.py": ORIGINAL, "bge/b.py": other, "bge/c.py": short, "bge/d.py": short}) == []
