"""The house rules of CONTRIBUTING.md that a machine can check; each checker also meets a breach."""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

FILE_LINES = 400
FUNCTION_LINES = 80
NAMELESS = {"utils", "util", "common", "helpers", "helper", "misc", "stuff", "tools"}
#: attention is computed in flashcore; tests and benches may call what it is compared with
ATTENTION = re.compile(
    r"scaled_dot_product_attention|flex_attention|flash_attn\w*|_?flash_attention_forward"
    r"|MultiheadAttention|multi_head_attention_forward"
)
#: split, so that this file does not contain what it looks for
WORDS = {
    "unfinished work": re.compile("|".join(rf"\b{a}{b}\b" for a, b in [("TO", "DO"), ("FIX", "ME"), ("XX", "X")])),
    "remote code": re.compile(r"trust_remote_code\s*=\s*" + "True"),
    "a machine's path": re.compile("/" + r"work/|/(?:home|Users)/\w+/|/root" + "/"),
    "a registry's address": re.compile("/" + r"simple/|\b" + r"registry\.\w+\.\w|pypi\." + r"org|python" + "hosted"),
}
TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".sh", ".cpp", ".cfg", ".ini", ""}

Functions = Iterator[ast.FunctionDef | ast.AsyncFunctionDef]


def functions(tree: ast.AST) -> Functions:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def too_long(path: str, source: str) -> Iterator[str]:
    """Rule 1: files of at most 400 lines, functions of at most 80."""
    lines = source.count("\n") + (not source.endswith("\n"))
    if lines > FILE_LINES:
        yield f"{path}: {lines} lines, at most {FILE_LINES}"
    for node in functions(ast.parse(source)):
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if lines > FUNCTION_LINES:
            yield f"{path}:{node.lineno}: {node.name} has {lines} lines, at most {FUNCTION_LINES}"


def foreign_attention(path: str, source: str) -> Iterator[str]:
    """Rule 3: nobody but flashcore uses an attention kernel, under whatever name it was imported."""
    if path.startswith(("flashcore/", "bench/", "tests/")):
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            named = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            words = [word for name in named for word in name.split(".")]
        else:
            words = [node.attr] if isinstance(node, ast.Attribute) else [getattr(node, "id", "")]
        used = next((word for word in words if isinstance(word, str) and ATTENTION.fullmatch(word)), None)
        if used:
            yield f"{path}:{getattr(node, 'lineno', 0)}: {used}; attention is computed by flashcore.attention alone"


def bad_manners(path: str, source: str) -> Iterator[str]:
    """Rule 19: no assert, print, exit, nor an except that is bare, empty or catches everything."""
    if path.startswith(("tests/", "bench/")):
        return
    door = path == "longscope.py"
    for node in ast.walk(ast.parse(source)):
        problem = None
        if isinstance(node, ast.Assert):
            problem = "assert; raise ValueError or TypeError"
        elif isinstance(node, ast.ExceptHandler):
            problem = handler_problem(node)
        elif isinstance(node, ast.Call | ast.Raise):
            arguments = node.args if isinstance(node, ast.Call) else []
            called = ast.unparse(node.func if isinstance(node, ast.Call) else node.exc or ast.Name("raise"))
            if re.fullmatch(r"print|(sys\.|os\._)?exit|quit|SystemExit(\(.*\))?", called) and not door:
                problem = f"{called}; only the front door prints and exits"
            elif re.fullmatch(r"(contextlib\.)?suppress", called) and everything(*arguments):
                problem = "suppress of every exception"
        if problem:
            yield f"{path}:{getattr(node, 'lineno', 0)}: {problem}"


def everything(*caught: ast.expr | None) -> bool:
    names = {name.id for node in caught if node for name in ast.walk(node) if isinstance(name, ast.Name)}
    return bool(names & {"Exception", "BaseException"})


def handler_problem(node: ast.ExceptHandler) -> str | None:
    if node.type is None:
        return "bare except"
    last = node.body[-1]
    if everything(node.type) and not (isinstance(last, ast.Raise) and last.exc is None):
        return "except Exception; name the errors that are expected"
    if all(isinstance(line, ast.Pass) or ast.unparse(line) == "..." for line in node.body):
        return "empty except; use contextlib.suppress, or say what happens"
    return None


def bad_name(path: str) -> Iterator[str]:
    """A file is named after what it holds; tests need no package files."""
    if Path(path).stem in NAMELESS:
        yield f"{path}: name the file after what it holds"
    if path.startswith("tests/") and path.endswith("__init__.py"):
        yield f"{path}: tests are no package"


def bad_words(path: str, source: str) -> Iterator[str]:
    """No unfinished work, no remote code, and nothing that is true on one machine only."""
    for number, line in enumerate(source.splitlines(), 1):
        for what, pattern in WORDS.items():
            if pattern.search(line):
                yield f"{path}:{number}: {what}: {line.strip()[:80]}"


def unlisted(listed: set[str], folders: set[str], root: Path) -> Iterator[str]:
    """setuptools ships the packages that pyproject.toml lists, and nothing else; one may hold only data."""
    for name in listed - folders:
        if not any(root.joinpath(*name.split(".")).glob("*.*")):
            yield f"{name}: listed in pyproject.toml, but there is no such package"
    yield from (f"{name}: has Python files, but pyproject.toml does not list it" for name in folders - listed)


@pytest.mark.parametrize("checker", [too_long, foreign_attention, bad_manners])
def test_the_code_keeps_the_house_rules(checker: Callable, sources: dict[str, str]) -> None:
    found = [line for path, source in sources.items() for line in checker(path, source)]
    assert not found, "\n".join(found)


def test_files_have_telling_names(sources: dict[str, str]) -> None:
    found = [line for path in sources for line in bad_name(path)]
    assert not found, "\n".join(found)


def test_no_file_holds_unfinished_work_or_what_belongs_to_one_machine(root: Path, sources: dict[str, str]) -> None:
    folders = {root / path.split("/")[0] for path in sources if "/" in path} | {root / ".ci"}
    texts = [file for file in root.iterdir() if file.is_file()]
    texts += [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    texts = [file for file in texts if file.suffix in TEXT and "__pycache__" not in file.parts]
    found = [
        line
        for file in texts
        for line in bad_words(file.relative_to(root).as_posix(), file.read_text("utf-8", errors="replace"))
    ]
    assert not found, "\n".join(found)


def test_pyproject_lists_exactly_the_packages_there_are(root: Path, sources: dict[str, str], project: dict) -> None:
    folders = {".".join(path.split("/")[:-1]) for path in sources if "/" in path and not path.startswith("tests/")}
    found = list(unlisted(set(project["tool"]["setuptools"]["packages"]), folders, root))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("checker", "path", "source"),
    [
        (too_long, "bge/a.py", "\n" * 401),
        (too_long, "bge/a.py", "def f():\n" + "    x = 1\n" * 80),
        (foreign_attention, "bge/a.py", "torch.nn.functional.scaled_dot_product_attention(q, k, v)"),
        (foreign_attention, "bge/a.py", "from torch.nn.functional import scaled_dot_product_attention as f"),
        (foreign_attention, "beacon/a.py", "import torch.nn.attention.flex_attention"),
        (foreign_attention, "beacon/a.py", "flash_attn_varlen_func(q)"),
        (foreign_attention, "visual_bge/a.py", "class Block(nn.MultiheadAttention): ..."),
        (bad_manners, "bge/a.py", "assert x"),
        (bad_manners, "bge/a.py", "print(x)"),
        (bad_manners, "bge/a.py", "sys.exit(1)"),
        (bad_manners, "bge/a.py", "os._exit(1)"),
        (bad_manners, "bge/a.py", "raise SystemExit"),
        (bad_manners, "bge/a.py", "try: f()\nexcept: g()"),
        (bad_manners, "bge/a.py", "try: f()\nexcept OSError: pass"),
        (bad_manners, "bge/a.py", "try: f()\nexcept (OSError, Exception): g()"),
        (bad_manners, "bge/a.py", "with contextlib.suppress(Exception): f()"),
        (bad_manners, "longscope.py", "assert words"),
        (bad_words, "bge/a.py", "# TO" + "DO: later"),
        (bad_words, "bge/a.py", "AutoModel.from_pretrained(name, trust_remote_code=" + "True)"),
        (bad_words, "README.md", "see /" + "work/somewhere"),
        (bad_words, "catalog/a.py", "https://registry." + "example.org/x"),
        (bad_words, "catalog/a.py", "index_url = 'http://host/" + "simple/'"),
    ],
)
def test_code_that_breaks_a_rule_is_caught(checker: Callable, path: str, source: str) -> None:
    assert len(list(checker(path, source))) == 1


@pytest.mark.parametrize(
    ("checker", "path", "source"),
    [
        (too_long, "bge/a.py", "def f():\n" + "    x = 1\n" * 79),
        (foreign_attention, "flashcore/a.py", "F.scaled_dot_product_attention(q, k, v)"),
        (foreign_attention, "bge/a.py", "flashcore.attention(q, k, v)"),
        (bad_manners, "bench/a.py", "print(1)"),
        (bad_manners, "longscope.py", "print(1)\nsys.exit(main())"),
        (bad_manners, "bge/a.py", "try: f()\nexcept BaseException:\n    undo()\n    raise"),
        (bad_manners, "bge/a.py", "with contextlib.suppress(FileNotFoundError): f()"),
        (bad_words, "bge/a.py", "registry.get(name)  # a word in the registry."),
    ],
)
def test_code_that_keeps_a_rule_is_let_through(checker: Callable, path: str, source: str) -> None:
    assert list(checker(path, source)) == []


@pytest.mark.parametrize("path", ["bge/utils.py", "tests/helpers.py", "tests/bge/__init__.py"])
def test_a_name_that_tells_nothing_is_caught(path: str) -> None:
    assert len(list(bad_name(path))) == 1


def test_a_package_missing_on_either_side_is_caught(tmp_path: Path) -> None:
    (tmp_path / "bge" / "data").mkdir(parents=True)
    (tmp_path / "bge" / "data" / "table.toml").touch()
    found = list(unlisted({"bge", "bge.data", "gone"}, {"bge", "bge.eval"}, tmp_path))
    assert [line.split(":")[0] for line in found] == ["gone", "bge.eval"]
