"""``longscope synth requests | run | assemble`` as a user types them, against a real server."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import longscope

ROOT = Path(__file__).parents[2]
SERVER = runpy.run_path(str(ROOT / "tests" / "longllm" / "chat_server.py"))
ChatServer, Fault = SERVER["ChatServer"], SERVER["Fault"]
TEXT = "\n\n".join(f"The ship number {n} sails to port {n} and comes back with {n} whales." for n in range(40))
ANSWER = '```json\n[{"question": "How many whales?", "answer": "some"}]\n```'


@pytest.fixture
def folder(tmp_path: Path, tiny_folder: Path) -> Path:
    """A folder of requests about a text."""
    (tmp_path / "book.txt").write_text(TEXT)
    chunk = ["--recipe.chunk", "60", "--tokenizer", str(tiny_folder)]
    words = ["synth", "requests", str(tmp_path / "book.txt"), "--out", str(tmp_path / "one"), *chunk]
    assert longscope.main(words) == 0
    return tmp_path / "one"


def test_from_a_text_to_training_rows_with_a_client_killed_on_the_way(folder: Path, capsys: Any) -> None:
    def record(*words: str | Path) -> dict[str, Any]:
        capsys.readouterr()
        assert longscope.main(["synth", *map(str, words), "--json"]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    count = len((folder / "requests.jsonl").read_text().splitlines())
    assert count > 10

    def reply(body: dict[str, Any], before: int) -> Any:
        return Fault(429, b"{}", {"retry-after": "0.05"}) if not before else ANSWER

    with ChatServer(reply, delay=0.03) as server:
        words = ["--url", server.url, "--model", "m", "--limits.concurrency", "2"]
        words += ["--price.prompt", "10", "--price.completion", "20"]
        command = [sys.executable, "-m", "longscope", "synth", "run", str(folder), *words]
        client = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        results, limit = folder / "results.jsonl", time.monotonic() + 120
        while not (results.exists() and results.read_bytes().count(b"\n") >= 3) and time.monotonic() < limit:
            time.sleep(0.01)
        os.kill(client.pid, signal.SIGKILL)
        client.wait()
        kept = results.read_bytes().count(b"\n")
        done = record("run", folder, *words)
        assert (done["requests"], done["before"], done["failed"]) == (count, kept, 0)
        assert sum(server.answered.values()) <= count + 2
    usage = [json.loads(line) for line in (folder / "usage.jsonl").read_text().splitlines()]
    assert len(usage) >= count
    assert usage[-1]["cost"] == pytest.approx((10 * 10 + 5 * 20) / 1e6)
    made = record("assemble", folder, "--assembly.target", "300")
    assert (made["used"], made["dropped"], made["pairs"]) == (count, {}, count)
    rows = [json.loads(line) for line in Path(made["file"]).read_text().splitlines()]
    assert made["rows"] == len(rows) < count
    assert all(row["tokens"] <= 300 + 20 * len(row["conversations"]) for row in rows)


def test_bad_command_lines_end_with_one_line(folder: Path, tmp_path: Path, tiny_folder: Path, capsys: Any) -> None:
    nothing = tmp_path / "nothing"
    for words, told in [
        (["run", folder, "--url", "localhost:1", "--model", "m"], "an endpoint is an http or https address"),
        (["run", nothing, "--url", "http://127.0.0.1:1/v1", "--model", "m"], "longscope synth requests writes it"),
        (["assemble", folder], "longscope synth run writes them"),
        (["assemble", folder, "--assembly.target", "0"], "target must be at least 1, got 0"),
        (["requests", tmp_path / "book.txt", "--out", folder, "--tokenizer", tiny_folder, "--recipe.seed", "3"],
         "holds the requests of another recipe"),
        (["requests", tmp_path / "book.txt", "--out", nothing, "--tokenizer", tiny_folder, "--exclude", folder],
         "1 used by another stage"),
    ]:  # fmt: skip
        capsys.readouterr()
        assert longscope.main(["synth", *map(str, words)]) == 2
        error = capsys.readouterr().err
        assert told in error
        assert len(error.splitlines()) == 1


def test_a_model_is_served_until_ctrl_c(tiny_folder: Path) -> None:
    from longllm.endpoint import Endpoint

    command = [sys.executable, "-m", "longscope", "serve", "--model", str(tiny_folder), "--port", "0"]
    shown = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    address = shown.stdout.readline().split(" at ")[1].split()[0]
    with Endpoint(address, "tiny") as endpoint:
        assert isinstance(endpoint.ask("Hello", max_tokens=3), str)
    shown.send_signal(signal.SIGINT)
    out, _ = shown.communicate(timeout=60)
    assert shown.returncode == 0
    assert "1 answers" in out
