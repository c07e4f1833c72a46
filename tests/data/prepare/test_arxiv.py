import gzip
import io
import itertools
import random
import tarfile

import pytest

from llama_jax.config.prepare import ArxivEntry
from llama_jax.data.prepare import arxiv
from llama_jax.data.prepare.document import Document
from llama_jax.data.prepare.latex_macros import expand_macros
from llama_jax.data.prepare.rules import Funnel, apply_rules
from llama_jax.errors import InputError

PAPER = r"""\documentclass{article} % a comment
\newcommand{\R}{\mathbb{R}}
% a line of comment
\begin{document}
An abstract.
\section{One}
Half, 50\%, of $x\in\R$. % why
\begin{thebibliography}{9}
\bibitem{a} A. Author.
\end{thebibliography}
\appendix
The end.
\end{document}
left over
"""


SETTINGS = ArxivEntry(kind="arxiv", inputs=("x",))
VERBATIM = "\\begin{verbatim}\n% \\a\n\\end{verbatim}\n"


def pack(files: dict[str, str | bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def test_a_paper_begins_at_its_first_section_without_comments_macros_and_bibliography():
    funnel = Funnel()
    (paper,) = apply_rules(arxiv.rules(SETTINGS), [Document("1", PAPER, {})], funnel)
    expected = "\\section{One}\nHalf, 50\\%, of $x\\in\\mathbb{R}$.\n\n\\appendix\nThe end.\n"
    assert paper.text == expected
    assert [count.changed_documents for count in funnel.counts.values()] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("latex", "plain"),
    [
        ("a % b\nc", "a\nc"),
        ("% b\nc\n", "c\n"),
        (r"5\% a \\% b", r"5\% a \\" + "\n"),
        (r"\verb|%| is \verb*+%+ % x", r"\verb|%| is \verb*+%+" + "\n"),
        (VERBATIM + "% b\n", VERBATIM),
        ("<<x>>=\n5 %in% 1:9\n@\nb % c\n", "<<x>>=\n5 %in% 1:9\n@\nb\n"),
        ("a\n\\begin{comment}\nb\n\\end{comment}\nc", "a\n\nc"),
        ("a\\begin{comment}b", "a"),
    ],
)  # fmt: skip
def test_comments_are_removed_and_other_per_cent_signs_remain(latex, plain):
    assert arxiv.remove_comments(latex) == plain


@pytest.mark.parametrize(
    ("latex", "plain"),
    [
        (r"\newcommand{\R}{\mathbb{R}}$\R^n$ and \R s", r"$\mathbb{R}^n$ and \mathbb{R} s"),
        ("\\def\\be{\\begin{equation}}\n\\be", r"\begin{equation}"),
        (r"\newcommand*\norm[1]{\|#1\|}\norm{\norm x}", r"\|\|x\|\|"),
        (r"\newcommand{\p}[2][x]{(#1,#2)}\p{y}\p[z]{y}", "(x,y)(z,y)"),
        (r"\def\f#1#2{#2#1}\f{a}b\f\alpha c", r"bac\alpha"),
        (r"\def\c#1{\cos#1}\c x", r"\cos x"),
        (r"\def\x{abc}\in\x", r"\in abc"),
        (r"\def\a{x}\def\b{\a\a}\def\a{y}\b", "yy"),
        (r"\DeclareMathOperator{\rank}{rank}\rank A", r"\operatorname{rank} A"),
        # What can't be expanded stays: recursion, delimiters, a missing argument, an open brace.
        (r"\def\a{x\a}\a", r"x\a"),
        (r"\def\a#1.{#1}\a b.", r"\def\a#1.{#1}\a b."),
        (r"\newcommand{\f}[1]{#1}{\f}", r"{\f}"),
        (r"\newcommand{\f}{a", r"\newcommand{\f}{a"),
        (r"\renewcommand{\item}[1]{#1}\item{A}", r"\renewcommand{\item}[1]{#1}\item{A}"),
        ("\\def\\a{x}\n" + VERBATIM, VERBATIM),
    ],
)  # fmt: skip
def test_macros_of_the_author_are_expanded(latex, plain):
    assert expand_macros(latex) == plain


def test_macros_that_would_grow_without_bounds_stay():
    names = [f"\\m{chr(97 + i)}" for i in range(26)]
    pairs = itertools.pairwise(names)
    bomb = "".join(f"\\def{a}{{{b}{b}}}" for a, b in pairs) + r"\def\mz{boom}\ma"
    assert expand_macros(bomb) == bomb
    nested = r"\def\a#1{(#1)}" + r"\a{" * 1000 + "}" * 1000
    assert expand_macros(nested).count("(") in range(5, 50)  # levels, then as it was


def test_a_paper_without_a_section_is_removed():
    assert [*apply_rules(arxiv.rules(SETTINGS), [Document("1", "A letter.", {})], Funnel())] == []


def test_a_bulk_file_has_submissions_of_one_file_and_of_many(tmp_path):
    many = pack(
        {
            "main.tex": "\\documentclass{a}\n\\input{parts/one}\n\\include{two.tex}\n\\input{no}",
            "parts/one.tex": "ONE \\input{main}",
            "two.tex": "TWO",
            "figure.eps": "%!PS",
            "latin.tex": "\\documentclass{b} é".encode("latin-1"),
        }
    )
    files = {
        "2301/2301.00001.gz": gzip.compress(b"\\section{S}\r\ntext"),
        "2301/2301.00002.gz": gzip.compress(many),
        "2301/2301.00003.pdf": b"%PDF-1.5",
        "2301/2301.00004.gz": gzip.compress(b"%PDF-1.5"),
    }
    (tmp_path / "bulk.tar").write_bytes(pack(files))
    found = {document.id: document.text for document in arxiv.read(tmp_path / "bulk.tar")}
    main = "\\documentclass{a}\nONE \\input{main}\nTWO\n\\input{no}"
    assert found == {
        "2301/2301.00001": "\\section{S}\ntext",
        "2301/2301.00002/latin.tex": "\\documentclass{b} é",
        "2301/2301.00002/main.tex": main,
    }
    (tmp_path / "one.tar.gz").write_bytes(gzip.compress(many))
    assert [d.text for d in arxiv.read(tmp_path / "one.tar.gz")] == ["\\documentclass{b} é", main]
    (tmp_path / "vignette.Rnw").write_text("\\section{R}")
    assert [*arxiv.read(tmp_path / "vignette.Rnw")] == [
        Document("vignette.Rnw", "\\section{R}", {})
    ]


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"x" * 1000)[:-9])
    with pytest.raises(InputError, match=r"a\.gz is damaged or truncated .*: fetch it again"):
        next(arxiv.read(tmp_path / "a.gz"))
    (tmp_path / "b.tar").write_bytes(b"x" * 1024)
    with pytest.raises(InputError, match=r"b\.tar is damaged or truncated"):
        next(arxiv.read(tmp_path / "b.tar"))


def test_a_submission_above_the_limit_yields_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(arxiv, "_MAX_SUBMISSION", 2000)
    noise = random.Random(0).randbytes(3000).hex().encode()
    contents = {
        "long.gz": gzip.compress(noise),  # packed, and so also unpacked
        "unpacked.gz": gzip.compress(b"x" * 2001),
        "text.tex": b"x" * 2001,
        "fits.gz": gzip.compress(b"x" * 2000),
    }
    (tmp_path / "bulk.tar").write_bytes(pack(contents))
    assert [document.id for document in arxiv.read(tmp_path / "bulk.tar")] == ["fits"]
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert len([*arxiv.read(tmp_path / name)]) == (name == "fits.gz"), name
