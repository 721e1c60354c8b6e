"""Progress goes to stderr: a bar on a terminal, one line in a log, and nothing on stdout."""

import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

from catalog import progress

ROOT = Path(__file__).parents[2]
PROGRAM = """
import pathlib, sys, time
from catalog import progress
folder = pathlib.Path(sys.argv[1])
with progress.watch(folder, 3000, "fetching toy"):
    for number in range(3):
        (folder / str(number)).write_bytes(bytes(1000))
        time.sleep(0.15)
"""


def test_a_log_gets_one_line(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "longscope: fetching toy\n")


def test_a_terminal_gets_a_bar_that_grows_to_the_end(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    command = [sys.executable, "-c", PROGRAM, tmp_path]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # how a pseudo-terminal says that the other end is closed
            break
        shown += piece
        if not piece:
            break
    os.close(ours)
    assert process.communicate()[0] == b""
    text = shown.decode()
    assert "fetching toy:   0%" in text
    assert any(f"fetching toy:  {part}%" in text for part in (33, 67)), "it moves while files arrive"
    assert "fetching toy: 100%" in text


def test_the_bytes_of_a_folder_are_those_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a").write_bytes(bytes(10))
    (tmp_path / "deep" / "b").write_bytes(bytes(32))
    assert progress.folder_bytes(tmp_path) == 42
    assert progress.folder_bytes(tmp_path / "absent") == 0
