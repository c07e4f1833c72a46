"""Encyclopedias: dumps and other texts, the languages of paths, and the rules on them."""

import bz2
import json

import pytest

from llama_jax.config.prepare import WIKIPEDIA_LANGUAGES, WikipediaEntry
from llama_jax.data.prepare import wikipedia
from llama_jax.data.prepare.document import Document
from llama_jax.data.prepare.rules import Funnel, apply_rules

ENTRY = WikipediaEntry(kind="wikipedia", inputs=("x",))
GERMAN = (
    "Der Rechner wird über das Netz gestartet und lädt das System von einem anderen Rechner.",
    "Danach richtet der Verwalter die Benutzer ein und prüft, ob alle Dienste laufen.",
    "Am Ende werden die Einstellungen gesichert, damit sie nicht verloren gehen.",
)
ENGLISH = (
    "The computer starts over the network and loads its system from another computer.",
    "Then the administrator creates the users and checks that all services are running.",
)


def prepare(path, entry=ENTRY):
    """Returns the documents that remain, and the number that each rule removed."""
    funnel = Funnel()
    documents = [*apply_rules(wikipedia.rules(entry), wikipedia.read(path), funnel)]
    return documents, {
        name: count.removed_documents
        for name, count in funnel.counts.items()
        if count.removed_documents
    }


def write_dump(path, language, pages):
    """Writes a dump of pages (title, namespace, other elements, wikitext)."""
    page = "<page><title>{}</title><ns>{}</ns>{}<revision><text>{}</text></revision></page>"
    content = "".join(page.format(*fields) for fields in pages)
    xml = f'<mediawiki xml:lang="{language}"><siteinfo/>{content}</mediawiki>'
    path.write_bytes(bz2.compress(xml.encode()))


def test_the_articles_of_a_dump_become_text(tmp_path):
    text = "\n\n".join(GERMAN)
    write_dump(tmp_path / "dewiki.xml.bz2", "de", [
        ("Rechner", 0, "", f"{{{{Infobox}}}}'''{text}'''"),
        ("Computer", 0, '<redirect title="Rechner"/>', "#REDIRECT [[Rechner]]"),
        ("Vorlage:X", 10, "", text),
        ("Liste", 0, "", "{{Liste}}"),
    ])  # fmt: skip
    documents, removed = prepare(tmp_path / "dewiki.xml.bz2")
    metadata = {"language": "de", "title": "Rechner"}
    assert documents == [Document("de:Rechner", text, metadata)]
    assert removed == {"articles": 2, "formatting": 1}


@pytest.mark.parametrize(
    ("language", "remains"), [("de", True), ("ja", False), ("nb", False), ("", False)]
)
def test_only_dumps_of_the_languages_remain(language, remains, tmp_path):
    write_dump(tmp_path / "a.xml.bz2", language, [("A", 0, "", "\n\n".join(GERMAN))])
    documents, removed = prepare(tmp_path / "a.xml.bz2")
    assert bool(documents) is remains
    assert removed == ({} if remains else {"language of the source": 1})


def test_the_papers_twenty_languages_are_the_default():
    assert len({*WIKIPEDIA_LANGUAGES}) == 20
    assert ENTRY.languages == WIKIPEDIA_LANGUAGES


@pytest.mark.parametrize(
    ("n_german", "n_english", "remains"), [(3, 0, True), (3, 2, True), (1, 2, False), (0, 2, False)]
)
def test_a_page_that_is_mostly_untranslated_is_removed(n_german, n_english, remains, tmp_path):
    folder = tmp_path / "handbook" / "de-DE"
    folder.mkdir(parents=True)
    text = "\n\n".join([*GERMAN[:n_german], *ENGLISH[:n_english]])
    (folder / "intro.txt").write_text(text)
    documents, removed = prepare(folder / "intro.txt")
    assert [d.text for d in documents] == ([text] if remains else [])
    assert removed == ({} if remains else {"language of the paragraphs": 1})


def test_html_and_json_lines_with_a_language_are_read(tmp_path):
    page = "<html><body><main>{}</main></body></html>"
    (tmp_path / "start.de.html").write_text(page.format("".join(f"<p>{p}</p>" for p in GERMAN)))
    [document], _ = prepare(tmp_path / "start.de.html")
    assert [line for line in document.text.split("\n") if line] == [*GERMAN]
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"text": ENGLISH[0], "language": "en", "id": "a"}) + "\n"
        + json.dumps({"text": ENGLISH[1]}) + "\n"
    )  # fmt: skip
    documents, removed = prepare(tmp_path / "a.jsonl")
    assert documents == [Document("a", ENGLISH[0], {"language": "en"})]
    assert removed == {"language of the source": 1}


@pytest.mark.parametrize(
    ("path", "language"),
    [
        ("help/de/index.html", "de"),
        ("handbook/ro-RO/sect.x.html", "ro"),
        ("help/pt_BR/gnome/a.page", "pt"),
        ("sr@latin/a.html", "sr"),
        ("en/preface.sv.html", "sv"),
        ("man/C/a.txt", "en"),
        ("help/ja/index.html", ""),
        ("de.html", ""),
        ("design/item/a.html", ""),
    ],
)
def test_the_language_is_the_last_one_that_a_path_names(path, language):
    assert wikipedia.language_of_path(path) == language
