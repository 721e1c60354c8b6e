"""What goes wrong while fetching: one clear line or a wait, nothing half-written, the old folder kept."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
import tqdm

import catalog
from catalog import store, table

ROOT = Path(__file__).parents[2]


def wait_for(condition, seconds: float = 20) -> None:
    """Poll until ``condition()`` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "what the test waits for did not happen"
        time.sleep(0.002)


def data_folder() -> list[str]:
    """Return what lies in the data folder, hidden entries included."""
    folder = catalog.home() / "data"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize("stage", ["work/0", "content/big.bin"])
def test_a_killed_fetch_leaves_nothing_that_counts(stage: str, shelf, start) -> None:
    wheel = shelf.wheel({"a.txt": b"one", "big.bin": bytes(40_000_000)})
    text = shelf.text(wheel)
    row = table.parse(text)[0]
    process = start(text)
    wait_for(lambda: list((catalog.home() / "data").glob(f".toy.new-*/{stage}")))
    process.kill()
    process.communicate()
    assert not store.folder_of(row).exists()
    assert store.fault(row) == "not installed"
    assert data_folder() != [], "the killed process could not clean up"
    small = table.parse(shelf.text(shelf.wheel({"a.txt": b"one"})))[0]
    assert (store.install(small) / "a.txt").read_bytes() == b"one"
    assert data_folder() == ["toy"], "the next fetch removed what the killed one left"


def test_an_interrupted_fetch_cleans_up_and_keeps_the_old_folder(toy: catalog.Row, shelf, start) -> None:
    process = start(shelf.text(shelf.wheel({"a.txt": b"two", "big.bin": bytes(40_000_000)}, "2.0"), "toy==2.0"))
    wait_for(lambda: list((catalog.home() / "data").glob(".toy.new-*/content/big.bin")))
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate()[1]
    assert data_folder() == ["toy"]
    assert (catalog.home() / "data" / "toy" / "a.txt").read_bytes() == b"one"


def test_a_wrong_checksum_names_both_and_keeps_the_old_folder(toy: catalog.Row, shelf) -> None:
    wheel = shelf.wheel({"a.txt": b"two"}, "2.0")
    row = table.parse(shelf.text(wheel, "toy==2.0"))[0]
    expected = row.sources[0].archives[0].sha256
    shelf.wheel({"a.txt": b"forged"}, "2.0")
    with pytest.raises(OSError, match="wrong checksum") as caught:
        store.install(row)
    message = str(caught.value)
    received = table.parse(shelf.text(wheel, "toy==2.0"))[0].sources[0].archives[0].sha256
    assert f"expected sha256 {expected}" in message
    assert f"received {received}" in message
    assert (store.folder_of(toy) / "a.txt").read_bytes() == b"one"
    assert data_folder() == ["toy"]


def test_a_cut_download_is_one_line(shelf) -> None:
    wheel = shelf.wheel({"a.txt": os.urandom(10_000)})
    text = shelf.text(wheel)
    wheel.write_bytes(wheel.read_bytes()[:5_000])
    with pytest.raises(OSError, match=r"tried `pip download toy==1\.0`") as caught:
        store.install(table.parse(text)[0])
    assert "\n" not in str(caught.value)
    assert data_folder() == []


def test_without_a_network_the_message_says_what_was_tried_and_what_helps(shelf) -> None:
    text = shelf.text(shelf.wheel({"a.txt": b"one"}))
    row = table.parse(text.replace("toy==1.0", "toy==9.9"))[0]
    with pytest.raises(OSError, match=r"tried `pip download toy==9\.9`: ERROR: .*toy==9\.9") as caught:
        store.install(row)
    assert str(catalog.home() / "local" / "toy") in str(caught.value)


def test_an_npm_package_becomes_a_folder(shelf, make_tar) -> None:
    archive = make_tar(
        {"package/package.json": b'{"name": "toy", "version": "1.0.0"}', "package/data/b.txt": b"second"}
    )
    folder = store.install(table.parse(shelf.text(archive, str(archive), "npm"))[0])
    assert (folder / "data" / "b.txt").read_text() == "second"
    assert data_folder() == ["toy"], "npm's cache and logs went with the scratch folder"


def test_npm_without_a_network_is_one_line(shelf, npm_package: Path) -> None:
    row = table.parse(shelf.text(npm_package / "package.json", "@no/such@1.0.0", "npm"))[0]
    with pytest.raises(OSError, match=r"tried `npm pack @no/such@1.0.0`: .*ENOTCACHED") as caught:
        store.install(row)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 900


def test_without_npm_the_message_says_what_to_install(shelf, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    row = table.parse(shelf.text(shelf.wheel({"a.txt": b"one"}), "@no/such@1.0.0", "npm"))[0]
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match=r"npm is missing.*install Node.js") as caught:
        store.install(row)
    assert str(catalog.home() / "local" / "toy") in str(caught.value)


def test_without_pip_the_message_says_how_to_get_it(shelf, tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "tqdm").symlink_to(Path(tqdm.__file__).parent)
    (tmp_path / "row.toml").write_text(shelf.text(shelf.wheel({"a.txt": b"one"})))
    program = "import sys; from catalog import store, table; store.install(table.parse(open(sys.argv[1]).read())[0])"
    done = subprocess.run(
        [tmp_path / "bare" / "bin" / "python", "-c", program, tmp_path / "row.toml"],
        env={**os.environ, "PATH": str(tmp_path), "PYTHONPATH": f"{ROOT}:{tmp_path / 'site'}"},
        capture_output=True,
        text=True,
    )
    assert "pip is missing" in done.stderr
    assert "-m ensurepip" in done.stderr


def test_the_next_source_is_tried_where_one_fails(shelf, npm_package: Path) -> None:
    archive = shelf.wheel({"a.txt": b"one"})
    first = shelf.text(archive, str(npm_package), "npm").partition("sources = [")[2].removesuffix("]\n")
    row = table.parse(shelf.text(archive).replace("sources = [", f"sources = [{first}, "))[0]
    assert [source.type for source in row.sources] == ["npm", "wheel"]
    folder = store.install(row)
    assert (folder / "a.txt").read_bytes() == b"one"
    assert json.loads((folder / "catalog.json").read_text())["source"] == "wheel"


def test_where_all_sources_fail_each_one_s_answer_is_given(shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = shelf.wheel({"a.txt": b"one"})
    first = shelf.text(wheel, "@no/such@1.0.0", "npm").partition("sources = [")[2].removesuffix("]\n")
    row = table.parse(shelf.text(wheel).replace("sources = [", f"sources = [{first}, "))[0]
    wheel.unlink()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(OSError, match=r"npm is missing.*; then tried `pip download toy==1\.0`"):
        store.install(row)


def test_two_processes_fetch_once_and_the_other_waits(shelf, start) -> None:
    text = shelf.text(shelf.wheel({"a.txt": b"one"}))
    lock = catalog.home() / "locks" / "toy.lock"
    lock.parent.mkdir()
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        both = [start(text), start(text)]
        for process in both:
            assert "another process is fetching toy; waiting" in process.stderr.readline()
    ends = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("fetching toy\n" in errors for _, errors in ends) == 1, "exactly one download"
    assert {output.strip() for output, _ in ends} == {str(catalog.home() / "data" / "toy")}
    assert data_folder() == ["toy"]


def test_a_full_disk_is_noticed_before_the_download(shelf) -> None:
    free = shutil.disk_usage(catalog.home()).free
    text = shelf.text(shelf.wheel({"a.txt": b"one"}), disk=2 * free)
    with pytest.raises(OSError, match=r"not enough disk space .* for toy") as caught:
        store.install(table.parse(text)[0])
    assert caught.value.errno == errno.ENOSPC
    assert str(2 * free)[:3] in str(caught.value)
    assert "LONGSCOPE_HOME" in str(caught.value)
    assert data_folder() == []


@pytest.fixture
def small_home(tiny_disk: Callable[[str], Path], toy: catalog.Row, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file system of two megabytes as LONGSCOPE_HOME, with ``toy`` in it."""
    place = tiny_disk("2m")
    shutil.copytree(catalog.home(), place, dirs_exist_ok=True)
    monkeypatch.setenv("LONGSCOPE_HOME", str(place))
    return place


@pytest.mark.parametrize("full", ["unpacking", "pip", "npm"])
def test_a_disk_that_fills_up_is_one_clear_error(full: str, shelf, npm_package: Path, small_home: Path) -> None:
    content = bytes(8_000_000) if full == "unpacking" else os.urandom(4_000_000)
    archive = shelf.wheel({"a.txt": b"two", "big.bin": content}, "2.0")
    text = shelf.text(archive, "toy==2.0", size=1000)
    if full == "npm":
        (npm_package / "data" / "c.bin").write_bytes(content)
        text = shelf.text(archive, str(npm_package), "npm", size=1000)
    with pytest.raises(OSError, match=r"not enough disk space .* for toy: .* needed, .* free") as caught:
        store.install(table.parse(text)[0])
    assert caught.value.errno == errno.ENOSPC
    assert (small_home / "data" / "toy" / "a.txt").read_bytes() == b"one"
    assert data_folder() == ["toy"]
