"""Hugging Face repositories: files stay in the Hugging Face cache, which programs share; we link them."""

from __future__ import annotations

import fnmatch
import json
import re
from pathlib import Path
from typing import Any

from catalog.archive import sha256
from catalog.progress import note
from catalog.sources import SourceError
from catalog.space import DiskFullError, room
from catalog.table import Source

# Other runtimes' weights, pictures, and Python: models here are stock classes, remote code is never run.
_NEVER = (
    *("onnx/*", "openvino/*", "*.onnx", "*.onnx_data", "*.msgpack", "*.h5", "*.ot"),
    *("*.py", "*.jpg", "*.png", "imgs/*"),
)
_WEIGHTS = ("*.safetensors", "*.bin", "*.pth", "*.pt")


def link_snapshot(name: str, source: Source, content: Path, fresh: bool) -> dict[str, Any]:
    """Fill ``content`` with links to a repository's files in the Hugging Face cache, downloading what lacks.

    A complete snapshot in the cache is used without asking the hub, unless ``fresh``. Large files are checked
    against the sha256 that the hub gave for them.

    Raises:
        OSError: not in the cache and not to be had from the hub; no room; or a damaged file.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    cache = Path(constants.HF_HUB_CACHE).expanduser().absolute()
    repository = cache / repo_folder_name(repo_id=source.repo, repo_type="model")
    snapshot = None if fresh else _cached(repository, source.revision)
    if snapshot is None:
        snapshot = _download(name, source, cache)
    pinned = dict(entry.split() for entry in source.sha256)
    for file in sorted(path for path in snapshot.rglob("*") if path.is_file()):
        relative = file.relative_to(snapshot)
        if _wanted(relative.as_posix(), source):
            _check(file, pinned.get(relative.as_posix()))
            (content / relative).parent.mkdir(parents=True, exist_ok=True)
            (content / relative).symlink_to(file)
    return {"repo": source.repo, "revision": source.revision, "commit": snapshot.name}


def _wanted(name: str, source: Source) -> bool:
    return not any(fnmatch.fnmatchcase(name, pattern) for pattern in (*_NEVER, *source.skip))


def _cached(repository: Path, revision: str) -> Path | None:
    """Return the cached snapshot of a branch, tag or (start of a) commit if it looks complete."""
    reference = repository / "refs" / revision
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    for snapshot in sorted((repository / "snapshots").glob(f"{commit}*")):
        names = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.exists()]
        weights = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in _WEIGHTS)]
        shards = set()
        for index in snapshot.glob("*.index.json"):
            shards |= set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        whole_safetensors = any(name.endswith(".safetensors") for name in weights)
        shards = {shard for shard in shards if shard.endswith(".safetensors") or not whole_safetensors}
        # Programs that need one file only leave partial snapshots behind; those are completed, not used.
        partial = (repository / "blobs").is_dir() and any((repository / "blobs").glob("*.incomplete"))
        if weights and shards <= set(names) and not partial:
            return snapshot
    return None


def _download(name: str, source: Source, cache: Path) -> Path:
    """Download the wanted files of a repository into the Hugging Face cache; return the snapshot's folder."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    # The bases are OSError and the root error of whichever HTTP library the installed version uses.
    failures: tuple[type[BaseException], ...] = (*HfHubHTTPError.__bases__, RuntimeError)
    try:
        revision = source.revision
        if re.fullmatch("[0-9a-f]{7,39}", revision):
            # The hub takes whole commit names only; a row may hold the first digits.
            commits = [commit.commit_id for commit in HfApi().list_repo_commits(source.repo)]
            revision = next((commit for commit in commits if commit.startswith(revision)), revision)
        info = HfApi().model_info(source.repo, revision=revision, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or [] if _wanted(file.rfilename, source)}
        if any(re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", file) for file in sizes):
            # The same weights a second time.
            sizes = {file: size for file, size in sizes.items() if not file.startswith("pytorch_model")}
        cache.mkdir(parents=True, exist_ok=True)
        note(f"fetching {name} from the hub repository {source.repo}: {len(sizes)} files")
        with room(cache, sum(sizes.values()), source.repo, "set HF_HOME to a folder on another disk"):
            return Path(snapshot_download(source.repo, revision=revision, allow_patterns=sorted(sizes)))
    except failures as error:
        if isinstance(error, DiskFullError):
            raise
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SourceError(f"tried the hub repository {source.repo} at {source.revision}: {first}") from error


def _check(file: Path, pinned: str | None) -> None:
    """Compare a file with the sha256 pinned for it and, if large, with the one that the hub gave.

    The cache stores a large file under that sha256. A damaged one is dropped, so that the next try replaces it.
    """
    blob = file.resolve()
    given = blob.name if re.fullmatch("[0-9a-f]{64}", blob.name) else None
    received = sha256(blob) if given or pinned else None
    if given not in (None, received):
        blob.unlink()
        raise SourceError(
            f"{file.name} in the Hugging Face cache is damaged: expected sha256 {given}, received {received}; "
            "it was removed, so fetch again"
        )
    if pinned not in (None, received):
        raise SourceError(f"{file.name} is not the pinned version: expected sha256 {pinned}, received {received}")
