"""Who may import whom. The table below is the architecture; this test keeps it true."""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

#: package -> siblings it may import
TABLE: dict[str, set[str]] = {
    "flashcore": set(),
    "catalog": set(),
    "training": {"catalog"},
    "longllm": {"flashcore", "catalog", "training"},
    "beacon": {"flashcore", "catalog", "training", "longllm"},
    "bge": {"flashcore", "catalog", "training"},
    "icl_embed": {"flashcore", "catalog", "training", "bge"},
    "visual_bge": {"flashcore", "catalog", "training", "bge"},
}
#: these may import every package, and nobody imports them (the front door names commands by string)
COMPOSERS = {"commands", "demos", "bench"}
OURS = {*TABLE, *COMPOSERS, "tests", "longscope"}
#: what flashcore may take from outside the standard library, anywhere and inside functions
FLASHCORE_NEEDS = {"torch"}
FLASHCORE_OPTIONAL = {"flashcore/hf": {"transformers"}, "flashcore/backends/flash": {"flash_attn"}}


@dataclass(frozen=True)
class Import:
    """One imported module, absolute, and where it stands."""

    module: str
    names: tuple[str, ...]
    line: int
    in_function: bool

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]


def imports(path: str, tree: ast.Module) -> Iterator[Import]:
    """Yield every import of a file: statements, and import_module or __import__ of a literal name."""
    package = path.split("/")[:-1]

    def visit(node: ast.AST, in_function: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, (), node.lineno, in_function)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            names = tuple(alias.name for alias in node.names)
            # `from .. import bge` above the top package names the sibling itself.
            for name in [module] if module else names:
                yield Import(name, names if module else (), node.lineno, in_function)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield Import(str(node.args[0].value).lstrip("."), (), node.lineno, in_function)
        inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    yield from visit(tree, False)


def violations(path: str, tree: ast.Module) -> list[str]:
    """Return what this file imports against the table, as ``path:line: ...`` lines."""
    package = path.split("/")[0] if "/" in path else path.removesuffix(".py")
    if package == "tests":
        return []
    found = []
    for item in imports(path, tree):
        where = f"{path}:{item.line}: {package} imports {item.module}"
        foreign = item.top in OURS and item.top != package
        if foreign:
            allowed = TABLE.keys() if package in COMPOSERS else TABLE.get(package, set())
            if item.top not in allowed:
                found.append(f"{where}, which the import table forbids")
            private = [
                name for name in [*item.module.split("."), *item.names] if name.startswith("_") and name[-1] != "_"
            ]
            if private:
                found.append(f"{where}: {private[0]} is private to {item.top}")
        outside = item.top not in sys.stdlib_module_names and item.top not in OURS
        if package == "catalog" and outside and not item.in_function:
            found.append(f"{where} at module level; it may do so only inside a function")
        if package == "flashcore" and outside and item.top not in FLASHCORE_NEEDS:
            # hf may be a file or a package, and so may a backend
            stem = "/".join(path.split("/")[: 3 if "backends" in path else 2]).removesuffix(".py")
            optional = FLASHCORE_OPTIONAL.get(stem, set())
            if item.top not in optional:
                found.append(f"{where}; it may import only {sorted(FLASHCORE_NEEDS | optional)}")
    return found


def test_every_package_keeps_to_the_import_table(trees: dict[str, ast.Module]) -> None:
    found = [line for path, tree in trees.items() for line in violations(path, tree)]
    assert not found, "\n".join(found)


def test_every_package_has_a_row_in_the_import_table(trees: dict[str, ast.Module]) -> None:
    folders = {path.split("/")[0] for path in trees if "/" in path}
    assert folders <= OURS, f"no row for {sorted(folders - OURS)}"


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("catalog/store.py", "import flashcore"),
        ("catalog/store.py", "from bge.scores import dot"),
        ("catalog/store.py", "import torch"),
        ("catalog/store.py", "class A:\n    import tqdm"),
        ("flashcore/api.py", "def f():\n    import transformers"),
        ("flashcore/api.py", "import numpy"),
        ("flashcore/hf/cache.py", "import flash_attn"),
        ("flashcore/backends/sdpa.py", "from ... import catalog"),
        ("flashcore/backends/sdpa.py", "import flash_attn"),
        ("longllm/train.py", "def f():\n    from beacon import plan"),
        ("longllm/evals/run.py", "import importlib\nimportlib.import_module('bge.eval')"),
        ("longllm/load.py", "__import__('visual_bge')"),
        ("beacon/plan.py", "from commands.ask import ask"),
        ("beacon/plan.py", "from longllm import _secret"),
        ("beacon/plan.py", "import longllm._load"),
        ("icl_embed/train.py", "import visual_bge"),
        ("commands/ask.py", "import bench.flashcore"),
        ("bench/speed.py", "import demos"),
        ("training/loop.py", "import longscope"),
        ("longscope.py", "import catalog"),
    ],
)
def test_a_forbidden_import_is_caught(path: str, source: str) -> None:
    assert len(violations(path, ast.parse(source))) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "catalog/store.py",
            "import os\ndef f():\n    import tqdm\nfrom . import table\nfrom .table import _row",
        ),
        ("flashcore/hf/cache.py", "import transformers.cache_utils"),
        ("flashcore/hf.py", "import torch\nimport transformers\nfrom flashcore.api import attention"),
        ("flashcore/backends/flash.py", "def f():\n    import flash_attn\nfrom ..spec import AttentionSpec"),
        ("beacon/install.py", "import numpy\nfrom longllm.evals import passkey"),
        ("commands/ask.py", "import catalog, beacon\nfrom commands.models import table"),
        ("tests/house/test_x.py", "import longscope\nfrom bge import _private"),
    ],
)
def test_an_allowed_import_is_let_through(path: str, source: str) -> None:
    assert violations(path, ast.parse(source)) == []
