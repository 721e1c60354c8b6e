"""Names to local files: model weights and sample data, fetched once, verified, kept in a cache folder.

``path(name)`` is what most callers need; ``read_document(name)`` reads a text. Nothing is fetched on import.
"""

from catalog.documents import Document, documents, read_document
from catalog.store import fetch, home, local, path, verify
from catalog.table import Row, row, rows

__all__ = [
    "Document",
    "Row",
    "documents",
    "fetch",
    "home",
    "local",
    "path",
    "read_document",
    "row",
    "rows",
    "verify",
]
