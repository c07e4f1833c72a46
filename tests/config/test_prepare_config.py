import pytest

from llama_jax.config import yaml_file
from llama_jax.errors import InputError

SECTION = """\
prepare:
  docs/crawl: {kind: commoncrawl, inputs: [a/*.warc.gz, gs://b/c]}
  docs/c4:
    kind: c4
    inputs: [a]
    min_words: 4
"""
RUN = """\
model: {family: llama-7b}
data: {mixture: {data/x: 1}, batch_size: 8}
training: {out: runs/x, steps: 10}
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "data.yaml"
    path.write_text(SECTION)
    return path


def test_the_section_is_read_alone_and_a_run_does_not_see_it(path):
    entries = yaml_file.load_prepare(path, ["prepare.docs/c4.min_sentences=5"])
    assert [*entries] == ["docs/crawl", "docs/c4"]
    assert entries["docs/crawl"].inputs == ("a/*.warc.gz", "gs://b/c")
    c4 = entries["docs/c4"]
    assert (c4.kind, c4.min_words, c4.min_sentences, c4.min_language) == ("c4", 4, 5, 0.65)
    path.write_text(RUN)
    alone = yaml_file.load(path)
    path.write_text(RUN + SECTION.replace("min_words", "wrong"))
    assert yaml_file.load(path) == alone


def test_the_manual_explains_each_key_of_each_kind():
    manual = yaml_file.prepare_manual()
    for kind, keys in yaml_file.PREPARE_KEYS.items():
        assert f"\nkind: {kind}\n" in manual
        assert {"inputs"} < {key.name for key in keys} | {"kind"}
        for key in keys:
            assert f"  {key.name}  ({key.type}, " in manual


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ("{kind: c4, inputs: [x], min_word: 3}", "did you mean min_words"),
        ("{kind: c5, inputs: [x]}", "kind must be one of commoncrawl, .*not 'c5'"),
        ("{inputs: [x]}", "kind must be one of commoncrawl, .*and is missing"),
        ("7", "kind must be one of commoncrawl, .*and is missing"),
        ("{kind: c4}", "inputs is missing: add it"),
        ("{kind: c4, inputs: []}", "inputs: .* at least 1 item"),
        ("{kind: c4, inputs: ['http://x']}", "URLs of http: are not supported; give a local path"),
        ("{kind: c4, inputs: [x], min_words: 0}", "min_words must be greater than or"),
        ("{kind: commoncrawl, inputs: [x], quality_model: m}", "quality_tokenizer together"),
        (
            "{kind: commoncrawl, inputs: [x], perplexity_limits: [1, 2]}",
            "perplexity_limits need quality_model: add it, or omit the limits",
        ),
        (
            "{kind: commoncrawl, inputs: [x], quality_model: m, quality_tokenizer: t,"
            " perplexity_limits: [2, 2]}",
            r"perplexity_limits \(2.0, 2.0\): the first must be the smaller one",
        ),
    ],
)  # fmt: skip
def test_a_wrong_entry_gets_one_sentence_with_its_line(path, entry, sentence):
    path.write_text(f"prepare:\n  docs/c4: {entry}\n")
    with pytest.raises(InputError, match=rf"data\.yaml:2: prepare\.docs/c4.*{sentence}") as caught:
        yaml_file.load_prepare(path)
    assert "\n" not in str(caught.value)


def test_a_file_without_the_section_is_refused(path):
    path.write_text(RUN)
    with pytest.raises(InputError, match="the section prepare must name at least one folder"):
        yaml_file.load_prepare(path)
