import random
from xml.sax.saxutils import quoteattr

import pytest

from llama_jax.config.prepare import StackExchangeEntry
from llama_jax.data.prepare import stackexchange
from llama_jax.data.prepare.rules import Funnel, apply_rules
from llama_jax.errors import InputError

POSTS = [
    {"Id": 1, "PostTypeId": 1, "Score": 5, "Title": "Is 1 < 2?", "Body": "<p>Is <b>it</b>?</p>"},
    {"Id": 2, "PostTypeId": 2, "ParentId": 1, "Score": -1, "Body": "<p>No.</p>"},
    {"Id": 3, "PostTypeId": 1, "Score": 0, "Title": "Code", "Body": "<pre>a &lt; b\n  c</pre>"},
    {"Id": 4, "PostTypeId": 2, "ParentId": 1, "Score": 7, "Body": "<p>Yes &amp; always.</p>"},
    {"Id": 5, "PostTypeId": 5, "Score": 0, "Body": "<p>About a tag.</p>"},
    {"Id": 6, "PostTypeId": 2, "ParentId": 99, "Score": 3, "Body": "<p>To a deleted question.</p>"},
    {"Id": 7, "PostTypeId": 2, "ParentId": 1, "Score": 7, "Body": "<p>Later, same score.</p>"},
]  # fmt: skip


def settings(*sites):
    return StackExchangeEntry(kind="stackexchange", inputs=("x",), sites=sites)


def write_posts(path, posts):
    path.parent.mkdir(exist_ok=True)
    rows = (" ".join(f"{k}={quoteattr(str(v))}" for k, v in post.items()) for post in posts)
    body = "".join(f"  <row {row} />\n" for row in rows)
    path.write_text(f'<?xml version="1.0" encoding="utf-8"?>\n<posts>\n{body}</posts>\n')
    return path


def test_questions_have_their_answers_from_the_highest_score_to_the_lowest(tmp_path):
    path = write_posts(tmp_path / "math.stackexchange.com" / "Posts.xml", POSTS)
    documents = [*apply_rules(stackexchange.rules(settings()), stackexchange.read(path), Funnel())]
    assert [document.text for document in documents] == [
        "Is 1 < 2?\n\nIs it?\n\nYes & always.\n\nLater, same score.\n\nNo.",
        "Code\n\na < b\n  c",
    ]
    site = "math.stackexchange.com"
    assert [document.id for document in documents] == [f"{site}/1", f"{site}/3"]
    assert documents[0].metadata == {"site": site, "score": "5", "answers": "3"}


def test_only_the_selected_sites_remain(tmp_path):
    path = write_posts(tmp_path / "english.xml", POSTS)
    for sites, count in (["english"], 2), (["math"], 0), ([], 2):
        rules = stackexchange.rules(settings(*sites))
        assert len([*apply_rules(rules, stackexchange.read(path), Funnel())]) == count


def test_partitions_give_the_same_documents_whatever_the_distance(tmp_path, monkeypatch):
    draw = random.Random(0)
    questions = [{"Id": i, "PostTypeId": 1, "Title": f"q{i}", "Body": ""} for i in range(1, 51)]
    answers = [
        {"Id": 51 + i, "PostTypeId": 2, "ParentId": draw.randint(1, 50), "Score": i % 7}
        | {"Body": f"a{i}"}
        for i in range(200)
    ]
    path = write_posts(tmp_path / "s.xml", [*questions, *answers])
    all_at_once = [*stackexchange.read(path)]
    monkeypatch.setattr(stackexchange, "_PARTITION_BYTES", 1000)
    in_partitions = [*stackexchange.read(path)]
    assert len(all_at_once) == 50
    assert [d.id for d in in_partitions] != [d.id for d in all_at_once]
    assert sorted(in_partitions) == sorted(all_at_once)
    for document in all_at_once:
        number = int(document.id.split("/")[1])
        own = [a for a in answers if a["ParentId"] == number]
        own.sort(key=lambda a: -a["Score"])  # the sort is stable: then by id
        parts = [f"q{number}", *(a["Body"] for a in own)]
        assert document.text == "".join(f"<div>{part}</div>\n" for part in parts)


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("<p>a\nb   c</p>\n\n<p>d</p>", "a b c\n\nd"),
        ("<ul>\n<li>one</li>\n<li>two<br/>three</li>\n</ul>", "- one\n- two\nthree"),
        ('<a href="x" rel="nofollow">link</a><!-- language: c -->, <img src="y" alt="z">', "link,"),
        ("<pre><code>if a &lt;b&gt;:\n\n\n\n    x\n</code></pre>", "if a <b>:\n\n    x"),
        ("1 < 2 and <unclosed", "1 < 2 and <unclosed"),
        ("&lt;b&gt; is no tag &amp;amp;", "<b> is no tag &amp;"),
    ],
)
def test_tags_are_removed_and_code_keeps_its_lines(page, text):
    assert stackexchange.remove_tags(page) == text


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("<posts><row Id='1' PostTypeId='1'/>", "is not a complete Posts.xml .*: unpack it again"),
        ("7z\xbc\xaf", "is not a complete Posts.xml"),
        ("<posts></posts>", "has no rows: give the Posts.xml of a Stack Exchange dump"),
    ],
)
def test_a_file_that_is_no_table_of_posts_is_refused(tmp_path, content, sentence):
    path = tmp_path / "Posts.xml"
    path.write_text(content)
    with pytest.raises(InputError, match=rf"Posts\.xml {sentence}"):
        list(stackexchange.read(path))
