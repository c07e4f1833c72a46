import pytest

from llama_jax.inference.engine.requests import Request, Ticket
from llama_jax.inference.engine.rows import Chunk, Row, next_chunks
from llama_jax.inference.engine.slots import choose_row


def row(tokens=(), prompt=None, assigned_at=0.0, ready=False):
    new = Row()
    new.tokens, new.ready, new.assigned_at = list(tokens), ready, assigned_at
    if prompt is not None:
        new.ticket = Ticket(Request(tuple(prompt), 1), lambda _: None, lambda _: None)
    return new


PREFIX = tuple(range(100))


@pytest.mark.parametrize(
    ("rows", "copies", "chosen"),
    [
        # The row that has the prefix is free: it is continued.
        ([row(), row(PREFIX)], 1, (1, 1, 100)),
        # It is not: its slots are copied, to the row that was free for longest.
        ([row(PREFIX, PREFIX), row(assigned_at=2), row(assigned_at=1)], 1, (2, 0, 100)),
        # Between copies of the model no slots are copied.
        ([row(PREFIX, PREFIX), row(PREFIX, PREFIX), row(), row()], 2, (2, 2, 0)),
        ([row(), row(), row(PREFIX, PREFIX), row(PREFIX[:40])], 2, (3, 2, 100)),
        # A prefix that saves no chunk doesn't keep requests on one copy.
        ([row(PREFIX[:1], PREFIX), row(PREFIX[:1]), row(), row()], 2, (2, 2, 0)),
        # Without a prefix: the copy with most free rows.
        ([row((7,), (7,)), row(), row(), row()], 2, (2, 2, 0)),
    ],
)
def test_a_request_gets_a_free_row_of_the_copy_that_has_its_prefix(rows, copies, chosen):
    target, source, common = choose_row(rows, (*PREFIX, 5), copies)
    assert (rows.index(target), rows.index(source), common) == chosen


def test_each_copy_prefills_its_oldest_prompt_of_the_same_size(monkeypatch):
    monkeypatch.setattr("llama_jax.inference.engine.rows.platform", lambda: "tpu")
    rows = [
        row(prompt=(1, 2, 3), assigned_at=3.0),
        row(tokens=(4, 5), prompt=(4, 5, 6, 7), assigned_at=2.0),
        row(prompt=PREFIX, assigned_at=1.0),  # of another size than the oldest of all
        row(prompt=(8, 9), assigned_at=4.0),
        row(prompt=(1,), assigned_at=0.0, ready=True),
        row(),
        row(prompt=(3,), assigned_at=0.5),
        row(),
    ]
    first, second, last = (
        Chunk(1, (6, 7), (7,), 2),
        Chunk(3, (8, 9), (9,), 0),
        Chunk(6, (3,), (), 0),
    )
    assert next_chunks(rows, 4) == ([last, first, second], 32, None)
    rows[6] = row()
    assert next_chunks(rows, 4) == ([Chunk(2, PREFIX, PREFIX[1:], 0)], 256, None)
    assert next_chunks(rows[:2], 1) == ([first], 32, None)


@pytest.mark.parametrize(
    ("platform", "tokens", "sizes"),
    [
        ("tpu", 20, [32]),
        ("tpu", 100, [256]),
        ("tpu", 300, [256, 256]),
        ("cpu", 20, [32]),
        ("cpu", 100, [32, 32, 32, 32]),  # a CPU would compute 156 tokens of padding
        ("cpu", 300, [256, 32, 32]),
    ],
)
def test_the_chunks_of_a_prompt(platform, tokens, sizes, monkeypatch):
    monkeypatch.setattr("llama_jax.inference.engine.rows.platform", lambda: platform)
    prompt, used, found = tuple(range(tokens)), 0, []
    while used < tokens:
        [chunk], size, _ = next_chunks([row(tokens=prompt[:used], prompt=prompt)], 1)
        assert chunk.tokens == prompt[used : used + size]
        used += len(chunk.tokens)
        found.append(size)
    assert found == sizes


def test_a_chunk_attends_to_the_slots_that_its_own_row_needs(monkeypatch):
    monkeypatch.setattr("llama_jax.inference.engine.rows.platform", lambda: "tpu")
    prompt = tuple(range(700))
    long = row(tokens=prompt[:600], prompt=prompt, assigned_at=1.0)
    short = row(prompt=range(100), assigned_at=2.0)  # of the same size, but another program
    both = next_chunks([long, short], 2, (512, 1024))
    assert both == ([Chunk(0, prompt[600:], prompt[601:], 600)], 256, 1024)
    assert next_chunks([row(), short], 2, (512, 1024))[1:] == (256, 512)
