"""``longscope demo``: what it refuses, and a page that is served until Ctrl-C."""

import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

import longscope

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_cannot_be_is_refused(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert longscope.main(["demo", "--port", str(port)]) == 2
    assert f"port must lie between 0 and 65535, got {port}" in capsys.readouterr().err


def test_without_gradio_it_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert longscope.main(["demo"]) == 2
    error = capsys.readouterr().err
    assert "pip install 'longscope[demo]'" in error
    assert error.count("\n") == 1


@pytest.mark.real  # a program of its own, which imports torch and gradio: too slow for the unit suite
@pytest.mark.parametrize(("page", "title"), [("ask", b"Ask a long document"), ("chat", b"Chat with a long memory")])
def test_it_serves_until_ctrl_c_and_ends_cleanly(page: str, title: bytes, tiny_folder: Path, tmp_path: Path) -> None:
    # Without npm the texts of the catalog cannot be fetched: the page is there all the same.
    command = [sys.executable, "-m", "longscope", "demo", "--page", page, "--port", "0"]
    command += ["--model", str(tiny_folder)]
    environment = {**os.environ, "PATH": str(tmp_path), "LONGSCOPE_HOME": str(tmp_path / "home")}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    said = process.stdout.readline() + process.stdout.readline()
    found = re.search(r"http://127\.0\.0\.1:\d+/", said)
    assert found, said + process.communicate(timeout=60)[1]
    with urllib.request.urlopen(found[0]) as answer:
        assert title in answer.read()
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert out.strip() == "ended"
    assert "Traceback" not in error
