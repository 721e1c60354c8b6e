"""Hub rows against a small hub of our own on the loopback, with the real huggingface_hub client."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from catalog import store, table

ROOT = Path(__file__).parents[2]
COMMIT = "442ebf09" + "ab" * 16
LATEST = "5b72a554" + "cd" * 16
FILES = {
    "config.json": b'{"model_type": "bert"}',
    "model.safetensors": b"weights" * 1000,
    "pytorch_model.bin": b"the same weights" * 1000,
    "1_Pooling/config.json": b"{}",
    "modeling_remote.py": b"raise SystemExit('remote code')",
    "onnx/model.onnx": b"onnx",
}
LARGE = (".safetensors", ".bin", ".onnx")
ZEROS = "0" * 64
ROW = """
[toy]
kind = "model"
what = "a toy"
licence = "MIT"
version = "1"
size = 1000
sources = [{ type = "hub", repo = "me/toy" }]
"""


class Hub(BaseHTTPRequestHandler):
    """The four addresses of the hub that a download asks for."""

    files: dict[str, bytes]
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.asked.append(self.path)
        place, _, _ = self.path.partition("?")
        if "/resolve/" in place:
            self.send_file(place.partition("/resolve/")[2].partition("/")[2])
        elif place.startswith("/api/models/me/toy/commits/"):
            self.send_data(
                [
                    {"id": commit, "title": "", "message": "", "date": "2024-01-01T00:00:00.000Z", "authors": []}
                    for commit in (LATEST, COMMIT)
                ]
            )
        elif place.startswith("/api/models/me/toy/tree/"):
            self.send_data([{"type": "file", "path": name, **self.facts(name)} for name in self.files])
        elif place.startswith("/api/models/me/toy"):
            known = {"main": LATEST, LATEST: LATEST, COMMIT: COMMIT}
            commit = known.get(place.rpartition("/")[2])
            siblings = [{"rfilename": name, **self.facts(name)} for name in self.files]
            self.send_data({"id": "me/toy", "modelId": "me/toy", "sha": commit, "siblings": siblings, "tags": []})
        else:
            self.send_error(404)

    def facts(self, name: str) -> dict[str, object]:
        content = self.files[name]
        facts: dict[str, object] = {"size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        facts["blobId"] = facts["oid"]
        if name.endswith(LARGE):
            digest = hashlib.sha256(content).hexdigest()
            facts["lfs"] = {"oid": digest, "sha256": digest, "size": len(content), "pointerSize": 130}
        return facts

    def send_file(self, name: str) -> None:
        content = self.files[name]
        kind = hashlib.sha256 if name.endswith(LARGE) else hashlib.sha1
        self.send_response(200)
        self.send_header("ETag", f'"{kind(FILES[name]).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.path.partition("/resolve/")[2].partition("/")[0])
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def send_data(self, data: object) -> None:
        body = json.dumps(data).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Stay silent."""


@pytest.fixture
def hub(tmp_path: Path, longscope_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A running hub with the files of ``FILES``; processes started from here on use it."""
    handler = type("RunningHub", (Hub,), {"files": dict(FILES), "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    settings = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hf")}
    settings |= {
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "*",
        "HF_HUB_CACHE": str(tmp_path / "hf"),
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    yield handler
    server.shutdown()
    server.server_close()


Finish = Callable[..., tuple[int, str]]


@pytest.fixture
def finish(start) -> Finish:
    """Install a row in another process, as the client reads its settings on import; return code and stderr."""

    def run(text: str, *options: str) -> tuple[int, str]:
        process = start(text, *options)
        _, errors = process.communicate(timeout=60)
        return process.returncode, errors

    return run


def manifest_of(row: table.Row) -> dict:
    return json.loads((store.folder_of(row) / "catalog.json").read_text())


def test_a_repository_is_linked_from_the_shared_cache_and_recorded(hub: type[Hub], finish: Finish) -> None:
    code, errors = finish(ROW)
    assert code == 0, errors
    row = table.parse(ROW)[0]
    folder = store.folder_of(row)
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == {"config.json", "model.safetensors", "1_Pooling/config.json", "catalog.json"}
    assert (folder / "model.safetensors").resolve().is_relative_to(Path(os.environ["HF_HUB_CACHE"]).resolve())
    manifest = manifest_of(row)
    assert (manifest["repo"], manifest["revision"], manifest["commit"]) == ("me/toy", "main", LATEST)
    digest = hashlib.sha256(FILES["model.safetensors"]).hexdigest()
    assert manifest["files"]["model.safetensors"] == {"size": 7000, "sha256": digest}
    assert not any("modeling_remote" in place or "onnx" in place for place in hub.asked)
    assert store.fault(row) == ""
    assert store.verify_row(row) == 3

    # Installed anew: the shared cache has everything, so the hub is not asked.
    (folder / "catalog.json").unlink()
    hub.asked.clear()
    code, errors = finish(ROW)
    assert code == 0, errors
    assert hub.asked == []

    # The shared cache emptied by its owner: the links dangle, which is noticed.
    (folder / "model.safetensors").resolve().unlink()
    assert store.fault(row) == "model.safetensors is missing"
    code, errors = finish(ROW)
    assert code == 0, errors
    assert store.fault(row) == ""


def test_a_row_may_be_pinned_by_the_start_of_a_commit_and_by_files(hub: type[Hub], finish: Finish) -> None:
    digest = hashlib.sha256(FILES["config.json"]).hexdigest()
    text = ROW.replace('"me/toy"', f'"me/toy", revision = "442ebf09", sha256 = ["config.json {digest}"]')
    code, errors = finish(text)
    assert code == 0, errors
    assert manifest_of(table.parse(text)[0])["commit"] == COMMIT


def test_damage_on_the_way_is_noticed_and_repaired_by_the_next_try(hub: type[Hub], finish: Finish) -> None:
    hub.files["model.safetensors"] = FILES["model.safetensors"][:-1] + b"X"
    code, errors = finish(ROW)
    assert code != 0
    assert "model.safetensors in the Hugging Face cache is damaged" in errors
    assert hashlib.sha256(FILES["model.safetensors"]).hexdigest() in errors
    assert store.fault(table.parse(ROW)[0]) == "not installed"
    hub.files["model.safetensors"] = FILES["model.safetensors"]
    code, errors = finish(ROW)
    assert code == 0, errors


def test_a_pinned_file_must_be_the_one_that_was_pinned(hub: type[Hub], finish: Finish) -> None:
    code, errors = finish(ROW.replace('"me/toy"', f'"me/toy", sha256 = ["config.json {ZEROS}"]'))
    assert code != 0
    received = hashlib.sha256(FILES["config.json"]).hexdigest()
    assert f"config.json is not the pinned version: expected sha256 {ZEROS}, received {received}" in errors


def test_an_unreachable_hub_is_one_line(hub: type[Hub], finish: Finish, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    code, errors = finish(ROW)
    last = errors.strip().splitlines()[-1]
    assert code != 0
    assert last.startswith("OSError: cannot fetch toy: tried the hub repository me/toy at main: ")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, errors = finish(ROW)
    assert "offline mode is enabled" in errors.strip().splitlines()[-1]
    assert hub.asked == []


def test_looking_at_the_table_does_not_import_the_client() -> None:
    program = "import sys, catalog; catalog.rows(); sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
