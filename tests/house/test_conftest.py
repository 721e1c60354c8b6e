"""The promises of tests/conftest.py: same seeds, no network, a home of its own, one case per parity file."""

import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("turn", [1, 2])
def test_every_test_starts_from_the_same_random_state(turn: int) -> None:
    assert random.random() == random.Random(0).random()


def test_the_network_is_closed_to_unit_tests() -> None:
    with pytest.raises(pytest.fail.Exception, match="not marked real tried to reach"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    with pytest.raises(pytest.fail.Exception, match=r"example\.org"):
        socket.getaddrinfo("example.org", 443)
    with socket.socket() as plain, pytest.raises(pytest.fail.Exception, match=r"192\.0\.2\.1"):
        plain.connect(("192.0.2.1", 80))


def test_loopback_stays_open() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()


def test_the_home_of_the_user_is_out_of_reach(longscope_home: Path) -> None:
    assert Path(os.environ["LONGSCOPE_HOME"]) == longscope_home
    assert list(longscope_home.iterdir()) == []


GOLDEN_TEST = """
GOLDEN_SYSTEM = "beacon"

def test_parity(golden_file):
    assert golden_file.read_text() == "data"
"""


def test_parity_cases_are_the_files_of_the_folder_and_none_is_skipped(root: Path, tmp_path: Path) -> None:
    suite = tmp_path / "suite"
    suite.mkdir()
    (suite / "conftest.py").write_text((root / "tests" / "conftest.py").read_text())
    (suite / "test_golden.py").write_text(GOLDEN_TEST)
    golden = tmp_path / "fixtures" / "beacon"

    def run() -> str:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", str(suite)]
        command += ["--golden-dir", str(golden.parent)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False).stdout

    assert "skipped" not in (empty := run())
    assert "1 deselected" in empty
    golden.mkdir(parents=True)
    for name in ("01_a.safetensors", "02_b.json", "README.md"):
        (golden / name).write_text("data")
    out = run()
    assert "test_parity[beacon/01_a.safetensors] PASSED" in out
    assert "2 passed" in out
