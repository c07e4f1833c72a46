"""Writes small WARC and WET files, record by record as the format's specification says."""

import gzip
from collections.abc import Iterable
from pathlib import Path


def html_page(paragraphs: Iterable[str], title: str = "Title") -> bytes:
    """Returns a page with navigation and a footer around the paragraphs."""
    body = "".join(f"<p>{text}</p>\n" for text in paragraphs)
    return (
        f"<html><head><title>{title}</title><style>p {{}}</style></head><body>"
        "<nav><a href='/'>Home</a> <a href='/b'>About</a></nav>"
        f"<main><article>{body}</article></main><footer>All rights reserved.</footer></body></html>"
    ).encode()


def response(url: str, body: bytes, kind: str = "text/html", status: str = "200 OK") -> bytes:
    """Returns the record of an HTTP response."""
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return _record("response", url, head.encode() + body, "application/http; msgtype=response")


def conversion(url: str, text: str) -> bytes:
    """Returns the record of a page's text in a WET file."""
    return _record("conversion", url, text.encode(), "text/plain")


def _record(kind: str, url: str, block: bytes, content_type: str) -> bytes:
    lines = [
        "WARC/1.0",
        f"WARC-Type: {kind}",
        f"WARC-Target-URI: {url}",
        "WARC-Date: 2020-01-02T03:04:05Z",
        "WARC-Record-ID: <urn:uuid:00000000-0000-0000-0000-000000000000>",
        f"Content-Type: {content_type}",
        f"Content-Length: {len(block)}",
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + block + b"\r\n\r\n"


def write_warc(path: Path, records: Iterable[bytes]) -> Path:
    """Writes records into a file, in members of gzip if its name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pack = gzip.compress if path.suffix == ".gz" else bytes
    path.write_bytes(b"".join(pack(record) for record in records))
    return path
