import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of, peer

from llama_jax.inference.sampling import (
    Sampling,
    TokenCounts,
    logprobs_from_logits,
    process_logits,
    sample,
    stack_sampling,
)
from llama_jax.parallel.mesh import one_device_mesh, shard_array
from llama_jax.parallel.sharding import activation_spec

SHARES = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
LOGITS = np.log(np.stack([SHARES, SHARES[::-1]])).astype(np.float32)
V = 96

PROCESS, SAMPLE = jax.jit(process_logits), jax.jit(sample)
LOGPROBS = jax.jit(logprobs_from_logits, static_argnums=2)

pytestmark = pytest.mark.usefixtures("one_device")


def settings(rows, seed):
    """Returns random settings for a batch; each setting is off in about a third of the rows."""
    rng = np.random.default_rng(seed)

    def some(value, off):
        return value if rng.random() < 2 / 3 else off

    return [
        Sampling(
            temperature=some(float(rng.uniform(0.3, 2)), 1.0),
            top_k=some(int(rng.integers(1, V + 9)), 0),
            top_p=some(float(rng.uniform(0.05, 0.999)), 1.0),
            min_p=some(float(rng.uniform(0, 0.3)), 0.0),
            repetition_penalty=some(float(rng.uniform(0.7, 1.6)), 1.0),
        )
        for _ in range(rows)
    ]


def contexts(rows, seed):
    """Returns prompt tokens [rows, 9] and generated tokens [rows, 12], which overlap and repeat."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, V, (rows, 9)), rng.integers(0, V // 3, (rows, 12))


def token_counts(prompts, generated, vocabulary=V):
    counts = np.stack([np.bincount(row, minlength=vocabulary) for row in generated])
    in_prompt = np.stack([np.bincount(row, minlength=vocabulary) > 0 for row in prompts])
    return TokenCounts(shard_array(in_prompt, "BS"), shard_array(counts.astype(np.int32), "BS"))


def sharded(samplings):
    return jax.tree.map(lambda column: shard_array(column, "B"), stack_sampling(samplings))


def random_logits(rows, seed, vocabulary=V):
    return np.random.default_rng(seed).normal(0, 3, (rows, vocabulary)).astype(np.float32)


def keys(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def included(**changes):
    rows = sharded([Sampling(**({"temperature": 1.0} | changes))] * 2)
    return np.isfinite(PROCESS(rows, None, LOGITS)).tolist()


def draw(sampling, logits_V, n, seed=0):
    logits_BV = np.repeat(logits_V[None], n, axis=0)
    return np.asarray(SAMPLE(sharded([sampling] * n), None, logits_BV, keys(n, seed)))


def test_greedy_rows_take_the_most_likely_token_for_any_key():
    narrow = Sampling(top_k=3, top_p=0.5, min_p=0.1)  # without draws these change nothing
    for seed in (0, 1):
        rows = sharded([Sampling(), narrow])
        assert SAMPLE(rows, None, LOGITS, keys(2, seed)).tolist() == [0, 4]
        np.testing.assert_array_equal(PROCESS(rows, None, LOGITS), LOGITS)


def test_greedy_rows_take_the_most_likely_token_after_penalties():
    counts = token_counts([[1], [1]], [[0, 0], [4, 4]], 5)
    rows = sharded([Sampling(frequency_penalty=0.5), Sampling(frequency_penalty=0.1)])
    assert SAMPLE(rows, counts, LOGITS, keys(2)).tolist() == [1, 4]


def test_a_batch_of_greedy_rows_costs_one_argmax():
    """Outside of `cond`, which depends on the settings, only the argmax reads the logits."""
    shape = random_logits(2, 0).shape
    counts = token_counts(*contexts(2, 0))
    program = jax.make_jaxpr(sample)(
        sharded([Sampling()] * 2), counts, random_logits(2, 0), keys(2)
    )
    reads = [
        eqn.primitive.name
        for eqn in program.eqns
        if any(getattr(operand.aval, "shape", None) == shape for operand in eqn.invars)
    ]
    assert [name for name in reads if name != "reshard"] == ["cond", "reshape", "cond"]


def test_top_k_includes_k_tokens():
    assert included(top_k=2) == [[1, 1, 0, 0, 0], [0, 0, 0, 1, 1]]
    assert included(top_k=99) == included(top_k=5) == included(top_k=0) == [[1] * 5] * 2


@pytest.mark.parametrize(("p", "count"), [(0.3, 1), (0.41, 2), (0.69, 2), (0.71, 3), (1.0, 5)])
def test_top_p_includes_the_fewest_tokens_that_reach_the_mass(p, count):
    assert included(top_p=p)[0] == [1] * count + [0] * (5 - count)


def test_top_p_counts_only_the_mass_that_top_k_includes():
    # Of two tokens the first has 4/7 of the mass.
    assert included(top_k=2, top_p=0.56)[0] == [1, 0, 0, 0, 0]
    assert included(top_k=2, top_p=0.58)[0] == [1, 1, 0, 0, 0]


def test_temperature_comes_before_top_p():
    # At temperature 1/2 the masses are squared: 0.4² of 0.285 is 56 %, so p = 0.5 includes one.
    assert included(temperature=0.5, top_p=0.5)[0] == [1, 0, 0, 0, 0]
    assert included(top_p=0.5)[0] == [1, 1, 0, 0, 0]


def test_min_p_is_a_share_of_the_largest_probability():
    assert included(min_p=0.37)[0] == [1, 1, 1, 0, 0]  # 0.15 of 0.4 is 0.375
    assert included(min_p=0.38)[0] == [1, 1, 0, 0, 0]
    assert included(min_p=1.0)[0] == [1, 0, 0, 0, 0]
    assert included(temperature=0.5, min_p=0.37)[0] == [1, 1, 0, 0, 0]  # 0.14 after temperature


def test_tied_tokens_are_included_together():
    tied = np.array([[2, 1, 1, 1, 0], [-1, 3, 3, 3, 3]], np.float32)
    rows = sharded([Sampling(temperature=0.7, top_k=2), Sampling(temperature=0.7, top_p=0.4)])
    finite = np.isfinite(PROCESS(rows, None, tied)).tolist()
    assert finite == [[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]]


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_the_most_likely_token_is_included_for_extreme_logits_and_settings(scale):
    extreme = [Sampling(temperature=t, top_p=p) for t in (1e-37, 1e-30, 1e6) for p in (1e-9, 1.0)]
    logits = np.repeat(np.array([[-np.inf, -1, 3, 2, -3]], np.float32) * np.float32(scale), 6, 0)
    logits = np.concatenate([logits, -np.inf * np.ones((6, V - 5), np.float32)], axis=1)
    processed = np.asarray(PROCESS(sharded(extreme), None, logits))
    assert not np.isnan(processed).any()
    assert processed[:, 2].tolist() == [0] * 6
    assert not np.isfinite(processed[:, [0, *range(5, V)]]).any()


def in_transformers(sampling, ids, scores):
    """Processes the scores [1, V] of one sequence, ids [1, T], as transformers' generate does."""
    generation = peer("transformers").generation
    chain = [
        generation.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
        generation.TemperatureLogitsWarper(sampling.temperature),
    ]
    if sampling.top_k:
        chain.append(generation.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(generation.TopPLogitsWarper(sampling.top_p))
    chain.append(generation.MinPLogitsWarper(sampling.min_p))
    return generation.LogitsProcessorList(chain)(ids, scores)


def test_distributions_equal_those_of_transformers():
    torch = peer("torch")
    rows = 400
    samplings, (prompts, generated) = settings(rows, seed=1), contexts(rows, seed=2)
    logits = random_logits(rows, seed=3)
    ours = np.asarray(PROCESS(sharded(samplings), token_counts(prompts, generated), logits))
    ids = torch.tensor(np.concatenate([prompts, generated], axis=1))
    theirs = torch.cat(
        [
            in_transformers(samplings[i], ids[i : i + 1], torch.tensor(logits[i : i + 1]))
            for i in range(rows)
        ]
    )
    finite = np.isfinite(ours)
    np.testing.assert_array_equal(finite, np.isfinite(theirs.numpy()))
    # The settings include from one token to all tokens, so the test covers every size of a mask.
    assert (finite.sum(axis=1) == 1).any()
    assert (finite.sum(axis=1) == V).any()
    assert len(set(finite.sum(axis=1).tolist())) > 20
    # The logits of likely tokens over temperature are below 64, so float32 rounds each by up to
    # 2^-19, and a probability changes by at most a quarter of the difference of two of them:
    # 2^-20. Our logits are near 0, so their rounding errors are smaller.
    probabilities = torch.softmax(torch.tensor(ours).double(), dim=-1).numpy()
    expected = torch.softmax(theirs.double(), dim=-1).numpy()
    np.testing.assert_allclose(probabilities, expected, rtol=0, atol=1e-6)


def test_the_order_of_the_steps_is_that_of_transformers():
    generation = peer("transformers").generation
    config = generation.GenerationConfig(
        do_sample=True, temperature=0.7, top_k=9, top_p=0.9, min_p=0.1, repetition_penalty=1.2
    )
    mixin = generation.GenerationMixin()
    mixin.config = peer("transformers").LlamaConfig()
    chain = mixin._get_logits_processor(config, input_ids_seq_length=3)
    assert [type(step).__name__ for step in chain] == [
        "RepetitionPenaltyLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "MinPLogitsWarper",
    ]


def test_presence_and_frequency_penalties_follow_openais_formula():
    rows = 50
    rng = np.random.default_rng(4)
    presence, frequency = rng.uniform(-2, 2, (2, rows)) * (rng.random((2, rows)) < 0.7)
    samplings = [
        Sampling(presence_penalty=float(a), frequency_penalty=float(b))
        for a, b in zip(presence, frequency, strict=True)
    ]
    prompts, generated = contexts(rows, seed=5)
    logits = random_logits(rows, seed=6)
    c = np.stack([np.bincount(row, minlength=V) for row in generated])
    expected = logits - c * frequency[:, None] - (c > 0) * presence[:, None]
    got = PROCESS(sharded(samplings), token_counts(prompts, generated), logits)
    # Three rounding errors of numbers below 32, half of 2^-19 each, and those of the two penalties.
    np.testing.assert_allclose(got, expected, rtol=0, atol=4 * 2**-20)


def test_the_repetition_penalty_comes_before_the_presence_penalty():
    # Token 0, of the prompt and generated: -1 · 2 - 0.5. Token 1, only of the prompt: 3 / 2.
    logits = np.array([[-1, 3, 0.25, -4, 2]], np.float32)
    rows = sharded([Sampling(repetition_penalty=2, presence_penalty=0.5)])
    got = PROCESS(rows, token_counts([[0, 1]], [[0, 4]], 5), logits)
    assert got.tolist() == [[-2.5, 1.5, 0.25, -4, 0.5]]


@pytest.mark.parametrize(
    ("sampling", "shares"),
    [
        (Sampling(temperature=1), SHARES),
        (Sampling(temperature=2), np.sqrt(SHARES)),
        (Sampling(temperature=1, top_k=3, top_p=0.99), SHARES * [1, 1, 1, 0, 0]),
        (Sampling(temperature=0.5, min_p=0.1), SHARES**2 * [1, 1, 1, 0, 0]),
    ],
)
def test_draws_follow_the_distribution(sampling, shares):
    n = 20_000
    share = np.bincount(draw(sampling, LOGITS[0], n), minlength=5) / n
    expected = shares / shares.sum()
    # Five standard deviations of a binomial share; 0 where the expected share is 0.
    bound = 5 * np.sqrt(expected * (1 - expected) / n)
    assert (np.abs(share - expected) <= bound).all()


def test_a_row_draws_the_same_token_alone_and_in_a_batch():
    rows = 24
    samplings, logits = settings(rows, seed=7), random_logits(rows, seed=8)
    samplings[::5] = [Sampling()] * len(samplings[::5])
    counts = token_counts(*contexts(rows, seed=9))
    all_keys = keys(rows)
    in_batch = SAMPLE(sharded(samplings), counts, logits, all_keys).tolist()
    alone = [
        SAMPLE(
            sharded(samplings[i : i + 1]),
            TokenCounts(*(array[i : i + 1] for array in counts)),
            logits[i : i + 1],
            all_keys[i : i + 1],
        ).tolist()[0]
        for i in range(rows)
    ]
    assert in_batch == alone
    assert len(set(in_batch)) > rows // 2  # not all the same token


def test_other_settings_compile_no_new_program():
    traced = []

    @jax.jit
    def counting(*arguments):
        traced.append(1)
        return sample(*arguments)

    for seed in (0, 1):
        counting(sharded(settings(2, seed)), None, LOGITS, keys(2))
    assert len(traced) == 1


def test_logprobs_are_those_of_the_raw_logits():
    rows = 8
    logits = random_logits(rows, seed=10)
    tokens = np.random.default_rng(11).integers(0, V, rows)
    exact = logits.astype(np.float64)
    exact = exact - np.log(np.exp(exact).sum(axis=1, keepdims=True))
    chosen, top, top_tokens = LOGPROBS(logits, tokens, 5)
    # Numbers below 32, with the rounding errors of log-sum-exp and of the difference.
    bound = {"rtol": 0, "atol": 4 * 2**-20}
    np.testing.assert_allclose(chosen, exact[np.arange(rows), tokens], **bound)
    best = np.argsort(-logits, axis=1)[:, :5]
    assert top_tokens.tolist() == best.tolist()
    np.testing.assert_allclose(top, np.take_along_axis(exact, best, axis=1), **bound)
    assert (top.dtype, top_tokens.dtype) == (jnp.float32, jnp.int32)
    assert [part.shape for part in LOGPROBS(logits, tokens, 0)] == [(rows,), (rows, 0), (rows, 0)]


@pytest.mark.parametrize("mesh", [(1, 1, 8), (2, 2, 2)])
def test_a_sharded_vocabulary_gives_the_same_results(mesh):
    rows = 8
    samplings, logits = settings(rows, seed=12), random_logits(rows, seed=13)
    samplings[3] = Sampling(repetition_penalty=1.3)
    prompts, generated = contexts(rows, seed=14)

    @jax.jit
    def decode_three(rows, counts, logits_BV, keys_B):
        """Draws three tokens in a loop and counts each, as `decode` does."""

        def step(carry):
            i, counts, generated = carry
            step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys_B, i)
            drawn = sample(rows, counts, logits_BV, step_keys)
            generated_BV = counts.generated_BV + (jnp.arange(V) == drawn[:, None])
            generated = jax.lax.dynamic_update_slice(generated, drawn[:, None], (0, i))
            return i + 1, TokenCounts(counts.prompt_BV, generated_BV), generated

        empty = jnp.zeros_like(counts.generated_BV[:, :3])
        generated = jax.lax.while_loop(lambda carry: carry[0] < 3, step, (0, counts, empty))[2]
        return (
            generated,
            process_logits(rows, counts, logits_BV),
            logprobs_from_logits(logits_BV, generated[:, 0], 4),
        )

    def run(mesh):
        with jax.set_mesh(mesh):
            keys_B = jax.reshard(keys(8, 3), activation_spec("B"))
            rows, counts = sharded(samplings), token_counts(prompts, generated)
            results = decode_three(rows, counts, shard_array(logits, "BV"), keys_B)
            return [np.asarray(x) for x in jax.tree.leaves(results)]

    sharded_tokens, *sharded_results = run(mesh_of(mesh))
    tokens, *results = run(one_device_mesh())
    assert sharded_tokens.tolist() == tokens.tolist()
    for ours, theirs in zip(sharded_results, results, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=4 * 2**-20)
