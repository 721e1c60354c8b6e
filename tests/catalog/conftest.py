"""Real wheels and npm packages, built in a temporary folder and fetched with the real pip and npm, offline."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from catalog import store, table

ROOT = Path(__file__).parents[2]
INSTALL = "import pathlib, sys; from catalog import store, table; "
INSTALL += "print(store.install(table.parse(pathlib.Path(sys.argv[1]).read_text())[0], '--force' in sys.argv))"


@dataclass
class Shelf:
    """A folder of wheels that pip is pointed at, and rows of the catalog for what lies there."""

    folder: Path

    def wheel(self, files: dict[str, bytes], version: str = "1.0") -> Path:
        """Write a small but valid wheel; ``files`` land in its package folder."""
        about = {
            "METADATA": f"Metadata-Version: 2.1\nName: toy\nVersion: {version}\n",
            "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            "RECORD": "",
        }
        path = self.folder / f"toy-{version}-py3-none-any.whl"
        members = {f"toy/{name}": content for name, content in files.items()}
        members |= {f"toy-{version}.dist-info/{name}": text.encode() for name, text in about.items()}
        with zipfile.ZipFile(path, "w") as wheel:
            for name, content in members.items():
                # ZipInfo without a time: the same files make the same archive.
                wheel.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED, 1)
        return path

    def text(self, archive: Path, spec: str = "toy==1.0", tool: str = "wheel", disk: int = 1000, **pins: object) -> str:
        """Return the TOML of a row called ``toy`` with one archive; ``pins`` replace its true size and sha256."""
        strip = "toy/" if tool == "wheel" else "package/"
        true = {"size": archive.stat().st_size, "sha256": hashlib.sha256(archive.read_bytes()).hexdigest()}
        part = {"spec": spec, **true, **pins}
        values = ", ".join(f"{key} = {json.dumps(value)}" for key, value in part.items())
        return (
            f'[toy]\nkind = "data"\nwhat = "a toy"\nlicence = "MIT"\nversion = "{spec[-3:]}"\nsize = {part["size"]}\n'
            f'disk = {disk}\nsources = [{{ type = "{tool}", archives = [{{ {values} }}], '
            f'take = ["{strip}*"], strip = ["{strip}"] }}]\n'
        )

    def row(self, files: dict[str, bytes], version: str = "1.0") -> table.Row:
        """Build a wheel and return the row that fetches it."""
        return table.parse(self.text(self.wheel(files, version), f"toy=={version}"))[0]


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, longscope_home: Path) -> Shelf:
    """The only place where pip looks for wheels; npm is kept offline and LONGSCOPE_HOME is empty."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    settings = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_CONFIG_FILE": os.devnull}
    for name, value in {**settings, "npm_config_offline": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    return Shelf(folder)


@pytest.fixture(scope="session")
def _installed_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, table.Row]:
    """A home with the row ``toy`` installed by pip, made once and copied for each test that wants one."""
    home, folder = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("wheels")
    row = Shelf(folder).row({"a.txt": b"one", "deep/b.txt": b"two"})
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"LONGSCOPE_HOME": str(home), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder)}.items():
            patch.setenv(name, value)
        store.install(row)
    return home, row


@pytest.fixture
def toy(shelf: Shelf, longscope_home: Path, _installed_once: tuple[Path, table.Row]) -> table.Row:
    """The row of ``{"a.txt": b"one", "deep/b.txt": b"two"}``, installed; the shelf is empty."""
    home, row = _installed_once
    shutil.copytree(home, longscope_home, dirs_exist_ok=True)
    return row


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start another process that installs the row of a TOML text, as ``longscope fetch`` would."""
    started: list[subprocess.Popen[str]] = []

    def run(text: str, *options: str) -> subprocess.Popen[str]:
        file = tmp_path / f"row{len(started)}.toml"
        file.write_text(text)
        command = [sys.executable, "-c", INSTALL, str(file), *options]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount real file systems of a given size, such as ``2m``; only root on Linux can."""
    mounted: list[Path] = []

    def make(size: str) -> Path:
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        if sys.platform != "linux" or os.geteuid() != 0:
            pytest.skip("only root on Linux can mount a tiny file system")
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mounting a tiny file system is not allowed here: {done.stderr.strip()}")
        mounted.append(place)
        return place

    yield make
    for place in mounted:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture
def npm_package(tmp_path: Path) -> Path:
    """A folder that ``npm pack`` can pack: package.json and two data files."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed; what happens then is another test")
    folder = tmp_path / "npm-toy"
    (folder / "data").mkdir(parents=True)
    (folder / "package.json").write_text('{"name": "toy", "version": "1.0.0", "license": "MIT"}')
    (folder / "data" / "a.txt").write_text("first")
    (folder / "data" / "b.txt").write_text("second")
    return folder


@pytest.fixture
def make_tar(tmp_path: Path) -> Callable[[dict[str, bytes | str]], Path]:
    """Write a .tgz of the given members; a ``str`` instead of bytes makes a symbolic link to it."""

    def make(members: dict[str, bytes | str]) -> Path:
        path = tmp_path / "made.tgz"
        with tarfile.open(path, "w:gz") as tar:
            for name, content in members.items():
                entry = tarfile.TarInfo(name)
                if isinstance(content, str):
                    entry.type, entry.linkname, content = tarfile.SYMTYPE, content, b""
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
        return path

    return make
