"""File bytes to text: encodings, HTML, PDF. What cannot be read is refused with the reason."""

from __future__ import annotations

import codecs
import contextlib
import importlib
import io
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

_BOMS = (
    # UTF-32 before UTF-16: the little-endian mark of the first starts with that of the second.
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_MAGIC = (
    (b"PK\x03\x04", "a zip archive or office document"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GGUF", "a GGUF model"),
    (b"\x7fELF", "a program"),
    (b"\xd0\xcf\x11\xe0", "an old office document"),
)
# Plain text holds no control characters but tab, newline, vertical tab, form feed, return and escape.
_CONTROL = bytes(set(range(32)) - set(b"\t\n\v\f\r\x1b"))
_DROPPED = ("script", "style", "template", "noscript", "svg", "iframe", "object")
# Marks that stand for breaks while a page's strings are joined; text read from a file cannot hold them.
_PARAGRAPH, _LINE, _CELL = "\x1d", "\x1e", "\x1f"
_PARAGRAPHS: tuple[str, ...] = (
    "address",
    "article",
    "aside",
    "blockquote",
    "body",
    "dd",
    "details",
    "dialog",
)
_PARAGRAPHS += (
    "div",
    "dl",
    "dt",
    "fieldset",
    "figcaption",
    "figure",
    "footer",
    "form",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "h6",
    "header",
)
_PARAGRAPHS += ("hr", "main", "nav", "ol", "p", "pre", "section", "table", "ul")
_LINES = ("br", "li", "tr", "option", "caption", "summary")


def read_file(name: str, path: Path) -> tuple[str, str]:
    """Return (title, text) of a file, called ``name`` in messages.

    Raises:
        ValueError: the file holds no readable text.
        ImportError: the format needs the extra ``longscope[read]``.
    """
    data = path.read_bytes()
    suffix = path.suffix.lower()
    if not data:
        raise ValueError(f"{name} is empty")
    if suffix == ".pdf" or data.startswith(b"%PDF-"):
        title, text = _pdf(name, data)
    elif suffix in (".html", ".htm", ".xhtml"):
        title, text = _html(name, data)
    else:
        text = decode(name, data)
        title = _heading(text) if suffix in (".md", ".markdown") else ""
    if not text.strip():
        raise ValueError(f"{name} holds no text, only white space")
    return title or path.stem, text


def decode(name: str, data: bytes) -> str:
    r"""Decode UTF-8, with or without a byte order mark, or UTF-16 or -32 with one; line ends become ``\n``.

    Raises:
        ValueError: binary content; or the first byte that is not valid, where it is and how to convert it.
    """
    encoding = next((encoding for mark, encoding in _BOMS if data.startswith(mark)), "utf-8-sig")
    if encoding == "utf-8-sig":
        _refuse_binary(name, data)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        shown = encoding.removesuffix("-sig").upper()
        raise ValueError(
            f"{name} is not valid {shown}: byte 0x{data[error.start]:02X} at offset {error.start} "
            f"(line {line}), {error.reason}; if it is Windows-1252 text, convert it with: "
            f"iconv -f WINDOWS-1252 -t UTF-8 {name} > converted.txt"
        ) from error
    if "\0" in text:
        raise ValueError(f"{name} is not a text file: it holds NUL characters")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _refuse_binary(name: str, data: bytes) -> None:
    """Refuse content that is no text in any encoding."""
    for magic, what in _MAGIC:
        if data.startswith(magic):
            raise ValueError(f"{name} is not a text file: it looks like {what}; give .txt, .md, .html or .pdf")
    sample = data[: 1 << 20]
    controls = len(sample) - len(sample.translate(None, _CONTROL))
    # One stray control character is an oddity; a NUL or one in a hundred is another kind of file.
    if b"\0" in sample or controls * 100 > len(sample):
        first = next(offset for offset, byte in enumerate(sample) if byte in _CONTROL)
        raise ValueError(
            f"{name} is not a text file: binary byte 0x{sample[first]:02X} at offset {first}; "
            "give .txt, .md, .html or .pdf"
        )


def _heading(text: str) -> str:
    """Return the first level-one heading of a Markdown text."""
    match = re.search(r"^#\s+(.+?)\s*#*$", text, re.MULTILINE)
    return match[1] if match else ""


def _need(module: str, package: str, name: str) -> ModuleType:
    """Import an optional module or say how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"reading {name} needs {package}; install it with: pip install 'longscope[read]'") from error


def _html(name: str, data: bytes) -> tuple[str, str]:
    """Return (title, text) of an HTML page, paragraphs kept apart by empty lines."""
    bs4 = _need("bs4", "beautifulsoup4", name)
    if not data.startswith(tuple(mark for mark, _ in _BOMS)):
        _refuse_binary(name, data)
    with warnings.catch_warnings():
        # Some pages are XML; the HTML parser reads them well enough.
        warnings.simplefilter("ignore")
        page = bs4.BeautifulSoup(data, "html.parser")
    if page.contains_replacement_characters:
        raise ValueError(
            f"{name} has bytes that are not valid {page.original_encoding}, its encoding; save it as UTF-8"
        )
    title = " ".join(page.title.get_text().split()) if page.title else ""
    for tag in page(["head", "title", *_DROPPED]):
        tag.decompose()
    for tag in page(_PARAGRAPHS + _LINES):
        mark = _PARAGRAPH if tag.name in _PARAGRAPHS else _LINE
        tag.insert_before(mark)
        tag.insert_after(mark)
    for tag in page(("td", "th")):
        tag.insert_after(_CELL)
    return title, _flow(page)


def _flow(page: Any) -> str:
    """Join a page's strings as a browser would: white space collapses except in ``<pre>``; marks break."""
    kept = {id(string) for pre in page(("pre", "textarea")) for string in pre.strings}
    flow: list[str] = []
    for string in page.strings:
        piece = str(string)
        if id(string) not in kept:
            piece = re.sub(r"[ \t\n\r\f\v]+", " ", piece)
            if flow and flow[-1].endswith((" ", _PARAGRAPH, _LINE, _CELL)):
                piece = piece.removeprefix(" ")
        if piece:
            flow.append(piece)
    gap = f"[ {_CELL}]*"
    breaks = re.compile(f"{gap}[{_PARAGRAPH}{_LINE}](?:{gap}[{_PARAGRAPH}{_LINE}])*")
    text = breaks.sub(lambda match: "\n\n" if _PARAGRAPH in match[0] else "\n", "".join(flow))
    return text.replace(_CELL, "\t").strip("\n ")


@contextlib.contextmanager
def _quiet(logger_name: str) -> Iterator[None]:
    """Hold a chatty library's warnings back while the block runs."""
    logger = logging.getLogger(logger_name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _pdf(name: str, data: bytes) -> tuple[str, str]:
    """Return (title, text) of a PDF, pages kept apart by empty lines."""
    pypdf = _need("pypdf", "pypdf", name)
    # A damaged file can trip the parser anywhere, so its ordinary errors count as damage too.
    damage = (
        pypdf.errors.PyPdfError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        OSError,
    )
    with _quiet("pypdf"):
        try:
            reader = pypdf.PdfReader(io.BytesIO(data))
            # Many files are encrypted with an empty password, only to forbid printing.
            locked = reader.is_encrypted and not reader.decrypt("")
            pages = [] if locked else [page.extract_text() for page in reader.pages]
            title = "" if locked else str((reader.metadata and reader.metadata.title) or "")
        except (*damage, RecursionError) as error:
            raise ValueError(f"{name} is not a readable PDF ({error or type(error).__name__})") from error
    if locked:
        raise ValueError(f"{name} is an encrypted PDF; save a copy without the password and give that")
    # Broken font tables yield lone surrogates, which no tokenizer accepts.
    text = "\n\n".join(page.strip() for page in pages).replace("\0", "")
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if not text.strip():
        raise ValueError(
            f"{name} has {len(pages)} pages and no extractable text; it may be a scan, so run OCR on it first"
        )
    return " ".join(title.split()), text
