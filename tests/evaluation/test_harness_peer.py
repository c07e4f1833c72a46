"""The answers of `HarnessModel` are those of lm-eval's own `hf` model on the same weights."""

import jax
import numpy as np
import pytest
from conftest import load_reference, peer
from eval_data import rows, write_task_data

from llama_jax.convert.convert import convert
from llama_jax.evaluation.answers import Answers
from llama_jax.evaluation.evaluate import evaluate
from llama_jax.evaluation.jobs import Evaluated
from llama_jax.parallel.mesh import one_device_mesh
from llama_jax.tokenizer.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow
TEXT = "Once upon a time, there was a little girl named Lily. She loved to play in the park. "


@pytest.fixture(scope="module")
def models(shared_data, tmp_path_factory):
    """Our model on the weights of stories260K, and lm-eval's `hf` on their export."""
    for package in ("lm_eval", "torch", "transformers"):
        peer(package)
    from lm_eval.models.huggingface import HFLM

    from llama_jax.evaluation.harness import HarnessModel

    source = shared_data / "stories260K" / "meta"
    exported = tmp_path_factory.mktemp("exported")
    convert(source, exported / "model", progress=False)
    convert(exported / "model", exported / "hf", to="hf", progress=False)
    with jax.set_mesh(one_device_mesh()):
        config, model = load_reference(source)
        evaluated = Evaluated(config, model, load_tokenizer(exported / "model"))
        theirs = HFLM(
            str(exported / "hf"), device="cpu", dtype="float32", batch_size=8,
            max_length=config.context,
        )  # fmt: skip
        yield HarnessModel(evaluated, Answers(), shown=False), theirs


def instances(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, i, ("task", i, 1)) for i, args in enumerate(arguments)]


def ask(model, kind, arguments):
    return getattr(model, kind)(instances(kind, arguments), disable_tqdm=True)


def ask_ours(model, kind, arguments):
    return getattr(model, kind)(instances(kind, arguments))


def test_loglikelihoods_are_those_of_hf(models, shared_data):
    ours, theirs = models
    pairs = [
        (f"Question: {row['question']}\nAnswer:", f" {choice}")
        for row in rows(shared_data, "arc_easy_validation_sample")
        for choice in row["choices"]["text"]
    ]
    pairs += [
        (TEXT.strip(), " She"), (TEXT, "She was"), (f"{TEXT} \n ", "She"), ("", "Once upon"),
        ("", " Once"), (TEXT * 30, "She had a big red ball."), ("Lily", ","),
        pairs[0],
    ]  # fmt: skip
    found, expected = ask_ours(ours, "loglikelihood", pairs), ask(theirs, "loglikelihood", pairs)
    totals, greedy = zip(*found, strict=True)
    np.testing.assert_allclose(totals, [total for total, _ in expected], rtol=0, atol=1e-4)
    assert list(greedy) == [likeliest for _, likeliest in expected]
    assert any(greedy)
    # A context that has the begin token gets no second one.
    assert ask_ours(ours, "loglikelihood", [("<s>Lily", ",")]) == [found[-2]]


def test_loglikelihoods_of_texts_longer_than_the_context_are_those_of_hf(models):
    ours, theirs = models
    texts = [("Lily",), (TEXT,), (TEXT * 20,), (TEXT * 33 + "The end.",)]
    found, expected = (
        ask_ours(ours, "loglikelihood_rolling", texts),
        ask(theirs, "loglikelihood_rolling", texts),
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * 20)  # of hundreds of tokens


def test_generated_answers_are_those_of_hf(models, shared_data):
    ours, theirs = models
    questions = [row["question"] for row in rows(shared_data, "gsm8k_train_sample")[:8]]
    contexts = [f"Question: {question}\nAnswer:" for question in questions]
    contexts += [TEXT, "The dog"]
    settings = {"until": ["\n\n", "Lily", "."], "max_gen_toks": 40, "do_sample": False}
    long = settings | {"until": [], "max_gen_toks": 70, "temperature": 0.0}
    requests = [(context, settings) for context in contexts] + [(TEXT, long), ("One day", long)]
    found = ask_ours(ours, "generate_until", requests)
    assert found == ask(theirs, "generate_until", requests)
    assert len({*found}) > 7


def test_accuracies_are_those_of_hf_item_by_item(models, shared_data, tmp_path):
    from lm_eval import evaluator

    from llama_jax.evaluation.tasks import load_tasks

    ours, theirs = models
    data = write_task_data(shared_data, tmp_path / "data")
    tasks = load_tasks(["arc_easy"], data, 2)
    evaluated, answers = ours._evaluated, Answers()
    found = evaluate(*evaluated, tasks, limit=24, answers=answers, shown=False)
    expected = evaluator.evaluate(theirs, load_tasks(["arc_easy"], data, 2), limit=24)
    assert found
    assert expected
    samples = sorted(expected["samples"]["arc_easy"], key=lambda sample: sample["doc_id"])
    assert [item["metrics"] for item in found.items["arc_easy"]] == [
        {name: sample[name] for name in ("acc", "acc_norm")} for sample in samples
    ]
    metrics = found.results["tasks"]["arc_easy"]["metrics"]
    for name in ("acc", "acc_norm"):
        assert metrics[name] == {
            "value": expected["results"]["arc_easy"][f"{name},none"],
            "stderr": expected["results"]["arc_easy"][f"{name}_stderr,none"],
        }
    again = evaluate(*evaluated, tasks, limit=24, answers=answers, shown=False)
    assert again == found  # the same examples are drawn for the prompts
