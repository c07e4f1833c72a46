from hypothesis import given
from hypothesis import strategies as st

from llama_jax.inference.prefix_trees import ScoreRequest, build_row, pack

CAPACITY = 12


@st.composite
def requests(draw):
    """Sequences of few different tokens, so that many share a beginning or are equal."""
    tokens = draw(st.lists(st.integers(0, 2), min_size=2, max_size=CAPACITY + 1))
    return ScoreRequest(tuple(tokens), draw(st.integers(1, len(tokens) - 1)))


def beginnings(sequences):
    return {tuple(s[:n]) for s in sequences for n in range(1, len(s) + 1)}


@given(st.lists(requests(), max_size=12))
def test_each_scored_token_follows_exactly_the_tokens_before_it(all_requests):
    row = build_row(all_requests, range(len(all_requests)))
    assert sorted(row.pairs) == list(range(len(all_requests)))
    for index, (tokens, n_context) in enumerate(all_requests):
        assert len(row.pairs[index]) == len(tokens) - n_context
        for t, pair in enumerate(row.pairs[index], start=n_context):
            query = row.queries[pair]
            attended = [j for j in range(query + 1) if query < row.ends[j]]
            assert tuple(row.tokens[j] for j in attended) == tokens[:t]
            assert [row.positions[j] for j in attended] == list(range(t))
            assert row.targets[pair] == tokens[t]


@given(st.lists(requests(), max_size=20))
def test_rows_compute_each_common_beginning_once_and_each_request_is_in_one_row(all_requests):
    members = range(0, len(all_requests), 2)  # only these
    rows = pack(all_requests, members, CAPACITY)
    assert sorted(index for row in rows for index in row.pairs) == list(members)
    for row in rows:
        of_row = [all_requests[index] for index in row.pairs]
        assert len(row.tokens) == len(beginnings(tokens[:-1] for tokens, _ in of_row)) <= CAPACITY
        scored = {tokens[: t + 1] for tokens, n in of_row for t in range(n, len(tokens))}
        assert len(row.queries) == len(row.targets) == len(scored) <= CAPACITY
    assert rows == pack(all_requests, members, CAPACITY)


def test_answers_to_one_question_are_in_one_row_and_another_question_fills_its_gap():
    questions = [tuple(range(10 * i, 10 * i + 8)) for i in range(3)]
    answers = [ScoreRequest((*q, 90 + a, 99), 8) for q in questions for a in range(4)]
    rows = pack(answers, range(12), 24)  # each question takes 8 + 4 tokens: the last isn't computed
    assert sorted(sorted(row.pairs) for row in rows) == [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11]]
    assert sorted(len(row.tokens) for row in rows) == [12, 24]
