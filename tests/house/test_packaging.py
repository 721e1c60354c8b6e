"""The wheel: built from a copy of the checkout, installed elsewhere, used from there. Needs no network."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import longscope

LEFT_OUT = shutil.ignore_patterns(".*", "tests", "out", "build", "dist", "*.egg-info", "__pycache__")


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """Run a program that has to succeed; return its stdout."""
    environment = {**os.environ, **variables}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(root, folder / "checkout", ignore=LEFT_OUT)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    run(*build, cwd=folder / "checkout")
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    target = wheel.parent / "elsewhere"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target"]
    run(*install, target, wheel, cwd=wheel.parent)
    return target


def test_the_wheel_holds_every_module_and_data_file_of_the_packages_and_no_test(
    wheel: Path, root: Path, project: dict
) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {"longscope.py"}
    for package in project["tool"]["setuptools"]["packages"]:
        folder = root / package.replace(".", "/")
        files = [file for file in folder.iterdir() if file.suffix in (".py", ".toml", ".yaml", ".c", ".h", ".cpp")]
        files += [
            file for kind in ("weights", "runs", "recipes") for file in (folder / kind).rglob("*") if file.is_file()
        ]
        expected |= {file.relative_to(root).as_posix() for file in files}
    assert names == expected


def test_the_wheel_carries_licence_version_and_command(wheel: Path) -> None:
    info = f"longscope-{longscope.__version__}.dist-info/"
    archive = zipfile.ZipFile(wheel)
    assert "MIT License" in archive.read(f"{info}licenses/LICENSE").decode()
    assert "longscope = longscope:main" in archive.read(f"{info}entry_points.txt").decode()


def test_an_installed_copy_reads_the_catalog(installed: Path, tmp_path: Path) -> None:
    program = "import catalog; print(catalog.__file__); print(catalog.row('smollm2-135m-instruct').licence)"
    place, licence = run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(installed)).splitlines()
    assert Path(place).is_relative_to(installed)
    assert licence == "Apache-2.0"


def test_an_installed_copy_has_the_longscope_command(installed: Path, tmp_path: Path) -> None:
    out = run(installed / "bin" / "longscope", "--help", cwd=tmp_path, PYTHONPATH=str(installed))
    assert out == longscope.usage() + "\n"
