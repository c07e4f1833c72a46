import gzip
import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
from backports import zstd

from llama_jax.data import corpus, corpus_plan, text_files, tokenize, train_on_corpus
from llama_jax.data.bad_records import BadLimit
from llama_jax.data.shards import TokenStream
from llama_jax.errors import InputError
from llama_jax.tokenizer import split_points
from llama_jax.tokenizer.sentencepiece import SentencePiece
from llama_jax.tokenizer.tokenizer import load_tokenizer

TEXTS = [f"line {i} of a text\nwith two lines {'ab' * (i % 7)}\n" for i in range(40)]

GZIP = gzip.compress(np.random.default_rng(0).bytes(3000).hex().encode(), mtime=0)


@pytest.fixture
def sources(tmp_path):
    """The same texts as JSON lines (plain, gzip and zstd), and as one text file each."""
    jsonl = "".join(json.dumps({"text": t, "id": i}) + "\n" for i, t in enumerate(TEXTS))
    (tmp_path / "a.jsonl").write_text(jsonl)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(jsonl.encode()))
    half = len(jsonl) // 2  # two frames, as parallel compressors write
    frames = [zstd.compress(part.encode()) for part in (jsonl[:half], jsonl[half:])]
    (tmp_path / "c.jsonl.zst").write_bytes(b"".join(frames))
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{i:02d}.txt").write_text(text)
    return tmp_path


def hash_order(text):
    """Returns the place of a text among all: those with the lowest hashes are held out."""
    return int.from_bytes(hashlib.blake2b(text.encode()[: 1 << 16], digest_size=8).digest(), "big")


def tokenize_source(source, out, **options):
    options = {"n_vocab": 300, "validation_fraction": 0.1, "progress": False} | options
    return tokenize.tokenize_corpus([str(source)], out, **options)


def stream(folder, split):
    tokens = TokenStream(folder, split)
    return tokens.read(0, len(tokens))


def test_all_formats_give_the_same_shards(sources):
    expected = tokenize_source(sources / "a.jsonl", sources / "out-a")
    for name in ("b.jsonl.gz", "c.jsonl.zst", "texts"):
        meta = tokenize_source(sources / name, sources / f"out-{name}")
        assert meta["splits"] == expected["splits"]


def test_decoding_the_shards_gives_the_documents(sources):
    meta = tokenize_source(sources / "a.jsonl", sources / "out")
    tokenizer = load_tokenizer(sources / "out")
    texts = {}
    for split in text_files.SPLITS:
        tokens, _ = stream(sources / "out", split)
        starts = np.flatnonzero(tokens == tokenizer.bos_id)
        assert np.all(tokens[starts[1:] - 1] == 2)
        texts[split] = [tokenizer.decode(part.tolist()) for part in np.split(tokens, starts[1:])]
        assert meta["splits"][split]["documents"] == len(texts[split])
    assert sorted(texts["validation"]) == sorted(sorted(TEXTS, key=hash_order)[:4])
    assert sorted(texts["train"] + texts["validation"]) == sorted(TEXTS)


def test_the_last_part_of_a_single_book_is_held_out(tmp_path):
    (tmp_path / "book.txt").write_text("".join(f"sentence number {i}\n" for i in range(1000)))
    tokenize_source(tmp_path / "book.txt", tmp_path / "out", n_vocab=290)
    tokenizer = load_tokenizer(tmp_path / "out")
    texts = [tokenizer.decode(stream(tmp_path / "out", s)[0].tolist()) for s in text_files.SPLITS]
    assert "".join(texts) == (tmp_path / "book.txt").read_text()
    assert 0.08 < len(texts[1]) / len("".join(texts)) < 0.12
    assert texts[1].startswith("sentence")


def test_the_unigram_entropy_is_computed_from_the_predicted_tokens(sources):
    meta = tokenize_source(sources / "texts", sources / "out")
    tokens, _ = stream(sources / "out", "validation")
    counts = np.bincount(tokens[tokens != 1])  # the begin token is never predicted
    share = counts[counts > 0] / counts.sum()
    expected = -np.sum(share * np.log(share))
    assert meta["splits"]["validation"]["unigram_entropy"] == pytest.approx(expected)


def test_the_standard_library_of_python_is_a_corpus():
    files = text_files.find_files(["python-stdlib"])
    assert len(files) > 300
    assert {"argparse.py", "inspect.py"} <= {file.name for file in files}
    assert not any("site-packages" in file.parts for file in files)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": \n', r"x.jsonl:2: not valid JSON"),
        ("x.jsonl", b'{"body": "a"}\n', r'x.jsonl:1: a line needs a string "text"; .* has: body'),
        ("x.jsonl", b"[1, 2]\n", r"x.jsonl:1: a line needs .* has: list"),
        ("x.txt", b"caf\xe9", "x.txt:1: not UTF-8 text"),
        ("x.txt.gz", GZIP[:30], "x.txt.gz is damaged or truncated"),
        ("x.txt.gz", b"not gzip at all", "x.txt.gz is damaged or truncated"),
        ("x.txt.gz", GZIP[:20] + b"\xff" * 20 + GZIP[40:], "x.txt.gz is damaged or truncated"),
        ("x.txt.zst", b"not zstd at all", "x.txt.zst is damaged or truncated"),
    ],
)
def test_a_damaged_file_is_named_and_no_output_is_left(tmp_path, name, content, message):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        tokenize_source(tmp_path / "in" / name, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_a_truncated_zstd_file_is_rejected(tmp_path):
    text = np.random.default_rng(0).bytes(3000).hex()
    (tmp_path / "x.txt.zst").write_bytes(zstd.compress(text.encode())[:-200])
    with pytest.raises(InputError, match="damaged or truncated"):
        list(text_files.read_text(tmp_path / "x.txt.zst"))


def test_existing_output_missing_sources_and_empty_splits_are_rejected(sources):
    tokenize_source(sources / "texts", sources / "out")
    with pytest.raises(InputError, match="out already exists"):
        tokenize_source(sources / "texts", sources / "out")
    with pytest.raises(InputError, match="no text files at"):
        tokenize_source(sources / "nothing*.txt", sources / "other")
    with pytest.raises(InputError, match="no document for the validation split"):
        tokenize_source(sources / "a.jsonl", sources / "other", validation_fraction=0.001)


def test_a_long_text_is_encoded_in_spans_and_its_shards_are_the_same(tmp_path, monkeypatch):
    text = "".join(f"sentence number {i}, and more\n" for i in range(2000))
    (tmp_path / "book.txt").write_text(text)
    unsplit = tokenize_source(tmp_path / "book.txt", tmp_path / "unsplit")
    lengths = []

    def recording_encode(self, text, **options):
        lengths.append(len(text))
        return encode(self, text, **options)

    encode = SentencePiece.encode
    monkeypatch.setattr(SentencePiece, "encode", recording_encode)
    monkeypatch.setattr(split_points, "SPAN_CHARACTERS", 1000)
    monkeypatch.setattr(corpus, "_BLOCK", 700)
    in_spans = tokenize_source(tmp_path / "book.txt", tmp_path / "in-spans", workers=1)
    assert in_spans == unsplit  # including the hashes of all files
    assert len(lengths) > 40
    assert max(lengths) < 2000


def test_the_tokenizer_of_a_large_corpus_is_trained_on_every_nth_line(sources, monkeypatch):
    training_lines = []
    monkeypatch.setattr(
        train_on_corpus, "train_tokenizer", lambda lines, *_: training_lines.extend(lines)
    )
    assert 2000 < (sources / "a.jsonl").stat().st_size < 3000
    settings = corpus.CorpusSettings()
    files = corpus_plan.list_ranges([sources / "a.jsonl"], settings)
    for limit, every in ((3000, 1), (1000, 3)):
        monkeypatch.setattr(train_on_corpus, "_TRAINING_BYTES", limit)
        training_lines.clear()
        train_on_corpus.TrainTokenizer(sources, tuple(files), settings, 300, None).run()
        assert training_lines == [line for text in TEXTS for line in text.split("\n")][::every]


SPECIAL = "<s>a</s>b <0x0A></s>"


@pytest.fixture
def special_sources(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(20):
        (tmp_path / "in" / f"{i:02d}.txt").write_text(f"text {i} {SPECIAL} {'and more ' * 20}")
    return tmp_path / "in"


def test_the_text_of_special_tokens_is_counted_and_stays_text(special_sources, tmp_path, capsys):
    tokenize_source(special_sources, tmp_path / "out")
    assert "the text of special tokens 60 times (</s> (40), <s> (20))" in capsys.readouterr().err
    tokens, _ = stream(tmp_path / "out", "train")
    assert [int((tokens == i).sum()) for i in (1, 2)] == [18, 18]


@pytest.mark.parametrize("span", [split_points.SPAN_CHARACTERS, 30])
def test_parse_special_encodes_the_text_of_special_tokens_as_the_tokens(
    special_sources, tmp_path, capsys, monkeypatch, span
):
    monkeypatch.setattr(split_points, "SPAN_CHARACTERS", span)
    tokenize_source(special_sources, tmp_path / "out", parse_special=True, workers=1)
    assert "special tokens" not in capsys.readouterr().err
    tokens, starts = stream(tmp_path / "out", "train")
    tokenizer = load_tokenizer(tmp_path / "out")
    documents = np.split(tokens, starts[1:])
    assert len(documents) == 18
    texts = sorted(special_sources.iterdir())
    held_out = sorted((path.read_text() for path in texts), key=hash_order)[:2]
    texts = [path for path in texts if path.read_text() not in held_out]
    for document, path in zip(documents, texts, strict=True):
        assert document.tolist() == [1, *tokenizer.parse(path.read_text()), 2]


def test_a_rendered_chat_gets_no_second_begin_and_end_token(special_sources, tmp_path):
    for path in special_sources.iterdir():
        path.write_text(f"<s>[INST] {path.stem} [/INST] b </s>")
    tokenize_source(special_sources, tmp_path / "out", n_vocab=285, parse_special=True)
    tokens, _ = stream(tmp_path / "out", "train")
    assert [int((tokens == i).sum()) for i in (1, 2)] == [18, 18]
    assert tokens[-1] == 2


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def start_tokenize(sources, *more, setup=""):
    """Starts the command in its own process group."""
    run = f"import sys; {setup}; from llama_jax.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", run, "tokenize", *more, "--out", sources / "o" / "out"]
    return subprocess.Popen(
        list(map(str, command)), stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def test_a_full_disk_is_reported_in_one_sentence_and_leaves_no_output(sources):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))"
    source = [sources / "a.jsonl", "--vocab-size", 300]
    process = start_tokenize(sources, *source, setup=limit)
    _, stderr = process.communicate(timeout=60)
    out = sources / "o" / "out"
    assert stderr.splitlines()[-1] == f"llama-jax tokenize: can't write {out}: File too large"
    assert process.returncode == 1
    assert "Traceback" not in stderr
    assert names(sources / "o") == []


def test_bad_records_up_to_the_limit_are_left_out_and_reported(sources, capsys):
    good = (sources / "a.jsonl").read_text()
    (sources / "bad.jsonl").write_text(good + '{"text": \n{"body": "x", "id": 7}\n{"text": ""}\n')
    options = {"validation_fraction": 0, "max_bad": BadLimit(0, 0.05)}  # 2 of 43 are allowed
    expected = tokenize_source(sources / "a.jsonl", sources / "good", validation_fraction=0)
    meta = tokenize_source(sources / "bad.jsonl", sources / "out", **options)
    assert meta["splits"] == expected["splits"]
    counts = {"not JSON": 1, "without text": 1, "empty": 1}
    assert meta["bad_records"] == counts
    report = [*map(json.loads, (sources / "out" / "bad_records.log").read_text().splitlines())]
    where = {"not JSON": ":41", "without text": ":42 (7)", "empty": ":43"}
    assert report == [
        {"kind": kind, "at": f"{sources / 'bad.jsonl'}{line}"} for kind, line in where.items()
    ]
    assert "left out: 1 not JSON, 1 without text, 1 empty" in capsys.readouterr().err
    with pytest.raises(InputError, match="2 of 43 records of the corpus are bad"):
        tokenize_source(
            sources / "bad.jsonl",
            sources / "less",
            validation_fraction=0,
            max_bad=BadLimit(0, 0.04),
        )
    assert (sources / ".less.unfinished" / "bad_records.log").exists()
    with pytest.raises(
        InputError, match=r"bad.jsonl:42 \(7\): a line needs a string .* \(2 bad records"
    ):
        tokenize_source(sources / "bad.jsonl", sources / "one", max_bad=BadLimit(1))
