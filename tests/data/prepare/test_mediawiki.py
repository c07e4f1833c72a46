"""MediaWiki: pages of dumps, and the text of wikitext."""

import bz2
import gzip

import pytest

from llama_jax.data.prepare import mediawiki
from llama_jax.data.prepare.mediawiki import Dump, Page, wikitext_to_text
from llama_jax.errors import InputError

DUMP = """\
<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="de">
  <siteinfo>
    <sitename>Wikipedia</sitename>
    <namespaces>
      <namespace key="0" case="first-letter" />
      <namespace key="6" case="first-letter">Datei</namespace>
      <namespace key="14" case="first-letter">Kategorie</namespace>
    </namespaces>
  </siteinfo>
  <page>
    <title>Jura &amp; Recht</title><ns>0</ns><id>1</id>
    <revision><id>2</id>
      <text bytes="9" xml:space="preserve">'''Jura''' &lt;!-- x --&gt;</text>
    </revision>
  </page>
  <page>
    <title>Recht</title><ns>0</ns><id>3</id><redirect title="Jura &amp; Recht" />
    <revision><text>#WEITERLEITUNG [[Jura]]</text></revision>
  </page>
  <page><title>Diskussion:Jura</title><ns>1</ns><revision><text /></revision></page>
</mediawiki>
"""
PAGES = [
    Page("Jura & Recht", "0", False, "'''Jura''' <!-- x -->"),
    Page("Recht", "0", True, "#WEITERLEITUNG [[Jura]]"),
    Page("Diskussion:Jura", "1", False, ""),
]


@pytest.mark.parametrize(
    ("name", "compress"),
    [
        ("a.xml", bytes),
        ("a.xml.gz", gzip.compress),
        # A multistream dump: several streams, one after the other.
        ("a.xml.bz2", lambda data: bz2.compress(data[:700]) + bz2.compress(data[700:])),
    ],
)
@pytest.mark.parametrize("block", [1 << 20, 7])
def test_the_pages_of_a_dump_are_read_block_by_block(name, compress, block, tmp_path, monkeypatch):
    monkeypatch.setattr(mediawiki, "_BLOCK", block)
    (tmp_path / name).write_bytes(compress(DUMP.encode()))
    dump = Dump(tmp_path / name)
    assert [*dump.pages()] == PAGES
    assert dump.language == "de"
    assert {"datei", "kategorie", "file"} <= dump.excluded_prefixes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (DUMP[:-300], "not complete XML"),
        ("<html></html>", "is XML of <html>, no dump of MediaWiki"),
        ('<!DOCTYPE m [<!ENTITY a "ha"><!ENTITY b "&a;&a;">]><mediawiki>&b;</mediawiki>',
         "declares the XML entity a"),
        ('<!DOCTYPE m [<!ENTITY a SYSTEM "/etc/passwd">]><mediawiki>&a;</mediawiki>',
         "declares the XML entity a"),
        ("", "not complete XML"),
    ],
)  # fmt: skip
def test_a_bad_dump_is_named(text, message, tmp_path):
    (tmp_path / "a.xml").write_text(text)
    with pytest.raises(InputError, match=rf"a\.xml.*{message}"):
        [*Dump(tmp_path / "a.xml").pages()]


def test_a_page_without_end_stops_the_reader(tmp_path, monkeypatch):
    monkeypatch.setattr(mediawiki, "LONGEST_PAGE", 10)
    (tmp_path / "a.xml").write_text(DUMP)
    with pytest.raises(InputError, match="a page above 10 characters"):
        [*Dump(tmp_path / "a.xml").pages()]


@pytest.mark.parametrize(
    ("wikitext", "text"),
    [
        ("A '''bold''' and ''italic'' word.", "A bold and italic word."),
        ("See [[Paris]] and [[Paris|the city]].", "See Paris and the city."),
        ("[http://a.org A title], [http://b.org], http://c.org.", "A title, , ."),
        ("Text.<!-- note --> More.<ref name=x>Book, 1999.</ref><ref name=x />", "Text. More."),
        ("Said '''x'' \"y\".<ref>''Not '''closed</ref> End", 'Said x "y". End'),
        ("{{Infobox|a=1}}It{{cite|x}} is.", "It is."),
        ("{{a|{{b|[[c]]}}}}Text", "Text"),
        ("Before\n{| class=x\n|-\n! Head\n| Cell\n|}\nAfter", "Before\n\nAfter"),
        ("{| \n| never closed\nText", "Text"),
        ("[[File:A.jpg|thumb|A [[link]] inside]]Text[[Category:B]]", "Text"),
        ("[[Datei:A.jpg|mini|Ein Bild]]Text[[Kategorie:B]]", "Text"),
        ("[[:Category:Law]]", "Category:Law"),
        ("Text\n[[fr:Texte]]\n[[zh-min-nan:X]]", "Text"),
        ("[[Star Wars: Episode IV]]", "Star Wars: Episode IV"),
        ("* One\n* [[Two]]\n## Three\n; Term : Definition", "One\nTwo\nThree\nTerm  Definition"),
        ("One.\n\n\n\nTwo.", "One.\n\nTwo."),
        ("One<br/>two &amp; &nbsp;&lt;three&gt; &#8212;", "One\ntwo & <three> —"),
        ("<nowiki>[[raw]]</nowiki> <math>x^2</math> <code>f(x)</code>", "[[raw]] f(x)"),
        ("__NOTOC__Text __INHALTSVERZEICHNIS__", "Text"),
        ("Paris ({{lang|fr}}, {{IPA|x}}) is.", "Paris is."),
        ("-{Београд}- и -{sr-ec:А}-", "Београд и sr-ec:А"),
        ("", ""),
    ],
)
def test_wikitext_becomes_the_text_that_a_reader_sees(wikitext, text):
    prefixes = Dump.excluded_prefixes | {"datei", "kategorie"}
    got = wikitext_to_text(wikitext, prefixes)
    assert got.replace("  ", " ") == text.replace("  ", " ")


@pytest.mark.parametrize("opening", ["{{{a|", "{{a|", "<ref>", '<div class="x">', "<!-- "])
def test_a_page_of_openings_without_end_is_no_text_at_once(opening):
    assert wikitext_to_text(f"Text {opening * 20_000}") in ("", "Text")


def test_a_long_list_of_references_and_lines_is_text():
    page = "A{{b|c}}<ref>d</ref><ref name=e /><br>\n" * 1000
    assert wikitext_to_text(page).split() == ["A"] * 1000


def test_headings_without_text_are_left_out():
    wikitext = """\
Beginning.
== History ==
=== Early ===
Long ago.
== References ==
<references />
=== Notes ===
{{reflist}}
== Use ==
Today."""
    assert wikitext_to_text(wikitext) == (
        "Beginning.\n\nHistory\n\nEarly\n\nLong ago.\n\nUse\n\nToday."
    )
