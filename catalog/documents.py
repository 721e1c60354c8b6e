"""Documents by name or path: files of several formats, and the texts of the catalog's data sets."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from catalog import readers, store, table

# Parts of a surname that the file names keep apart, and how they are written.
_PARTICLES = {"van": "Van ", "mc": "Mc"}


@dataclass(frozen=True)
class Document:
    """A text to work on: the name it was asked for by, a title for people, and the text itself.

    >>> import catalog
    >>> catalog.Document("notes.txt", "notes", "Call me Ishmael.").title
    'notes'
    """

    name: str
    title: str
    text: str


def read_document(reference: str | os.PathLike[str]) -> Document:
    """Read a document: a file (.txt, .md, .html, .pdf or other plain text) or a name of the catalog.

    Catalog names are ``moby-dick``, ``sotu/1999``, ``sotu/1953-truman``; the data is fetched on first use. An
    existing file goes before a catalog name.

    Raises:
        ValueError: unknown name, several documents of that name, or a file whose text cannot be read.
        OSError: no such file, or the data set cannot be fetched.
        ImportError: .html and .pdf need the extra ``longscope[read]``.

    >>> import catalog, pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = pathlib.Path(folder, "whale.md")
    ...     _ = file.write_text("# The whale\\n\\nIt is white.")
    ...     catalog.read_document(file).title
    'The whale'
    """
    name = os.fspath(reference)
    if not name:
        raise ValueError("no document was named; give a file or a name such as sotu/1999")
    path = Path(name).expanduser()
    if path.is_file():
        return Document(name, *readers.read_file(name, path))
    collection, _, member = name.partition("/")
    if collection in _collections():
        return _read_member(collection, member)
    if path.is_dir():
        raise IsADirectoryError(f"{name} is a directory; name one file in it")
    if path.exists():
        raise OSError(f"{name} is not a regular file")
    known = ", ".join(_collections())
    raise FileNotFoundError(f"no file {name!r}, and the catalog has no document of that name (its documents: {known})")


def documents(collection: str) -> list[str]:
    """Return the names of a collection's documents, in order; the data set is fetched on first use.

    ``documents("sotu")`` begins with ``sotu/1790-washington``; each name can be given to ``read_document``.

    Raises:
        ValueError: the catalog has no collection of that name.
        OSError: the data set cannot be fetched.
    """
    if collection not in _collections():
        raise ValueError(f"unknown collection {collection!r}; the collections are {', '.join(_collections())}")
    files = _files(collection)
    return [collection] if len(files) == 1 else [f"{collection}/{_short_name(file)}" for file in files]


def _collections() -> dict[str, table.Texts]:
    return {row.name: row.documents for row in table.rows() if row.documents}


def _files(collection: str) -> list[Path]:
    """Return the text files of a collection, in order."""
    folder = store.path(collection)
    files = sorted(folder.glob(_collections()[collection].pattern))
    if not files:
        raise OSError(f"{folder} holds no documents; restore it with: longscope fetch {collection} --force")
    return files


def _president(file: Path) -> tuple[str, list[str]]:
    """Return year and names of a file such as ``1837_martin_van_buren_d.txt``.

    >>> _president(Path("1897_william_mc_kinley_r.txt"))
    ('1897', ['William', 'McKinley'])
    """
    year, *words, _party = file.stem.split("_")
    names: list[str] = []
    particle = ""
    for word in words:
        if word in _PARTICLES:
            particle = _PARTICLES[word]
        else:
            names.append(particle + word.capitalize())
            particle = ""
    return year, names


def _short_name(file: Path) -> str:
    """Return the name a speech is listed under: ``1837-van-buren``."""
    year, names = _president(file)
    return f"{year}-{names[-1]}".lower().replace(" ", "-")


def _is_meant(member: str, file: Path) -> bool:
    """Tell whether ``1953``, ``1953-truman`` or ``1953-harry-s-truman`` means a file."""
    year, names = _president(file)
    endings = ["-".join(names[start:]).lower().replace(" ", "-") for start in range(len(names))]
    return member in (year, *(f"{year}-{ending}" for ending in endings))


def _read_member(collection: str, member: str) -> Document:
    """Read one document of a data set; its name may be a year alone where that is unambiguous."""
    title = _collections()[collection].title
    files = _files(collection)
    if len(files) == 1:
        if member:
            raise ValueError(f"{collection} is one document, not a folder of them; ask for {collection!r}")
        return Document(collection, title, readers.decode(collection, files[0].read_bytes()))
    found = [file for file in files if _is_meant(member.lower(), file)]
    if len(found) == 1:
        name = f"{collection}/{_short_name(found[0])}"
        year, names = _president(found[0])
        return Document(name, f"{title} {year}, {' '.join(names)}", readers.decode(name, found[0].read_bytes()))
    if found:
        names = [f"{collection}/{_short_name(file)}" for file in found]
        raise ValueError(f"{collection}/{member} means {len(found)} documents; name one: {', '.join(names)}")
    near = [file for file in files if member and file.name.startswith(member[:4])] or [files[0], files[-1]]
    problem = f"no document {member!r} in {collection}" if member else f"{collection} holds {len(files)} documents"
    names = [f"{collection}/{_short_name(file)}" for file in near]
    raise ValueError(f"{problem}; name one of {len(files)}, such as {' or '.join(names)}")
