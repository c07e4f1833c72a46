"""Packs token sequences into rows that are prefix trees: a common prefix is stored once.

A row is the depth-first order of a tree whose paths are the sequences. Each token has its depth as
its position, and attends to its ancestors (`attention`, `ends_BT`).
"""

from collections.abc import Sequence
from typing import NamedTuple

# In sorted order, a sequence joins the group of its predecessor if their common prefix is at least
# this share of the sequence. Otherwise it starts a new group, which fills a gap in any row: a
# prefix in common with the sequences of that row is still stored once.
_SHARED_PART = 1 / 4


class ScoreRequest(NamedTuple):
    """A token sequence, of which tokens[n_context:] is scored.

    Attributes:
        tokens: ids; all but the last are computed.
        n_context: tokens that are not scored, 1 … len(tokens) - 1.
    """

    tokens: tuple[int, ...]
    n_context: int


class TreeRow(NamedTuple):
    """A prefix tree of requests, and the pairs (token, next token) that are scored.

    Attributes:
        tokens: ids in depth-first order.
        positions: depth of each token.
        ends: index after the last token of each token's subtree.
        queries: index of the token whose next token is scored; one for each pair.
        targets: the next tokens. A branching point has several.
        pairs: for each request of the row, the pairs of its scored tokens.
    """

    tokens: list[int]
    positions: list[int]
    ends: list[int]
    queries: list[int]
    targets: list[int]
    pairs: dict[int, list[int]]


def build_row(requests: Sequence[ScoreRequest], members: Sequence[int]) -> TreeRow:
    """Returns the prefix tree of some of the requests, given by their indices."""
    row = TreeRow([], [], [], [], [], {})
    numbers: dict[tuple[int, int], int] = {}  # of the pairs
    path: list[int] = []  # the index in the row of each token of the previous request
    previous: Sequence[int] = ()
    for member in sorted(members, key=lambda i: requests[i].tokens):
        tokens, n_context = requests[member]
        inputs = tokens[:-1]
        common = common_prefix_length(previous, inputs)
        for index in path[common:]:
            row.ends[index] = len(row.tokens)
        path = [*path[:common], *range(len(row.tokens), len(row.tokens) + len(inputs) - common)]
        row.tokens.extend(inputs[common:])
        row.positions.extend(range(common, len(inputs)))
        row.ends.extend([0] * (len(inputs) - common))
        pairs = zip(path[n_context - 1 :], tokens[n_context:], strict=True)
        row.pairs[member] = [numbers.setdefault(pair, len(numbers)) for pair in pairs]
        previous = inputs
    for index in path:
        row.ends[index] = len(row.tokens)
    row.queries.extend(query for query, _ in numbers)
    row.targets.extend(target for _, target in numbers)
    return row


def pack(requests: Sequence[ScoreRequest], members: Sequence[int], capacity: int) -> list[TreeRow]:
    """Returns rows of at most `capacity` tokens and pairs with some of the requests.

    Each of these requests, given by their indices, must fit a row by itself. Those with a long
    common prefix are in one row if they fit; these groups fill the rows by best fit, the largest
    first.
    """
    groups = sorted(_groups(requests, members, capacity), key=lambda group: -group[1])
    rows_with_room: list[list[list[int]]] = [[] for _ in range(capacity + 1)]
    for group, size in groups:
        room = next((n for n in range(size, capacity + 1) if rows_with_room[n]), None)
        row = rows_with_room[room].pop() if room is not None else []
        rows_with_room[(capacity if room is None else room) - size].append(row + group)
    return [build_row(requests, row) for rows in rows_with_room for row in rows]


def _groups(
    requests: Sequence[ScoreRequest], members: Sequence[int], capacity: int
) -> list[tuple[list[int], int]]:
    """Returns groups of requests with a common prefix, and an upper bound of each group's size."""
    groups: list[tuple[list[int], int]] = []
    group: list[int] = []
    n_tokens = n_scored = 0
    previous = ScoreRequest((), 0)
    for index in sorted(members, key=lambda i: requests[i].tokens):
        request = requests[index]
        common = common_prefix_length(previous.tokens[:-1], request.tokens[:-1])
        n_new, scored = len(request.tokens) - 1 - common, _n_new_pairs(previous, request)
        too_large = max(n_tokens + n_new, n_scored + scored) > capacity
        if group and (too_large or common < _SHARED_PART * len(request.tokens)):
            groups.append((group, max(n_tokens, n_scored)))
            group, n_tokens, n_scored = [], 0, 0
            n_new, scored = len(request.tokens) - 1, len(request.tokens) - request.n_context
        group.append(index)
        n_tokens, n_scored, previous = n_tokens + n_new, n_scored + scored, request
    return [*groups, (group, max(n_tokens, n_scored))] if group else []


def _n_new_pairs(previous: ScoreRequest, request: ScoreRequest) -> int:
    """Returns how many of a request's scored tokens the previous request has not scored."""
    common = common_prefix_length(previous.tokens, request.tokens)
    after = len(request.tokens) - max(request.n_context, common)
    return after + max(0, min(previous.n_context, common) - request.n_context)


def common_prefix_length(tokens: Sequence[int], others: Sequence[int]) -> int:
    """Returns the length of the longest common prefix of two texts [tokens]."""
    pairs = zip(tokens, others, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(tokens), len(others)))
