"""The Makefile's care for .venv, and the closing line of `make test`, with a stand-in for python and pip."""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

#: behaves like python3 as far as the Makefile asks; `-m venv` copies itself, installations go to a log
STAND_IN = """#!/bin/sh
here=$(dirname "$0")
case "$*" in
    *version_info*) exit ${OLD:-0} ;;
    *samefile*) [ -f "$here/broken" ] && exit 1; exit 0 ;;
    "-m venv "*) mkdir -p .venv/bin; cp "$0" .venv/bin/python; echo "command = x -m venv $PWD/.venv" > .venv/pyvenv.cfg
        echo venv >> calls ;;
    "-m pip --version") ;;
    *"pip install"*) echo install >> calls; echo Collecting noise; echo ERROR: news; exit ${FAIL:-0} ;;
    "--version") echo Python 3.9.1 ;;
    *) echo "$*" >> calls ;;
esac
"""


@pytest.fixture
def checkout(root: Path, tmp_path: Path) -> Path:
    """A folder (with a space in its name) that has the Makefile and a stand-in for python3."""
    folder = tmp_path / "a checkout"
    folder.mkdir()
    shutil.copy(root / "Makefile", folder)
    for name in ("pyproject.toml", "longscope.py"):
        (folder / name).touch()
    (folder / "python").write_text(STAND_IN)
    (folder / "python").chmod(0o755)
    return folder


def make(folder: Path, target: str = "venv", **variables: str) -> tuple[int, str, list[str]]:
    """Run make; return its exit code, its output and what the stand-in was asked to do."""
    (folder / "calls").write_text("")
    done = subprocess.run(
        ["make", "--no-print-directory", target, "PYTHON=./python"],
        cwd=folder,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout, (folder / "calls").read_text().split("\n")[:-1]


def test_the_environment_is_built_once(checkout: Path) -> None:
    code, out, calls = make(checkout)
    assert (code, calls) == (0, ["venv", "install"])
    assert "ERROR: news" in out
    assert "noise" not in out
    assert make(checkout) == (0, "", [])


def test_a_changed_pyproject_is_installed_into_the_same_environment(checkout: Path) -> None:
    make(checkout)
    stamp = (checkout / ".venv" / "longscope.stamp").stat().st_mtime
    os.utime(checkout / "pyproject.toml", (stamp + 5, stamp + 5))
    assert make(checkout)[2] == ["install"]


def test_a_failed_installation_leaves_no_stamp_and_is_tried_again(checkout: Path) -> None:
    code, out, _ = make(checkout, FAIL="1")
    assert code != 0
    assert "installation failed" in out
    assert not (checkout / ".venv" / "longscope.stamp").exists()
    assert make(checkout)[2] == ["install"]


def test_a_moved_checkout_gets_a_new_environment(checkout: Path) -> None:
    make(checkout)
    moved = checkout.rename(checkout.with_name("moved"))
    (moved / ".venv" / "bin" / "broken").touch()
    code, out, calls = make(moved)
    assert (code, calls) == (0, ["venv", "install"])
    assert "building it anew" in out


def test_a_broken_interpreter_gets_a_new_environment(checkout: Path) -> None:
    make(checkout)
    (checkout / ".venv" / "bin" / "python").unlink()
    assert make(checkout)[2] == ["venv", "install"]


def test_an_old_python_is_refused_in_one_line(checkout: Path) -> None:
    code, out, calls = make(checkout, OLD="1")
    assert code != 0
    assert out.splitlines()[0].startswith("longscope needs Python 3.11 or newer, but ./python is: Python 3.9.1")
    assert calls == []


def test_the_targets_set_up_the_environment_themselves(checkout: Path) -> None:
    code, _, calls = make(checkout, "test")
    assert (code, calls) == (0, ["venv", "install", "tests/run.py"])
    assert make(checkout, "bench")[2] == ["-m bench.flashcore"]


def test_ci_runs_make_test_and_nothing_else(root: Path) -> None:
    script = root / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert [line for line in script.read_text().splitlines() if line[:1] != "#"] == [
        'cd "$(dirname "$0")/.." && exec make test'
    ]


@pytest.fixture(scope="module")
def runner(root: Path) -> ModuleType:
    """tests/run.py as a module."""
    spec = importlib.util.spec_from_file_location("longscope_test_run", root / "tests" / "run.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SUITE = """
import pytest

def test_right(): pass

@pytest.mark.parametrize("number", [1, 2])
def test_wrong(number): assert number == 3

def test_error(missing_fixture): pass

@pytest.mark.skip
def test_left_out(): pass
"""


def test_the_closing_line_counts_what_pytest_reports(
    runner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test_suite.py").write_text(SUITE)
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    monkeypatch.setattr(runner, "LINTS", {"fine": ["this"]})
    monkeypatch.setattr(runner, "SUITES", {"unit tests": ("not real", []), "real models and data": ("real", [])})
    monkeypatch.setattr("sys.argv", ["run.py", "-p", "no:cacheprovider"])
    assert runner.main() == 1
    last = capfd.readouterr().out.splitlines()[-1]
    assert last.startswith("1 passed, 3 failed, 1 skipped in ")
    assert last.endswith("s; real models and data did not run: there are none")


def test_the_closing_line_says_when_browser_tests_did_not_run(
    runner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test_suite.py").write_text("def test_right(): pass")
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    monkeypatch.setattr(runner, "LINTS", {"no such lint": ["no_such_module"]})
    monkeypatch.setattr(runner, "SUITES", {"unit tests": ("not real", []), "browser tests": ("browser", [])})
    monkeypatch.setattr(runner, "CHROMIUM", ("no-such-browser",))
    monkeypatch.setattr("sys.argv", ["run.py", "-p", "no:cacheprovider"])
    assert runner.main() == 1
    last = capfd.readouterr().out.splitlines()[-1]
    assert last.startswith("1 passed, 1 failed, 0 skipped in ")
    assert last.endswith("s; browser tests did not run: no Chromium with its driver here")


def test_a_run_that_dies_without_a_report_is_a_failure(runner: ModuleType, tmp_path: Path) -> None:
    assert runner.counts(tmp_path / "none.xml", 3) == {"passed": 0, "failed": 1, "skipped": 0}
