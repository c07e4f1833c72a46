"""The server with the real engine and a trained model."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import jax
import numpy as np
import openai
import pytest
from conftest import load_reference, peer
from fake_engine import serving
from prometheus_client.parser import text_string_to_metric_families

from llama_jax.inference.engine.engine import Engine
from llama_jax.model.weights import unstack_layers
from llama_jax.parallel.mesh import one_device_mesh
from llama_jax.tokenizer.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def served(shared_data):
    folder = shared_data / "stories260K" / "hf"
    with jax.set_mesh(one_device_mesh()):
        config, model = load_reference(folder)
        engine = Engine(config, unstack_layers(model), rows=3, context=256)
    with serving(load_tokenizer(folder), engine, max_tokens=250) as (_, url):
        yield url
    engine.close()


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_greedy_story_equals_the_reference(client, shared_data):
    expected = (shared_data / "stories260K" / "greedy_200_expected.txt").read_text()
    completion = client.completions.create(
        model="stories", prompt="", max_tokens=200, temperature=0, extra_body={"ignore_eos": True}
    )
    assert completion.choices[0].text == expected
    assert completion.usage.completion_tokens == 200


def test_log_probabilities_of_continuations_equal_those_of_transformers(client, shared_data):
    """As lm-eval 0.4.13 requests them, with `is_greedy` (openai_completions.py, huggingface.py)."""
    torch, transformers = peer("torch"), peer("transformers")
    folder = shared_data / "stories260K"
    reference_model = transformers.LlamaForCausalLM.from_pretrained(
        folder / "hf", dtype=torch.float32
    )

    def logprobs(rows):
        padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in rows], True)
        with torch.no_grad():
            return reference_model(padded).logits.double().log_softmax(-1)

    text = np.load(folder / "stories260K_reference.npz")["text_ids"].tolist()
    contexts = [[1, *text[i : i + 5 + i % 30]] for i in range(80)]
    likely = [list(context) for context in contexts]
    for _ in range(5):
        for ids, logprobs_TV in zip(likely, logprobs(likely), strict=True):
            ids.append(int(logprobs_TV[len(ids) - 1].argmax()))
    # 1 to 5 tokens: greedy ones in every other request, otherwise unrelated ones.
    pairs = [
        (context, ids[: len(context) + 1 + i % 5] if i % 2 else context + text[i : i + 1 + i % 5])
        for i, (context, ids) in enumerate(zip(contexts, likely, strict=True))
    ]
    agree = greedy = 0
    for (context, ids), logprobs_TV in zip(pairs, logprobs([ids for _, ids in pairs]), strict=True):
        positions = range(len(context) - 1, len(ids) - 1)
        expected = sum(float(logprobs_TV[p, ids[p + 1]]) for p in positions)
        is_greedy = all(int(logprobs_TV[p].argmax()) == ids[p + 1] for p in positions)
        scores = client.completions.create(
            model="stories", prompt=ids, max_tokens=1, temperature=0, logprobs=1, echo=True
        ).choices[0].logprobs  # fmt: skip
        new = slice(len(context), -1)
        returned = list(zip(scores.token_logprobs[new], scores.top_logprobs[new], strict=True))
        assert len(returned) == len(positions) > 0
        assert sum(logprob for logprob, _ in returned) == pytest.approx(expected, abs=2e-4)
        agree += is_greedy == all(logprob == max(top.values()) for logprob, top in returned)
        greedy += is_greedy
    assert agree == 80
    assert 40 <= greedy < 70


def metrics(served):
    """Returns the server's metrics without labels, by name."""
    return {
        s.name: s.value
        for family in text_string_to_metric_families(httpx.get(f"{served}/metrics").text)
        for s in family.samples
        if s.name.startswith("llama_jax") and not s.labels
    }


def test_concurrent_requests_get_the_same_text_as_alone(client, served):
    def generate(i):
        completion = client.completions.create(
            model="stories", prompt="Once upon a time" * (i % 3 + 1), max_tokens=10 + i,
            temperature=i % 2, seed=i, logprobs=2,
        )  # fmt: skip
        return completion.choices[0].text, completion.choices[0].logprobs.tokens

    before = metrics(served)
    alone = [generate(i) for i in range(12)]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(generate, range(12))) == alone
    samples = metrics(served)
    assert samples["llama_jax_running"] == samples["llama_jax_waiting"] == 0
    # Common prefixes are prefilled once; at least one token of each prompt is always prefilled.
    reused, prefilled = (
        samples[name] - before[name]
        for name in ("llama_jax_reused_tokens_total", "llama_jax_prompt_tokens_total")
    )
    assert reused > prefilled
    assert samples["llama_jax_bytes_read_total"] > samples["llama_jax_decode_steps_total"] * 1e6
    bandwidth = samples["llama_jax_bytes_read_total"] / samples["llama_jax_decode_seconds_total"]
    share = bandwidth / samples["llama_jax_copy_bandwidth_bytes_per_second"]
    assert samples["llama_jax_bandwidth_share"] == pytest.approx(share)
