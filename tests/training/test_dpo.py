"""DPO against a textbook in float64 and transformers; equal packed, split and on every mesh."""

import functools
import math
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import textbook
import tokenizers
from conftest import load_reference, mesh_of, peer, tiny_config
from test_gradients import (
    BOUND,
    CHECKPOINTS,
    DATA_FSDP_TENSOR,
    FSDP_CONTEXT,
    ONE,
    assert_close,
    case_id,
    leaves,
    random_model,
    small_model,
)
from test_lora_gradients import base_model, trained_pairs

from llama_jax.config.lora import LoraConfig
from llama_jax.config.run import Config
from llama_jax.data.windows import Batch
from llama_jax.model.lora import low_rank_dims, merge
from llama_jax.model.quantize import MATRIX_DIMS
from llama_jax.parallel.mesh import one_device_mesh, shard_array
from llama_jax.training import loss as loss_module
from llama_jax.training.dpo import preference_means
from llama_jax.training.step import eval_step, gradients

B, T, V = 8, 40, 160
BETA = 0.3


def preference_rows(rows: int = B, length: int = T, vocabulary: int = V) -> Batch:
    """Returns rows [B, T] of one to three random preferences; half of the rows have padding.

    Both answers to a prompt end with token 2. The prompt and the padding have no loss.
    """
    rng = np.random.default_rng(3)
    tokens = rng.integers(3, vocabulary, (rows, length)).astype(np.int32)
    targets = np.full((rows, length), -1, np.int32)
    segments, positions = np.zeros((2, rows, length), np.int32)
    for row in range(rows):
        n = 2 * (1 + row % 3)
        sizes = rng.integers(3, length // n + 1, n)
        sizes[-1] += (length - sizes.sum()) * (row % 2)
        starts = np.cumsum([0, *sizes])
        for segment, size in enumerate([*sizes, length - sizes.sum()]):
            start, end = starts[segment], starts[segment] + size
            segments[row, start:end] = segment + 1
            positions[row, start:end] = np.arange(size)
            if segment < n:
                chosen = segment - segment % 2
                prompt = min(sizes[chosen : chosen + 2]) // 3
                tokens[row, start : start + prompt] = tokens[row, starts[chosen] :][:prompt]
                tokens[row, end - 1] = 2
                targets[row, start + prompt - 1 : end - 1] = tokens[row, start + prompt : end]
    return Batch(tokens, targets, positions, segments)


ROWS = preference_rows()


def dpo_config(model: Any = None, **training: Any) -> Config:
    settings = {"objective": "dpo", "init_from": "nowhere", "dpo_beta": BETA} | training
    return tiny_config(model or small_model(), **settings)


def random_pair(config: Any) -> tuple[Any, Any]:
    """Returns a random model and a reference from which it differs by a hundredth."""
    model = random_model(config)
    rng = np.random.default_rng(5)

    def move(weight: jax.Array) -> jax.Array:
        noise = 0.01 * rng.standard_normal(weight.shape, np.float32)
        return weight + jax.device_put(noise, weight.sharding)

    return model, jax.tree.map(move, model)


def shard_rows(rows: Batch, micro_batches: int = 1) -> Batch:
    shape = micro_batches, len(rows.tokens) // micro_batches, rows.tokens.shape[1]
    return Batch(*(shard_array(field.reshape(shape), "ABT") for field in rows))


@functools.cache
def gradient_program(config: Config) -> Any:
    """Returns the compiled gradient of the training code."""
    return jax.jit(functools.partial(gradients, config))


def dpo_gradient(config: Config, model: Any, reference: Any, batch: Batch):
    """Returns the gradient by leaf, and loss, rewards of chosen and rejected, margin, accuracy."""
    grads, loss, targets, preferences, rows = gradient_program(config)(model, batch, reference)
    assert int(targets) == np.sum(np.asarray(batch.targets) >= 0)
    assert rows is None
    assert int(preferences.preferences) == np.sum(np.max(batch.segments, axis=-1) // 2)
    return leaves(grads), [float(x) for x in (loss, *preferences[:-1])]


@functools.cache
def expected(tied: bool, sft_weight: float):
    """Loss, rewards and gradient of the textbook in float64."""
    with jax.set_mesh(one_device_mesh()):
        model, reference = map(leaves, random_pair(small_model(tied_head=tied)))
    with jax.enable_x64(True):
        program = functools.partial(
            textbook.dpo_and_gradient, batch=ROWS, beta=BETA, sft_weight=sft_weight
        )
        result = jax.jit(program)(model, reference)
        loss, rewards, grads = jax.tree.map(np.asarray, result)
    return float(loss), rewards, grads


class Case(NamedTuple):
    """Settings of one gradient."""

    mesh: tuple[int, ...]  # data, fsdp, tensor, context
    micro_batches: int
    tied: bool
    sft_weight: float
    chunk: int  # of the head's loss [tokens]


CASES = [
    Case(ONE, 1, False, 0.0, 64),
    Case(ONE, 4, True, 0.5, 16),
    Case(DATA_FSDP_TENSOR, 2, True, 0.5, 16),
    Case(FSDP_CONTEXT, 1, False, 0.0, 4),
]


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_loss_rewards_and_gradient_are_those_of_the_textbook(case, monkeypatch):
    loss, rewards, grads = expected(case.tied, case.sft_weight)
    data, fsdp, tensor, _ = case.mesh
    rows = B // case.micro_batches // (data * fsdp)
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 4 * rows * V // tensor * case.chunk)
    config = dpo_config(
        small_model(tied_head=case.tied),
        micro_batches=case.micro_batches,
        dpo_sft_weight=case.sft_weight,
    )
    with jax.set_mesh(mesh_of(case.mesh)):
        model, reference = random_pair(config.model)
        batch = shard_rows(ROWS, case.micro_batches)
        found, metrics = dpo_gradient(config, model, reference, batch)
    assert_close(found, grads)
    chosen, rejected = rewards.mean(axis=0)
    accuracy = np.mean(rewards[:, 0] > rewards[:, 1])
    assert 0 < accuracy < 1
    # A reward sums up to 15 differences of log-probabilities, which round at 2^-22 (5 nats).
    assert metrics == pytest.approx([loss, chosen, rejected, chosen - rejected, accuracy], abs=4e-6)


def answers_of(rows: Batch) -> list[Batch]:
    """Returns each answer of each row, in order, as a Batch of arrays [tokens of the answer]."""
    return [
        Batch(*(field[row][rows.segments[row] == segment] for field in rows))
        for row in range(len(rows.tokens))
        for segment in range(1, 2 * (rows.segments[row].max() // 2) + 1)
    ]


def unpack(rows: Batch) -> Batch:
    """Returns a row for each pair, and empty rows up to a multiple of 8, as in validation."""
    answers = answers_of(rows)
    n = len(answers) // 2
    shape = -(-n // 8) * 8, rows.tokens.shape[1]
    tokens, positions, segments = np.zeros((3, *shape), np.int32)
    unpacked = Batch(tokens, np.full(shape, -1, np.int32), positions, segments)
    for i, (chosen, rejected) in enumerate(zip(answers[::2], answers[1::2], strict=True)):
        middle, end = len(chosen.tokens), len(chosen.tokens) + len(rejected.tokens)
        for field, a, b in zip(unpacked, chosen, rejected, strict=True):
            field[i, :end] = np.concatenate([a, b])
        segments[i] = np.repeat([1, 2, 3], [middle, end - middle, shape[1] - end])
    return unpacked


def test_the_gradient_of_low_rank_pairs_is_that_of_the_merged_weights():
    """With W + sAB in place of W: dA = s dW Bᵀ and dB = s Aᵀ dW; the reference has no pairs."""
    full = dpo_config()
    config = replace(full, lora=LoraConfig(rank=4, alpha=6.0))
    with jax.set_mesh(one_device_mesh()):
        base, adapters = random_model(full.model), trained_pairs(config)
        merged = merge(config.lora, base, adapters)
        grads, expected_metrics = dpo_gradient(full, merged, base, shard_rows(ROWS))
        pairs = leaves(adapters)
    expected = {}
    for name, dims in MATRIX_DIMS.items():
        (a_dims, b_dims), matrix = low_rank_dims(dims), f"layers.{name}"
        for side, other, equation in (
            ("a", "b", f"L{dims},L{b_dims}->L{a_dims}"),
            ("b", "a", f"L{dims},L{a_dims}->L{b_dims}"),
        ):
            product = np.einsum(equation, grads[matrix], pairs[f"{matrix}.{other}"])
            expected[f"{matrix}.{side}"] = config.lora.scale * product
    with jax.set_mesh(mesh_of(FSDP_CONTEXT)):
        found, metrics = dpo_gradient(
            config, trained_pairs(config), base_model(config), shard_rows(ROWS)
        )
    assert_close(found, expected, 2 * BOUND)  # both are computed in float32
    assert metrics == pytest.approx(expected_metrics, abs=4e-6)


def test_packed_pairs_have_the_loss_and_gradient_of_each_pair_alone(one_device):
    config = dpo_config()
    pair = random_pair(config.model)
    packed, metrics = dpo_gradient(config, *pair, shard_rows(ROWS))
    alone, metrics_alone = dpo_gradient(config, *pair, shard_rows(unpack(ROWS)))
    assert_close(packed, alone, 1e-5)
    assert metrics == pytest.approx(metrics_alone, rel=1e-5)


def test_the_loss_of_the_reference_itself_is_log_2(one_device):
    config = dpo_config()
    model = random_model(config.model)
    _, metrics = dpo_gradient(config, model, model, shard_rows(ROWS))
    assert metrics[0] == pytest.approx(math.log(2), rel=2**-23)
    assert metrics[1:4] == pytest.approx([0, 0, 0], abs=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(("meta", "huggingface"), CHECKPOINTS)
def test_loss_and_rewards_of_a_converted_checkpoint_are_those_of_trl(
    shared_data, tmp_path, meta, huggingface
):
    torch, transformers, trl, datasets = map(peer, ("torch", "transformers", "trl", "datasets"))
    theirs, reference = (
        transformers.AutoModelForCausalLM.from_pretrained(
            shared_data / huggingface, dtype=torch.float32
        )
        for _ in range(2)
    )
    reference.model.norm.weight.data *= 1.01
    vocabulary = theirs.config.vocab_size
    rows = preference_rows(8, 64, vocabulary)
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({f"<{i}>": i for i in range(vocabulary)}, "<0>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()

    def text(tokens: np.ndarray) -> str:
        return "".join(f" <{token}>" for token in tokens)

    data = []
    answers = answers_of(rows)
    for chosen, rejected in zip(answers[::2], answers[1::2], strict=True):
        prompt = np.flatnonzero(chosen.targets >= 0)[0] + 1
        data.append({"prompt": text(chosen.tokens[:prompt])})
        data[-1] |= {"chosen": text(chosen.tokens[prompt:])}
        data[-1] |= {"rejected": text(rejected.tokens[prompt:])}
    settings = {"beta": BETA, "per_device_eval_batch_size": len(data), "use_cpu": True}
    settings |= {"bf16": False, "report_to": "none", "disable_tqdm": True}
    trainer = trl.DPOTrainer(
        theirs,
        reference,
        trl.DPOConfig(str(tmp_path), **settings),
        train_dataset=datasets.Dataset.from_list(data),
        processing_class=transformers.PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<0>", eos_token="<2>"
        ),
    )
    expected = trainer.evaluate(trainer.train_dataset)
    with jax.set_mesh(one_device_mesh()):
        model_config, model = load_reference(shared_data / meta)
        reference = jax.tree.map(lambda weight: weight, model)
        reference.norm[...] = reference.norm[...] * 1.01
        config = dpo_config(model_config)
        loss, found = preference_means(
            config, eval_step(config, model, shard_rows(rows), reference)
        )
    assert float(found.preferences) == len(data)
    assert [float(x) for x in (loss, *found[:-1])] == pytest.approx(
        [
            expected[f"eval_{name}"]
            for name in (
                "loss",
                "rewards/chosen",
                "rewards/rejected",
                "rewards/margins",
                "rewards/accuracies",
            )
        ],
        abs=1e-5,
    )
