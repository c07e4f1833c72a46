"""`tokenize --chat`: rows become packed windows, in parallel, and nothing is learned by mistake."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import peer, run
from object_store import store_of_this_process

from llama_jax.cli import show_windows
from llama_jax.config.run import DataConfig
from llama_jax.data.batches import Batches
from llama_jax.data.chats import parse_row
from llama_jax.data.samples import Samples
from llama_jax.data.shards import TokenStream
from llama_jax.data.tokenize_chats import encode_example, tokenize_chats
from llama_jax.data.windows import PackedWindows
from llama_jax.errors import InputError
from llama_jax.parallel.mesh import one_device_mesh
from llama_jax.tokenizer.tokenizer import load_tokenizer

T = 192


def chat(i):
    """Returns a chat of one to three turns."""
    messages = [{"role": "system", "content": "list"}] if i % 3 == 0 else []
    for turn in range(1 + i % 3):
        messages.append({"role": "user", "content": f"row {i} turn {turn}"})
        messages.append({"role": "assistant", "content": f"{i} " * (i % 5) + "end"})
    return {"messages": messages}


def pair(i):
    return {"prompt": f"row {i}", "chosen": f"{i} good " * (1 + i % 3), "rejected": "bad"}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    write(folder / "chats.jsonl", map(chat, range(120)))
    write(folder / "pairs.jsonl", map(pair, range(60)))
    return folder


def tokenize(path, out, tokenizer, **options):
    options = {"seq_len": T, "validation_fraction": 0.1, "progress": False} | options
    return tokenize_chats([str(path)], out, tokenizer=tokenizer, **options)


def read_examples(folder, split, segments=1):
    """Returns the ids and targets of each example, from the windows of training."""
    config = DataConfig(mixture={str(folder): 1.0}, batch_size=1, seq_len=T)
    windows = PackedWindows(TokenStream(folder, split), config)
    for i in range(len(windows)):
        window = windows[i]
        parts = []
        for number in range(1, window.segments.max() + 1):
            inside = window.segments == number
            if (window.targets[inside] >= 0).any():
                parts.append((window.tokens[inside].tolist(), window.targets[inside].tolist()))
        yield from zip(*[iter(parts)] * segments, strict=True)


def expected_examples(lines, tokenizer, train_on="all"):
    """Returns the same, directly from the rows."""
    for line in lines:
        example = encode_example(tokenizer, parse_row(json.loads(line), ""), train_on)
        parts = []
        for start, stop in itertools.pairwise([*example.starts, len(example.ids)]):
            ids, trained = example.ids[start:stop].tolist(), example.trained[start:stop].tolist()
            following = zip(ids[1:], trained[1:], strict=True)
            parts.append((ids, [*(i if learn else -1 for i, learn in following), -1]))
        yield tuple(parts)


@pytest.mark.parametrize(("name", "segments"), [("chats", 1), ("pairs", 2)])
@pytest.mark.parametrize("train_on", ["last", "all"])
def test_the_windows_contain_every_row_once(rows, token_folder, tmp_path, name, segments, train_on):
    path = rows / f"{name}.jsonl"
    tokenize(path, tmp_path / "out", token_folder, train_on=train_on)
    lines, tokenizer = path.read_text().splitlines(), load_tokenizer(token_folder)
    held_out = lines[9::10]
    training = [line for i, line in enumerate(lines) if i % 10 != 9]
    for split, part in (("train", training), ("validation", held_out)):
        found = sorted(read_examples(tmp_path / "out", split, segments))
        assert found == sorted(expected_examples(part, tokenizer, train_on))


def test_the_targets_of_the_batches_decode_to_the_answers(rows, token_folder, tmp_path):
    """nanochat #582: a mask that encoding had computed was lost on its way to the loss."""
    tokenize(rows / "chats.jsonl", tmp_path / "out", token_folder, validation_fraction=0)
    tokenizer = load_tokenizer(token_folder)
    config = DataConfig(mixture={str(tmp_path / "out"): 1.0}, batch_size=1, seq_len=T)
    data = Batches(config)
    n_windows = len(data.splits["train"][0]) // T
    found = []
    with jax.set_mesh(one_device_mesh()):
        for step in range(n_windows):
            batch = data.train(step)
            targets, segments = (np.asarray(x)[0, 0] for x in (batch.targets, batch.segments))
            for number in range(1, segments.max() + 1):
                learned = targets[(segments == number) & (targets >= 0)].tolist()
                if learned:
                    ends = [i for i, token in enumerate(learned, 1) if token == tokenizer.eos_id]
                    assert ends[-1] == len(learned)
                    bounds = itertools.pairwise([0, *ends])
                    found.append([tokenizer.decode(learned[a : b - 1]) for a, b in bounds])
    answers = [
        [m["content"] + " " for m in chat(i)["messages"] if m["role"] == "assistant"]
        for i in range(120)
    ]
    assert sorted(found) == sorted(answers)


def test_train_on_chooses_the_last_answer_all_answers_or_everything(token_folder):
    tokenizer = load_tokenizer(token_folder)
    row = parse_row(chat(2), "")  # three turns
    answers = tokenizer.encode_example(row.messages).answers
    sizes = [stop - start for start, stop in answers]
    masks = {on: encode_example(tokenizer, row, on).trained for on in ("last", "all", "everything")}
    assert masks["last"].sum() == sizes[-1]
    assert masks["all"].sum() == sum(sizes)
    assert masks["everything"].sum() == len(masks["everything"]) - 1
    for start, stop in answers:
        assert masks["all"][start:stop].all()
    row = row._replace(untrained=frozenset({3}))
    assert encode_example(tokenizer, row, "all").trained.sum() == sizes[0] + sizes[2]


def test_the_shards_do_not_depend_on_the_number_of_processes(rows, token_folder, tmp_path):
    one = tokenize(rows / "chats.jsonl", tmp_path / "one", token_folder, workers=1)
    two = tokenize(rows / "chats.jsonl", tmp_path / "two", token_folder, workers=2)
    assert one == two
    assert one["kind"] == "chats"
    assert one["seq_len"] == T


def test_rows_longer_than_a_window_are_left_out_and_listed(rows, token_folder, tmp_path):
    lines = (rows / "chats.jsonl").read_text().splitlines()
    long = {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * 900}]
    }
    path = write(
        tmp_path / "long.jsonl", map(json.loads, [*lines[:5], json.dumps(long), *lines[5:]])
    )
    meta = tokenize(path, tmp_path / "out", token_folder)
    assert meta["too_long"] == {"rows": 1, "first": [f"{path}:6"]}
    expected = tokenize(rows / "chats.jsonl", tmp_path / "same", token_folder)
    assert meta["splits"] == expected["splits"]
    with pytest.raises(InputError, match="no example for the train split: 0 of 1 chats have at"):
        tokenize(write(tmp_path / "x.jsonl", [long]), tmp_path / "none", token_folder)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([chat(1), {"text": "a"}], r'x.jsonl:2: a row needs the field "messages"'),
        ([chat(1), pair(1)], "x.jsonl:2: this row is one of preferences, but the first is one of"),
        ([pair(1), chat(1)], "x.jsonl:2: this row is one of chats, but the first is one of pref"),
        (
            [chat(1), {"prompt": "a", "completion": "b [/INST]"}],
            r"x.jsonl:2: message 2 of the chat contains \[/INST\]",
        ),
        ([chat(1), {"prompt": "\ud800", "completion": "b"}], "x.jsonl:2: .* half of a surrogate"),
        ([], "the files contain no chats"),
    ],
)
def test_a_row_that_is_no_chat_is_refused_with_its_place(token_folder, tmp_path, rows, message):
    path = write(tmp_path / "x.jsonl", rows)
    with pytest.raises(InputError, match=message):
        tokenize(path, tmp_path / "out", token_folder)
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]


def test_a_json_array_is_refused_with_the_command_that_converts_it(token_folder, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps([chat(1), chat(2)]))
    with pytest.raises(InputError, match=r"x.json is one JSON array: write each row on its own"):
        tokenize(tmp_path / "x.json", tmp_path / "out", token_folder)
    (tmp_path / "x.jsonl").write_text('{"messages": []\n')
    with pytest.raises(InputError, match=r"x.jsonl:1: not valid JSON"):
        tokenize(tmp_path / "x.jsonl", tmp_path / "out", token_folder)


def test_everything_is_no_target_of_preferences(rows, token_folder, tmp_path):
    with pytest.raises(InputError, match="only answers are compared: use last or all"):
        tokenize(rows / "pairs.jsonl", tmp_path / "out", token_folder, train_on="everything")


def test_the_command_prints_the_fill_rate_and_shows_windows(rows, token_folder, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["tokenize", rows / "chats.jsonl", "--chat", "--tokenizer", token_folder]
    code, text, _ = run(capsys, *command, "--seq-len", T, "--out", out, "--show", 1)
    assert code == 0
    meta = TokenStream(out, "train").meta
    split = meta["splits"]["train"]
    fill = split["example_tokens"] / split["tokens"]
    assert f"{out}/train: 114 chats in {split['tokens'] // T} windows of 192 tokens" in text
    assert f"{fill:.2%} full" in text
    assert re.search(r"⟦ (\d+ )*end </s>⟧", text)
    code, shown, _ = run(capsys, "info", out, "--show", 1)
    assert code == 0
    assert shown.split("══", 1)[1] == text.split("══", 1)[1]
    assert f"train       114 chats in {split['tokens'] // T} windows" in shown
    code, verified, _ = run(capsys, "info", out, "--verify")
    assert (code, "verified" in verified) == (0, True)


def test_a_terminal_gets_colors_and_preferences_their_sides(rows, token_folder, tmp_path):
    tokenize(rows / "pairs.jsonl", tmp_path / "out", token_folder)
    shown = show_windows.show_windows(tmp_path / "out", 2)
    assert shown.count("══ window") == 2
    titles = re.findall(r"── (\w+) (\d+): [\d,]+ tokens, [\d,]+ trained\n<s> \[INST\] row", shown)
    sides = [(side, str(1 + i // 2)) for i in range(4) for side in (("chosen", "rejected")[i % 2],)]
    assert titles[:4] == sides
    assert re.search(r"chosen.*\n<s> \[INST\] row (\d+) \[/INST\]⟦ (\1 good )+</s>⟧", shown)
    assert "[/INST]⟦ bad </s>⟧" in shown
    tokenizer = load_tokenizer(token_folder)
    ids = np.array([*tokenizer.encode("a b", bos=True), *tokenizer.encode("c", eos=True)])
    trained = ids == 2
    text = show_windows.decode_marked(tokenizer, ids, trained, show_windows.COLORS)
    assert text == "\x1b[1m<s>\x1b[22m a b c\x1b[32m\x1b[1m</s>\x1b[22m\x1b[39m"


def test_chats_in_a_bucket_are_those_of_a_disk(rows, token_folder, tmp_path):
    peer("moto")
    expected = tokenize(rows / "chats.jsonl", tmp_path / "disk", token_folder)
    with store_of_this_process("s3") as store:
        assert tokenize(rows / "chats.jsonl", store.url("chats"), token_folder) == expected
        for split in ("train", "validation"):
            assert [*read_examples(store.url("chats"), split)] == [
                *read_examples(tmp_path / "disk", split)
            ]


def test_a_flipped_bit_in_the_mask_is_found(rows, token_folder, tmp_path, capsys):
    tokenize(rows / "chats.jsonl", tmp_path / "out", token_folder)
    path = tmp_path / "out/train/trained/c/0"
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    code, out, _ = run(capsys, "info", tmp_path / "out", "--verify")
    assert (code, "damaged (DATA_LOSS: " in out) == (1, True)
    config = DataConfig(mixture={str(tmp_path / "out"): 1.0}, batch_size=1, seq_len=T)
    with pytest.raises(InputError, match="is damaged or cut short"):
        Samples(config)[0]
    path.unlink()
    with pytest.raises(InputError, match="train/trained/c/0 is missing"):
        Batches(config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vocab-size", 300, "--chat", "--seq-len", 64], "--chat needs --tokenizer"),
        (["--tokenizer", "t", "--chat"], "--chat needs --seq-len"),
        (["--tokenizer", "t", "--chat", "--seq-len", 64, "--parse-special"], "--parse-special"),
        (["--tokenizer", "t", "--seq-len", 64], "--seq-len and --train-on are for chats"),
        (["--tokenizer", "t", "--train-on", "all"], "--seq-len and --train-on are for chats"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(rows, tmp_path, capsys, arguments, message):
    out = tmp_path / "out"
    code, _, err = run(capsys, "tokenize", rows / "chats.jsonl", "--out", out, *arguments)
    assert (code, message in err) == (2, True)


def test_a_killed_command_leaves_nothing_that_looks_complete(rows, token_folder, tmp_path):
    endless = "from llama_jax.data import tokenize_chats as t; read = t.read_lines"
    endless += "; import itertools; t.read_lines = lambda p: itertools.cycle(read(p))"
    program = f"import sys; {endless}; from llama_jax.cli.main import main; main(sys.argv[1:])"
    arguments = ["tokenize", rows / "chats.jsonl", "--chat", "--seq-len", T]
    arguments += ["--tokenizer", token_folder, "--out", tmp_path / "out", "--workers", 2]
    setup = "import llama_jax.data.packing as p, llama_jax.data.shard_writer as w"
    setup += "; p.BUFFER_TOKENS = w.SHARD_TOKENS = w.CHUNK_TOKENS = 1 << 12; "
    process = subprocess.Popen(
        list(map(str, [sys.executable, "-c", setup + program, *arguments])),
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".out.partial-*/train/trained/c/*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    assert not (tmp_path / "out").exists()
    while True:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        assert time.monotonic() < deadline, "a worker is still running"
        time.sleep(0.01)
    tokenize(rows / "chats.jsonl", tmp_path / "out", token_folder)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_ordinary_chats_fill_the_windows(token_folder, tmp_path):
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(4, 0.6, 2000).astype(int)
    chats = [{"prompt": f"row {i}", "completion": "a" * n} for i, n in enumerate(lengths)]
    path = write(tmp_path / "x.jsonl", chats)
    meta = tokenize(path, tmp_path / "out", token_folder, seq_len=1024)
    split = meta["splits"]["train"]
    assert split["example_tokens"] / split["tokens"] > 0.98
