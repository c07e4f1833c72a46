"""Books: Project Gutenberg's frame, EPUB, and encodings."""

import zipfile

import pytest

from llama_jax.data.prepare import books
from llama_jax.data.prepare.books import remove_gutenberg_frame
from llama_jax.errors import InputError

HEADER = """\
The Project Gutenberg eBook of Emma

This ebook is for the use of anyone anywhere in the United States.

*** START OF THE PROJECT GUTENBERG EBOOK EMMA ***
"""
FOOTER = """\
*** END OF THE PROJECT GUTENBERG EBOOK EMMA ***

Updated editions will replace the previous one.
"""
BOOK = "EMMA\n\nEmma Woodhouse, handsome, clever, and rich …\n"


@pytest.mark.parametrize(
    "framed",
    [
        HEADER + BOOK + FOOTER,
        "\ufeff" + HEADER + "\n\nProduced by A Volunteer\nand others\n\n" + BOOK + FOOTER,
        HEADER.replace("EMMA ***", "A LONG TITLE\nOF TWO LINES ***") + BOOK + FOOTER,
        HEADER.replace("*** START OF THE", "***START OF THIS") + BOOK
        + "End of the Project Gutenberg EBook of Emma, by Jane Austen\n\n" + FOOTER,
        "Title: Emma\n\n*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*\n" + BOOK
        + "End of Project Gutenberg's Etext of Emma\n",
        HEADER + BOOK,
        BOOK + FOOTER,
        BOOK,
    ],
)  # fmt: skip
def test_the_frame_of_project_gutenberg_is_removed(framed):
    assert remove_gutenberg_frame(framed).strip() == BOOK.strip()


def test_a_book_that_mentions_the_project_is_unchanged():
    text = "I read the Project Gutenberg edition. *** It was the end of the story.\n"
    assert remove_gutenberg_frame(text) == text


def test_an_epub_is_read_in_the_order_of_its_spine(tmp_path):
    container = """<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>
      <rootfile full-path="OEBPS/book.opf"/></rootfiles></container>"""
    package = """<package xmlns:dc="http://purl.org/dc/elements/1.1/"><metadata>
      <dc:title>Two Chapters</dc:title></metadata><manifest>
      <item id="b" href="text/two.xhtml"/><item id="a" href="one%20.xhtml"/>
      <item id="c" href="cover.png"/></manifest>
      <spine><itemref idref="a"/><itemref idref="b"/></spine></package>"""
    page = "<html><head><title>t</title></head><body><h1>{}</h1><p>{}</p></body></html>"
    with zipfile.ZipFile(tmp_path / "a.epub", "w") as archive:
        archive.writestr("META-INF/container.xml", container)
        archive.writestr("OEBPS/book.opf", package)
        archive.writestr("OEBPS/one .xhtml", page.format("One", "It began &amp; went on."))
        archive.writestr("OEBPS/text/two.xhtml", page.format("Two", "It ended."))
    [book] = books.read(tmp_path / "a.epub")
    assert book.metadata == {"title": "Two Chapters"}
    assert [line for line in book.text.split("\n") if line] == [
        "One", "It began & went on.", "Two", "It ended."
    ]  # fmt: skip


def test_other_files_are_read_as_what_they_are(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffOne\r\ntwo ñ\r\n".encode())
    (tmp_path / "b.txt").write_bytes("Character set encoding: ISO-8859-1\nñ\n".encode("latin-1"))
    (tmp_path / "c.jsonl").write_text('{"text": "Three", "title": "T"}\n')
    texts = [d.text for name in ("a.txt", "b.txt", "c.jsonl") for d in books.read(tmp_path / name)]
    assert texts == ["One\ntwo ñ\n", "Character set encoding: ISO-8859-1\nñ\n", "Three"]
    (tmp_path / "d.html").write_text("<html><body><p>Four &amp; five.</p></body></html>")
    assert [d.text.strip() for d in books.read(tmp_path / "d.html")] == ["Four & five."]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xf1\n", r"is not UTF-8 text \(byte 0\)"),
        ("a.epub", b"no zip", "is damaged or truncated"),
        ("a.jsonl", b'{"title": "x"}\n', 'a line needs a string "text"'),
        ("a.pdf", b"%PDF", "is of no kind that this source reads"),
    ],
)
def test_a_bad_book_is_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}.*{message}"):
        [*books.read(tmp_path / name)]
