"""Converts pages of packages for docs/miniature_table1.py: HTML, Mallard, man and POD."""

import gzip
import html
import re
from html.parser import HTMLParser
from xml.sax.saxutils import escape

MARKS = {"b": "'''", "strong": "'''", "em": "''"}
SKIPPED = {"head", "script", "style", "nav", "footer", "aside", "info", "pre", "table"}


class Wikitext(HTMLParser):
    """Converts a page of HTML or Mallard to wikitext: headings, items of lists, paragraphs."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.skipped = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.skipped += tag in SKIPPED
        if self.skipped:
            return
        if re.fullmatch("h[1-6]|title", tag):
            self.parts.append("\n\n== ")
        elif tag in ("li", "item"):
            self.parts.append("\n* ")
        elif tag in ("p", "div", "section") and self.parts[-1:] != ["\n* "]:
            self.parts.append("\n\n")
        else:
            self.parts.append(MARKS.get(tag, ""))

    def handle_endtag(self, tag: str) -> None:
        if not self.skipped:
            is_heading = re.fullmatch("h[1-6]|title", tag)
            self.parts.append(" ==\n" if is_heading else MARKS.get(tag, ""))
        self.skipped = max(0, self.skipped - (tag in SKIPPED))

    def handle_data(self, data: str) -> None:
        text = re.sub(r"\s+", " ", data).replace("[", "(").replace("{", "(")
        if not self.skipped and (text.strip() or self.parts[-1:] != ["\n* "]):
            self.parts.append(text)


def html_to_wikitext(data: bytes) -> str:
    """Returns a page as wikitext."""
    parser = Wikitext()
    parser.feed(re.sub(r"<(?:title|p|info)\b[^<>]*/>", "", data.decode(errors="replace")))
    text = re.sub(r"\n== *==\n", "\n", "".join(parser.parts))
    return re.sub(r"\n[ \n]*\n", "\n\n", text).strip()


def man_to_wikitext(data: bytes) -> str:
    """Returns a page of `man` as wikitext, without its macros."""
    text = gzip.decompress(data).decode(errors="replace")
    for pattern, replacement in (
        (r"\\f\(?\w|\\[,/&|]|\\s[+-]?\d", ""),
        (r"(?ms)^\.(?:nf|EX|TS)\b.*?^\.(?:fi|EE|TE)\b", ""),
        (r'(?m)^\.S[HS] +"?(.*?)"?$', r"\n\n== \1 ==\n"),
        (r"(?m)^\.(?:PP|P|TP|IP|LP)\b.*$", "\n"),
        (r"(?m)^\.[BIR]{1,2} +", ""),
        (r"(?m)^['.].*$\n?", ""),
        (r"\\-", "-"),
        (r"\\\(aq", "'"),
        (r"\\\(\w\w|\\[e ~]", " "),
        (r"[\[{]", "("),
    ):
        text = re.sub(pattern, replacement, text)
    return text.strip()


def pod_text(text: str) -> str:
    text = re.sub(r"E<(\w+)>", r"&\1;", text)
    return html.unescape(re.sub(r"[A-DF-Z]<<? ?(?:[^<>|]*\|)?([^<>]*?) ?>?>", r"\1", text))


def pod_to_html(pod: str) -> str:
    """Returns paragraphs and code of POD as HTML."""
    blocks = (block for block in re.split(r"\n{2,}", pod) if block.strip() and block[0] != "=")
    return "\n\n".join(
        f"<pre><code>{escape(block)}</code></pre>"
        if block.startswith((" ", "\t"))
        else f"<p>{escape(pod_text(block))}</p>"
        for block in blocks
    )
