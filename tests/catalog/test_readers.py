"""Files to text: encodings, Markdown, HTML, PDF, and every refusal in one clear line."""

import codecs
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import catalog

ROOT = Path(__file__).parents[2]
TEXT = "Für Élise — “quoted” 北京 🐳\nsecond line\n"
Write = Callable[[str, bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to(name: str, content: bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return to


def pdf_bytes(pages: list[str], title: str = "", password: str = "") -> bytes:
    """Write a PDF by hand: one line of Helvetica on each page; with ``password``, encrypted by pypdf."""
    import io

    import pypdf

    kids = " ".join(f"{4 + 2 * number} 0 R" for number in range(len(pages)))
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>"]
    objects.append("<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>")
    for number, text in enumerate(pages):
        stream = f"BT /F1 12 Tf 72 700 Td ({text}) Tj ET" if text else ""
        fonts = "/Resources << /Font << /F1 3 0 R >> >> /MediaBox [0 0 612 792]"
        objects.append(f"<< /Type /Page /Parent 2 0 R {fonts} /Contents {5 + 2 * number} 0 R >>")
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
    body, offsets = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, start=1):
        offsets.append(len(body))
        body += f"{number} 0 obj\n{content}\nendobj\n".encode()
    table = "".join(f"{offset:010d} 00000 n \n" for offset in offsets)
    size = len(objects) + 1
    end = f"xref\n0 {size}\n0000000000 65535 f \n{table}trailer\n<< /Size {size} /Root 1 0 R >>\n"
    plain = body + f"{end}startxref\n{len(body)}\n%%EOF\n".encode()
    if not title and not password:
        return plain
    writer = pypdf.PdfWriter(clone_from=io.BytesIO(plain))
    writer.add_metadata({"/Title": title})
    if password:
        writer.encrypt(password, algorithm="RC4-128")
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        TEXT.encode(),
        TEXT.encode("utf-8-sig"),
        codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"),
        codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
        codecs.BOM_UTF32_LE + TEXT.encode("utf-32-le"),
        TEXT.replace("\n", "\r\n").encode(),
        TEXT.replace("\n", "\r").encode(),
    ],
    ids=["utf-8", "utf-8-sig", "utf-16-le", "utf-16-be", "utf-32-le", "crlf", "cr"],
)
def test_encodings_and_line_ends_give_the_same_text(data: bytes, write: Write) -> None:
    document = catalog.read_document(write("whale.txt", data))
    assert document.text == TEXT
    assert document.title == "whale"


@pytest.mark.parametrize("name", ["README", "notes.rst", "page.markdown", "table.csv"])
def test_any_plain_text_is_read_whatever_its_ending(name: str, write: Write) -> None:
    assert catalog.read_document(write(name, TEXT.encode())).text == TEXT


def test_markdown_takes_its_title_from_the_first_heading(write: Write) -> None:
    document = catalog.read_document(write("a.md", b"intro\n\n## Part\n\n# The Whale #\ntext\n"))
    assert document.title == "The Whale"
    assert document.text.startswith("intro")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n\t\n", "only white space"),
        ("nul.txt", b"some text\x00and more", "binary byte 0x00 at offset 9"),
        ("noise", bytes(range(1, 9)) * 99, "binary byte 0x01 at offset 0"),
        ("letter.docx", b"PK\x03\x04rest", "zip archive or office document"),
        ("model.gguf", b"GGUF\x03rest", "GGUF model"),
        ("picture.txt", b"\x89PNG\r\n\x1a\n", "PNG image"),
        ("cut16.txt", codecs.BOM_UTF16_LE + b"a\x00b", "not valid UTF-16: byte 0x62 at offset 4"),
        ("nul16.txt", codecs.BOM_UTF16_LE + "a\0b".encode("utf-16-le"), "NUL"),
        ("blank.html", b"<html><script>var a = 1</script><p> </p></html>", "only white space"),
        ("binary.html", b"<p>\x00\x01</p>", "binary byte 0x00"),
    ],
)
def test_what_holds_no_text_is_refused_in_one_line(name: str, data: bytes, message: str, write: Write) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        catalog.read_document(write(name, data))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_undecodable_byte_is_named_with_its_place_and_the_advice_works(write: Write, tmp_path: Path) -> None:
    path = write("old.txt", "line one\nthe café\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"byte 0xE9 at offset 16 \(line 2\)") as caught:
        catalog.read_document(path)
    advice = str(caught.value).partition("convert it with: ")[2]
    subprocess.run(advice, shell=True, check=True, cwd=tmp_path)
    assert catalog.read_document(tmp_path / "converted.txt").text == "line one\nthe café\n"


def test_html_keeps_paragraphs_and_drops_what_is_not_text(write: Write) -> None:
    page = """<!doctype html><html><head><title> The
      Whale </title><style>p {color: red}</style></head><body><script>alert("no")</script>
      <h1>Loomings</h1><p>Call me <b>Ishmael</b>. Some years
      ago&mdash;never mind.</p><!-- hidden --><ul><li>one<li>two</ul>line<br>break
      <table><tr><td>a</td><td>b</td></tr><tr><td>c</td></tr></table>
      <pre>  kept
    as is</pre><noscript>no</noscript></body></html>"""
    document = catalog.read_document(write("page.html", page.encode()))
    assert document.title == "The Whale"
    paragraphs = document.text.split("\n\n")
    assert paragraphs[:2] == ["Loomings", "Call me Ishmael. Some years ago—never mind."]
    assert "one\ntwo" in document.text
    assert "line\nbreak" in document.text
    assert "a\tb\nc" in document.text
    assert "\n\n  kept\n    as is" in document.text
    assert not any(word in document.text for word in ("alert", "hidden", "color", "no\n"))
    assert "\n\n\n" not in document.text


def test_html_in_a_declared_encoding_is_read(write: Write) -> None:
    page = '<html><head><meta charset="windows-1252"></head><body><p>café</p></body></html>'
    assert catalog.read_document(write("old.htm", page.encode("windows-1252"))).text == "café"


def test_html_of_unclosed_paragraphs_of_any_depth_is_read(write: Write) -> None:
    text = catalog.read_document(write("deep.html", b"<p>word" * 3000)).text
    assert text.split("\n\n") == ["word"] * 3000


def test_a_pdf_is_read_page_by_page(write: Write) -> None:
    document = catalog.read_document(write("paper.pdf", pdf_bytes(["Call me Ishmael.", "Second page."], "The  Whale")))
    assert document.title == "The Whale"
    assert document.text == "Call me Ishmael.\n\nSecond page."


def test_a_pdf_is_known_by_its_content_too(write: Write) -> None:
    assert catalog.read_document(write("download", pdf_bytes(["Call me Ishmael."]))).text == "Call me Ishmael."


def test_a_pdf_that_is_only_restricted_opens_without_a_password(write: Write) -> None:
    import io

    import pypdf

    writer = pypdf.PdfWriter(clone_from=io.BytesIO(pdf_bytes(["Call me Ishmael."])))
    writer.encrypt("", owner_password="owner", algorithm="RC4-128")
    out = io.BytesIO()
    writer.write(out)
    assert catalog.read_document(write("paper.pdf", out.getvalue())).text == "Call me Ishmael."


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pdf_bytes(["secret"], password="word"), "encrypted PDF; save a copy without the password"),
        (lambda: pdf_bytes(["", ""]), "2 pages and no extractable text; it may be a scan"),
        (lambda: pdf_bytes(["some text"])[:300], "not a readable PDF"),
        (lambda: b"%PDF-1.7\n" + os.urandom(3000), "not a readable PDF"),
        (lambda: b"no pdf at all", "not a readable PDF"),
    ],
    ids=["encrypted", "scan", "cut", "noise", "text"],
)
def test_an_unreadable_pdf_says_why(make, message: str, write: Write, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        catalog.read_document(write("paper.pdf", make()))
    assert "paper.pdf" in str(caught.value)
    assert capfd.readouterr().err == "", "the library's own warnings stay out of it"


@pytest.mark.parametrize(("module", "name"), [("pypdf", "a.pdf"), ("bs4", "a.html")])
def test_without_the_extra_the_install_command_is_given(module: str, name: str, write: Write) -> None:
    path = write(name, b"<p>text</p>")
    program = f"import sys; sys.modules[{module!r}] = None; import catalog; catalog.read_document({str(path)!r})"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert "ImportError" in done.stderr
    assert "pip install 'longscope[read]'" in done.stderr


def test_missing_files_directories_and_devices_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file 'absent\.txt'.*its documents: moby-dick, sotu"):
        catalog.read_document("absent.txt")
    with pytest.raises(IsADirectoryError, match="is a directory"):
        catalog.read_document(tmp_path)
    with pytest.raises(OSError, match="not a regular file"):
        catalog.read_document(os.devnull)
    with pytest.raises(ValueError, match="no document was named"):
        catalog.read_document("")
