"""Scores prompts: many requests for log-probabilities together, as prefix trees.

Evaluation harnesses ask for the log-probabilities of a prompt and at most one new token, the most
likely one. Such requests need no row of the batch, and their common prefixes are computed once.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from llama_jax.config.model import ModelConfig
from llama_jax.inference.engine.requests import (
    MAX_TOP_LOGPROBS,
    Event,
    PromptDone,
    Request,
    RequestEnded,
    Ticket,
)
from llama_jax.inference.engine.row_programs import attach_logprobs
from llama_jax.inference.prefix_trees import ScoreRequest, TreeRow, pack
from llama_jax.inference.score import Trees, pair_logprobs, row_length, stack_rows
from llama_jax.model.weights import Llama, UnstackedLlama
from llama_jax.parallel.mesh import batch_shards

# Tokens of the largest tree. Running requests wait for its computation. Longer prompts are
# prefilled in chunks.
_MAX_TOKENS = 1024


class Tree(NamedTuple):
    """A prefix tree of prompts, and their requests."""

    row: TreeRow
    tickets: list[Ticket]


def is_score(request: Request) -> bool:
    """Returns whether a request asks only for results of `score_trees`.

    Its one new token is then the most likely one. All other sampling settings change only draws, or
    depend on generated tokens, of which there are none yet.
    """
    sampling = request.sampling
    is_greedy = sampling.temperature == 0 and sampling.repetition_penalty == 1
    is_free = not request.logit_bias and request.constraint is None
    is_short = len(request.prompt) <= _MAX_TOKENS and request.max_new_tokens == 1
    return request.prompt_logprobs and is_greedy and is_free and is_short


def pack_trees(tickets: Sequence[Ticket]) -> list[Tree]:
    """Returns prefix trees with the prompts of all requests."""
    if not tickets:
        return []
    # Each token of a prompt has a pair. The target of the last one, 0, is a placeholder: only its
    # alternatives are used.
    scored = [ScoreRequest((*ticket.request.prompt, 0), 1) for ticket in tickets]
    length = row_length(max(len(ticket.request.prompt) for ticket in tickets))
    rows = pack(scored, range(len(scored)), length)
    return [Tree(row, [tickets[i] for i in row.pairs]) for row in rows]


def take_trees(trees: list[Tree], copies: int) -> tuple[list[Tree], int]:
    """Removes the last tree and others of its length, one for each copy of the model.

    Returns:
        The removed trees, and the length of the program that scores them.
    """
    length = _tree_length(trees[-1])
    taken = [tree for tree in trees if _tree_length(tree) == length][-copies:]
    trees[:] = [tree for tree in trees if not any(tree is other for other in taken)]
    return taken, length


def _tree_length(tree: Tree) -> int:
    return row_length(max(len(tree.row.tokens), len(tree.row.queries)))


def score_trees(
    config: ModelConfig,
    model: Llama | UnstackedLlama,
    trees: Sequence[Sequence[Sequence[int]]],
    length: int,
) -> list[tuple[np.ndarray, ...]]:
    """Computes the log-probability of each pair of each tree, and the most likely tokens.

    Args:
        config: the model's config.
        model: weights of that config, on the current mesh.
        trees: the first five fields of a `TreeRow`; at most one for each copy of the model.
        length: of the rows that the program computes [tokens].

    Returns:
        Of each tree the log-probabilities [S], and those [S, A] and the ids [S, A] of the most
        likely tokens.
    """
    rows = [TreeRow(*map(list, columns), pairs={}) for columns in trees]
    stacked = stack_rows(rows, batch_shards(), length)
    computed = pair_logprobs(config, model, stacked, top=MAX_TOP_LOGPROBS)
    arrays = [np.asarray(x_BS_) for x_BS_ in computed]
    return [tuple(x_BS_[i] for x_BS_ in arrays) for i in range(len(rows))]


def score_events(tree: Tree, computed: tuple[np.ndarray, ...]) -> list[list[Event]]:
    """Returns all events of each request of a tree, given the results of `score_trees`."""
    logprobs, top_logprobs, top_tokens = computed
    events = []
    for ticket, pairs in zip(tree.tickets, tree.row.pairs.values(), strict=True):
        request, last = ticket.request, pairs[-1]
        ids = [*request.prompt[1:], int(top_tokens[last, 0])]
        *prompt_logprobs, new = attach_logprobs(
            ids,
            np.append(logprobs[pairs[:-1]], top_logprobs[last, 0]),
            top_tokens[pairs],
            top_logprobs[pairs],
            top=request.top_logprobs,
        )
        ended = RequestEnded("stop" if new.id in request.end_ids else "length")
        events.append([PromptDone(tuple(prompt_logprobs)), new, ended])
    return events


def tree_lengths(context: int) -> list[int]:
    """Returns the lengths of the trees that an engine with a context of `context` tokens scores."""
    return sorted({row_length(1), row_length(min(context, _MAX_TOKENS))})


def warm_up_trees(config: ModelConfig, model: Llama | UnstackedLlama, length: int) -> None:
    """Compiles the program that scores a tree of `length` tokens."""
    trees = _one_token_trees(length)
    jax.block_until_ready(pair_logprobs(config, model, trees, top=MAX_TOP_LOGPROBS))


def prepare_trees(config: ModelConfig, model: Llama | UnstackedLlama, length: int) -> None:
    """Reads or compiles the stored program that scores a tree of `length` tokens."""
    pair_logprobs.prepare(config, model, _one_token_trees(length), top=MAX_TOP_LOGPROBS)


def _one_token_trees(length: int) -> Trees:
    return stack_rows([TreeRow([0], [0], [1], [0], [0], {})], batch_shards(), length)
