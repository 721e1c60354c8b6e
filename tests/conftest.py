"""What every test gets: fixed seeds, no network and no user cache unless marked ``real``, parity fixtures."""

import os
import random
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Before torch, tokenizers and the hub client are imported: they read these once. On tiny tensors a second thread
# costs more than it brings; `real` tests get all cores, and a test about threads asks for its own number.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# A job in the background ignores Ctrl-C, and so would the programs that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

LOOPBACK = ("127.", "::1", "localhost", "0.0.0.0")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-dir",
        type=Path,
        default=Path(__file__).parent / "golden",
        help="folder of parity fixtures, <system>/<case file> (default: golden/ beside the tests)",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a test with an argument ``golden_file`` one case per file of its module's GOLDEN_SYSTEM folder."""
    if "golden_file" not in metafunc.fixturenames:
        return
    root: Path = metafunc.config.getoption("--golden-dir").resolve()
    found = (root / metafunc.module.GOLDEN_SYSTEM).rglob("*")
    files = sorted(file for file in found if file.suffix in (".safetensors", ".json"))
    metafunc.parametrize("golden_file", files, ids=[file.relative_to(root).as_posix() for file in files])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drop the placeholder that pytest makes (and skips) for a parity test without fixture files."""
    empty = [item for item in items if "golden_file" in getattr(item, "fixturenames", ()) and _has_no_file(item)]
    if empty:
        config.hook.pytest_deselected(items=empty)
        items[:] = [item for item in items if item not in empty]


def _has_no_file(item: Any) -> bool:
    return not isinstance(item.callspec.params["golden_file"], Path)


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    """Start every test from the same random state; numpy and torch only where something has imported them."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def _shared_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("longscope-home")


@pytest.fixture(autouse=True)
def _closed_house(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, _shared_home: Path
) -> Iterator[None]:
    """Keep a test that is not ``real`` off the network and out of the user's cache; give ``real`` ones all cores."""
    if request.node.get_closest_marker("real"):
        import torch

        monkeypatch.delenv("OMP_NUM_THREADS")  # for the programs it starts
        threads = torch.get_num_threads()
        torch.set_num_threads(os.cpu_count() or 1)
        yield
        torch.set_num_threads(threads)
        return
    monkeypatch.setenv("LONGSCOPE_HOME", str(_shared_home))
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, _only_loopback(getattr(socket.socket, name)))
    monkeypatch.setattr(socket, "getaddrinfo", _only_loopback(socket.getaddrinfo))
    yield


def _only_loopback(function: Any) -> Any:
    def guarded(*arguments: Any, **options: Any) -> Any:
        # connect(socket, (host, port)) or getaddrinfo(host, ...); an address that is a str is a Unix socket.
        target = arguments[1] if isinstance(arguments[0], socket.socket) else arguments[:1]
        if isinstance(target, tuple) and target[0] and not str(target[0]).startswith(LOOPBACK):
            pytest.fail(f"a test that is not marked real tried to reach {target[0]!r}")
        return function(*arguments, **options)

    return guarded


@pytest.fixture
def longscope_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty LONGSCOPE_HOME of this test's own."""
    home = tmp_path / "longscope-home"
    home.mkdir()
    monkeypatch.setenv("LONGSCOPE_HOME", str(home))
    return home
