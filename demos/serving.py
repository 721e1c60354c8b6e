"""Serving a page on this machine alone, and how it looks: nothing is fetched from elsewhere, nothing is sent there."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
from collections.abc import Generator, Iterator
from html import escape
from typing import Any

import gradio as gr
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

HOST = "127.0.0.1"
#: what a browser may load: this server's own files, and what the page itself holds
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; frame-ancestors 'self'"
)
UPLOAD_LIMIT = "20mb"
STYLE = """
.gradio-container > main { max-width: 1200px; margin: 0 auto; }
.drop .icon-wrap { display: none; }
.drop .wrap { min-height: 0; padding-top: 1.6rem; flex-flow: row wrap; column-gap: .4rem; font-size: .95rem; }
.html-container:has(.figures) { padding: 0; }
.figures { padding: .75rem .9rem; line-height: 1.5; font-variant-numeric: tabular-nums;
  background: var(--block-background-fill); border: 1px solid var(--border-color-primary);
  border-radius: var(--block-radius); }
.figures h3 { font-size: .9rem; font-weight: 400; margin: 0; color: var(--block-label-text-color); }
.figures .pair { margin: 0 0 .4rem; } .figures .pair strong { font-size: 1.6rem; font-weight: 650; }
.figures .bar { height: .6rem; border-radius: .3rem; background: var(--border-color-primary); overflow: hidden; }
.figures .bar span { display: block; height: 100%; min-width: 3px; background: var(--color-accent); }
.figures .dim { color: var(--body-text-color-subdued); font-size: .85rem; margin: .4rem 0 0; }
.figures .warning { margin: .6rem 0 0; padding: .4rem .7rem; border-left: 3px solid #d97706; font-size: .85rem; }
.figures dl { margin: .6rem 0 0; font-size: .9rem; } .figures dd { margin: 0; text-align: right; }
.figures dl div { display: flex; gap: .8rem; justify-content: space-between; padding: .3rem 0;
  border-top: 1px solid var(--border-color-primary); }
.heat { overflow-x: auto; } .heat table, .heat th { border: 0 !important; }
.heat table { border-collapse: separate; border-spacing: 3px; width: 100%; }
.heat caption { text-align: left; padding-bottom: .4rem; color: var(--block-label-text-color); font-size: .9rem; }
.heat th { font-weight: 400; font-size: .85rem; padding: .2rem .4rem; text-align: right; white-space: nowrap; }
.heat thead th { text-align: center; } .heat tbody th { width: 1%; }
.heat td { height: 2rem; min-width: 3rem; text-align: center; font-weight: 650;
  border-radius: .3rem; border: 1px solid var(--border-color-primary); }
.heat td.found { background: #15803d; color: #fff; border-color: #15803d; }
.heat td.missed { background: #b91c1c; color: #fff; border-color: #b91c1c; }
.heat td.asked { border-color: var(--color-accent); border-style: dashed; }
.figures dt { color: var(--body-text-color-subdued); white-space: nowrap; }
"""


class Secluded:
    """Keeps a page to itself: drops the addresses of other hosts from its head, and lets the browser reach none.

    Wraps an ASGI application.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        held: dict[str, Any] = {}

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["content-security-policy"] = POLICY
                headers["referrer-policy"] = "no-referrer"
                # The length of a page is known only once its text is: hold the head back.
                if headers.get("content-type", "").startswith("text/html"):
                    held.update(message)
                    return
            elif held and not message.get("more_body"):
                message = {**message, "body": unlinked(message["body"].decode()).encode()}
                MutableHeaders(scope=held)["content-length"] = str(len(message["body"]))
                await send(dict(held))
            await send(message)

        await self.app(scope, receive, guarded if scope["type"] == "http" else send)


def unlinked(page: str) -> str:
    """Return a page without the tags that describe it to social networks and without the address of a sample file.

    >>> unlinked('<title>Ask</title><meta property="og:url" content="https://example.org/" />')
    '<title>Ask</title>'
    """
    page = re.sub(r'<meta\s+(?:property="og:|name="twitter:)[^>]*>', "", page)
    return re.sub(r'https://github\.com/gradio-app/[^"\\]*/', "", page)


def theme() -> gr.themes.Base:
    """Return the looks that all pages share, in fonts that are on every machine."""
    return gr.themes.Default(
        primary_hue="blue",
        secondary_hue="blue",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(input_border_color_focus="*primary_500", input_border_color_focus_dark="*primary_400")


def toast(error: Exception) -> gr.Error:
    """Return what shows an error on a page; a toast renders HTML, and the message may quote what was uploaded."""
    return gr.Error(escape(str(error), quote=False), print_exception=False)


def free_port(port: int) -> int:
    """Return ``port`` if it can be had, or for 0 one that can.

    Raises:
        OSError: it is taken, or not for everybody.

    >>> free_port(0) > 0
    True
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            reason = f"port {port} of {HOST} cannot be had ({error.strerror})"
            raise OSError(f"{reason}; choose another with --port, or 0 for a free one") from error
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def served(page: gr.Blocks, port: int = 0, open_browser: bool = False) -> Iterator[str]:
    """Serve a page on 127.0.0.1 while the block runs; the block gets its address."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    page.queue(default_concurrency_limit=1, max_size=8)
    _, address, _ = page.launch(
        server_name=HOST,
        server_port=free_port(port),
        inbrowser=open_browser,
        share=False,
        prevent_thread_lock=True,
        quiet=True,
        max_file_size=UPLOAD_LIMIT,
        app_kwargs={
            "middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"]), Middleware(Secluded)]
        },
        theme=theme(),
        css=STYLE,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
    )
    try:
        yield address
    finally:
        page.close(verbose=False)


def serve(page: gr.Blocks, port: int, open_browser: bool) -> Generator[str, None, str]:
    """Serve a page until Ctrl-C; yield what is to be said, return the address."""
    with served(page, port, open_browser) as address:
        yield f"{page.title}: {address} (Ctrl-C ends it)\n"
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
    yield "\nended\n"
    return address
