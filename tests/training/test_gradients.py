"""Gradients and updates of training against a textbook in float64, transformers and PyTorch."""

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import textbook
from conftest import load_reference, mesh_of, peer, tiny_config, tiny_model

from llama_jax.checkpoint.tree import abstract_model
from llama_jax.config.model import ModelConfig
from llama_jax.config.run import Config
from llama_jax.data.windows import Batch
from llama_jax.model import attention_xla
from llama_jax.model.summary import path_names
from llama_jax.model.weights import Llama
from llama_jax.parallel.mesh import one_device_mesh, shard_array
from llama_jax.training import loss as loss_module
from llama_jax.training.optimizer import adamw
from llama_jax.training.step import gradients, train_step

# Largest error of a gradient, relative to the largest entry of its leaf. The textbook in float32
# has an error of 1e-6 to 2e-6 (16 to 32 roundings of 2^-24; a test below asserts 2.5e-6). The
# program rounds as often, but sums in another order and recomputes: the bound is twice the
# textbook's. Measured: 1.5e-6 in the table, 3.5e-6 against transformers, whose norms are float32
# too. The smallest term that a mistake could omit, that of z-loss, is 1e-2 of a gradient.
BOUND = 5e-6

B, T, V = 16, 40, 160
ONE, DATA_FSDP_TENSOR, FSDP_CONTEXT = (1, 1, 1, 1), (2, 2, 2, 1), (1, 2, 1, 4)


class Case(NamedTuple):
    """Settings of one gradient."""

    remat: str
    mesh: tuple[int, ...]  # data, fsdp, tensor, context
    micro_batches: int
    scan: bool
    kv_heads: int  # of 4 heads
    tied: bool
    packed: bool
    z_loss: float
    chunked: bool  # the loss and the queries of attention in several chunks, the last one shorter

    @property
    def config(self) -> Config:
        model = small_model(
            remat=self.remat, scan=self.scan, n_kv_heads=self.kv_heads, tied_head=self.tied
        )
        return tiny_config(model, micro_batches=self.micro_batches, z_loss=self.z_loss)


# A test below asserts that each pair of settings occurs. For pairs with a remat policy, the two
# meshes of eight devices count as one.
CASES = [
    Case("none", ONE, 4, False, 4, False, True, 1e-3, False),
    Case("products", ONE, 4, True, 2, True, False, 1e-3, False),
    Case("projections", ONE, 4, False, 2, False, True, 1e-3, True),
    Case("attention", ONE, 1, True, 4, True, False, 0.0, False),
    Case("full", ONE, 4, True, 2, False, True, 0.0, False),
    Case("none", DATA_FSDP_TENSOR, 1, True, 2, True, False, 0.0, True),
    Case("products", DATA_FSDP_TENSOR, 1, False, 4, False, True, 0.0, True),
    Case("full", DATA_FSDP_TENSOR, 1, False, 4, True, True, 1e-3, True),
    Case("full", DATA_FSDP_TENSOR, 4, False, 4, False, False, 0.0, False),
    Case("projections", FSDP_CONTEXT, 1, True, 4, True, False, 0.0, False),
    Case("attention", FSDP_CONTEXT, 4, False, 2, False, True, 1e-3, True),
]


def case_id(settings: tuple[Any, ...]) -> str:
    """Returns the id of a test: 'full-1-2-1-4-False-…'."""
    return "-".join(case_id(part) if isinstance(part, tuple) else str(part) for part in settings)


def small_model(**changes: Any) -> ModelConfig:
    shape = {"n_heads": 4, "n_kv_heads": 2, "hidden_dim": 48, "vocab_size": V}
    return tiny_model(**(shape | changes))


def leaves(model: Any, dtype: Any = np.float64) -> dict[str, np.ndarray]:
    """Returns weights or gradients by dotted name."""
    by_path = jax.tree.leaves_with_path(model)
    return {".".join(path_names(path)): np.asarray(leaf, dtype) for path, leaf in by_path}


def random_model(config: ModelConfig) -> Llama:
    """Returns random weights on the current mesh; the scales of the norms differ from 1."""
    rng = np.random.default_rng(1)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        numbers = rng.standard_normal(leaf.shape, np.float32)
        is_norm = "norm" in path_names(path)[-1]
        numbers = 1 + 0.3 * numbers if is_norm else numbers * config.dim**-0.5
        return jax.device_put(numbers, leaf.sharding)

    return jax.tree.map_with_path(draw, abstract_model(config))


def random_batch(packed: bool, rows: int = B, length: int = T, vocabulary: int = V) -> Batch:
    """Returns rows [B, T]. The first third has few targets, so that micro-batches differ."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocabulary, (rows, length + 1)).astype(np.int32)
    targets = np.where(rng.random((rows, length)) < 0.1, -1, tokens[:, 1:])
    targets[: rows // 3, 5:] = -1
    segments = np.ones((rows, length), np.int32)
    if packed:
        segments += np.cumsum(rng.random((rows, length)) < 0.15, axis=1, dtype=np.int32)
    starts = np.diff(segments, axis=1, prepend=0) > 0
    columns = np.broadcast_to(np.arange(length, dtype=np.int32), segments.shape)
    positions = columns - np.maximum.accumulate(np.where(starts, columns, 0), axis=1)
    return Batch(tokens[:, :-1], targets.astype(np.int32), positions, segments)


def shard_batch(batch: Batch, micro_batches: int, packed: bool) -> Batch:
    rows, length = batch.tokens.shape
    shape = micro_batches, rows // micro_batches, length
    batch = Batch(*(shard_array(field.reshape(shape), "ABT") for field in batch))
    return batch if packed else batch._replace(segments=None)


def trained_gradient(config: Config, model: Llama, batch: Batch):
    """Compiles the training code; returns its gradient by leaf, and its loss."""
    program = jax.jit(lambda model, batch: gradients(config, model, batch))
    grads, loss, targets, _, rows = program(model, batch)
    counts = np.sum(np.asarray(batch.targets) >= 0, axis=-1)
    np.testing.assert_array_equal(rows.targets, counts)
    mean = np.asarray(rows.nll, np.float64).sum() / int(targets)
    assert (int(targets), mean) == (counts.sum(), pytest.approx(float(loss), rel=1e-6))
    return leaves(grads), float(loss)


@functools.cache
def textbook_program() -> Callable[..., Any]:
    return jax.jit(textbook.loss_and_gradient)


def textbook_gradient(weights: dict[str, np.ndarray], batch: Batch, z_loss: float):
    """Returns the gradient by leaf and the loss of the textbook, in the dtype of the weights."""
    with jax.enable_x64(weights["norm"].dtype == np.float64):
        loss, grads = textbook_program()(weights, *batch, weights["norm"].dtype.type(z_loss))
        return {name: np.asarray(grad) for name, grad in grads.items()}, float(loss)


@functools.cache
def expected_gradient(kv_heads: int, tied: bool, packed: bool, z_loss: float):
    with jax.set_mesh(one_device_mesh()):
        model = random_model(small_model(n_kv_heads=kv_heads, tied_head=tied))
    return textbook_gradient(leaves(model), random_batch(packed), z_loss)


def errors(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> dict[str, float]:
    """Returns the largest error of each leaf over its largest entry, largest first."""
    assert found.keys() == expected.keys()
    relative = {
        name: float(np.abs(found[name] - exact).max() / np.abs(exact).max())
        for name, exact in expected.items()
    }
    return dict(sorted(relative.items(), key=lambda item: -item[1]))


def assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], bound=BOUND):
    failed = {name: error for name, error in errors(found, expected).items() if not error <= bound}
    assert failed == {}


def test_the_table_contains_each_pair_of_settings():
    columns = [
        {"none", "products", "projections", "attention", "full"},  # all but offload
        {ONE, DATA_FSDP_TENSOR, FSDP_CONTEXT},
        *(set(column) for column in list(zip(*CASES, strict=True))[2:]),
    ]
    assert all(len(column) == 2 for column in columns[2:])
    for a, b in list(itertools.combinations(range(len(columns)), 2))[1:]:
        pairs = {(case[a], case[b]) for case in CASES}
        assert pairs == set(itertools.product(columns[a], columns[b]))
    policies = {(case.remat, case.mesh == ONE) for case in CASES}
    assert policies == set(itertools.product(columns[0], (True, False)))


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_the_gradient_is_that_of_the_textbook_in_float64(case, monkeypatch):
    expected, loss = expected_gradient(case.kv_heads, case.tied, case.packed, case.z_loss)
    if case.chunked:
        data, fsdp, tensor, context = case.mesh
        length, rows = T // context, B // case.micro_batches // (data * fsdp)
        chunk = 2 * length // 5  # 16 of 40, 4 of 10: two full chunks and half of one
        monkeypatch.setattr(loss_module, "CHUNK_BYTES", 4 * rows * V // tensor * chunk)
        monkeypatch.setattr(attention_xla, "QUERY_BLOCK", chunk)
    with jax.set_mesh(mesh_of(case.mesh)):
        model = random_model(case.config.model)
        batch = shard_batch(random_batch(case.packed), case.micro_batches, case.packed)
        grads, found = trained_gradient(case.config, model, batch)
    assert_close(grads, expected)
    assert found == pytest.approx(loss, rel=1e-6)


def test_the_bound_is_twice_the_float32_error_of_the_textbook():
    with jax.set_mesh(one_device_mesh()):
        model = random_model(small_model(tied_head=True))
    single, _ = textbook_gradient(leaves(model, np.float32), random_batch(True), 1e-3)
    double, _ = expected_gradient(2, True, True, 1e-3)
    assert single["norm"].dtype == np.float32
    assert double["norm"].dtype == np.float64
    assert_close(single, double, BOUND / 2)


def test_the_gradient_of_llama_3s_vocabulary_in_chunks(monkeypatch):
    """A tied head of 128,256 tokens: the embedding's gradient is the sum over both of its uses."""
    config = tiny_config(small_model(vocab_size=128_256, tied_head=True, n_layers=1), z_loss=1e-3)
    batch = random_batch(True, 2, 12, 128_256)
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 4 * 2 * 128_256 * 8)  # 8 and 4 positions
    with jax.set_mesh(one_device_mesh()):
        model = random_model(config.model)
        grads, _ = trained_gradient(config, model, shard_batch(batch, 1, packed=True))
    assert_close(grads, textbook_gradient(leaves(model), batch, 1e-3)[0])


# Meta's checkpoints, and the same weights for transformers: scaled RoPE; a trained tied head.
CHECKPOINTS = [
    ("meta_reference/llama31_scaled/mp1", "meta_reference/llama31_scaled/hf"),
    ("stories260K/meta", "stories260K/hf"),
]


def transformers_gradient(folder: Any, batch: Batch) -> dict[str, np.ndarray]:
    """Returns the gradient of transformers' model in float64, with our names and axes.

    It supports no packed batches. Its weights are [out, in], with all heads in one dimension.
    """
    torch, transformers = peer("torch"), peer("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    logits = model(torch.tensor(batch.tokens).long()).logits.double()
    targets = torch.tensor(batch.targets).long()
    # Not cross_entropy: PyTorch's log_softmax on the CPU loses digits at large vocabularies.
    chosen = logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    nll = (torch.logsumexp(logits, -1) - chosen)[targets >= 0].mean()
    nll.backward()
    grads = {name: weight.grad.numpy() for name, weight in model.named_parameters()}
    c = model.config
    N, K, D, H = c.num_attention_heads, c.num_key_value_heads, c.hidden_size, c.head_dim

    def layers(name: str, *shape: int) -> np.ndarray:
        parts = [grads[f"model.layers.{i}.{name}.weight"] for i in range(c.num_hidden_layers)]
        return np.stack([part.T.reshape(shape or part.T.shape) for part in parts])

    ours = {
        "tok_embeddings": grads["model.embed_tokens.weight"],
        "layers.attention_norm": layers("input_layernorm"),
        "layers.wq": layers("self_attn.q_proj", D, N, H),
        "layers.wk": layers("self_attn.k_proj", D, K, H),
        "layers.wv": layers("self_attn.v_proj", D, K, H),
        "layers.wo": layers("self_attn.o_proj", N, H, D),
        "layers.ffn_norm": layers("post_attention_layernorm"),
        "layers.w1": layers("mlp.gate_proj"),
        "layers.w3": layers("mlp.up_proj"),
        "layers.w2": layers("mlp.down_proj"),
        "norm": grads["model.norm.weight"],
    }
    return ours if c.tie_word_embeddings else ours | {"output": grads["lm_head.weight"].T}


@pytest.mark.parametrize(("meta", "huggingface"), CHECKPOINTS)
def test_the_gradient_of_a_converted_checkpoint_is_that_of_transformers(
    shared_data, meta, huggingface
):
    with jax.set_mesh(one_device_mesh()):
        model_config, model = load_reference(shared_data / meta)
        batch = random_batch(False, 3, 24, model_config.vocab_size)
        expected = transformers_gradient(shared_data / huggingface, batch)
        batch = shard_batch(batch, 1, packed=False)
        grads, _ = trained_gradient(tiny_config(model_config), model, batch)
    assert_close(grads, expected)


STEPS, CLIP, EPS = 5, 1.2, 1e-2


def adamw_config() -> Config:
    """Returns five steps: two of warm-up, then the full cosine. The first ones are clipped."""
    config = tiny_config(small_model(), steps=STEPS, micro_batches=4, z_loss=1e-3)
    return replace(config, optimizer=replace(config.optimizer, clip_norm=CLIP, eps=EPS))


@functools.cache
def torch_steps():
    """Runs PyTorch's AdamW on the textbook's gradients in float64.

    Returns the weights after the last step; (loss, norm, rate) of each step; and each weight's
    largest error in float32. The error of a gradient is BOUND of its largest entry. AdamW's update
    m / (√v + eps) amplifies it by at most 3 / eps: m and √v change by no more than the error, and m
    is below 2 √v. Each step also rounds the weight.
    """
    torch = peer("torch")
    config = adamw_config().optimizer
    with jax.set_mesh(one_device_mesh()):
        start = leaves(random_model(small_model()))
    weights = {name: torch.tensor(weight) for name, weight in start.items()}
    decay = {name: 0.0 if "norm" in name else config.weight_decay for name in weights}
    optimizer = torch.optim.AdamW(
        [{"params": [weights[name]], "weight_decay": decay[name]} for name in weights],
        lr=config.peak_lr,
        betas=(config.b1, config.b2),
        eps=config.eps,
    )
    warmup, last = config.warmup_steps, config.peak_lr * config.final_lr_fraction
    schedules = torch.optim.lr_scheduler
    rising = schedules.LinearLR(optimizer, 1 / warmup, 1.0, total_iters=warmup - 1)
    falling = schedules.CosineAnnealingLR(optimizer, STEPS - warmup, last)
    schedule = schedules.SequentialLR(optimizer, [rising, falling], milestones=[warmup - 1])
    metrics, tolerance = [], dict.fromkeys(weights, 0.0)
    for _ in range(STEPS):
        now = {name: weight.numpy() for name, weight in weights.items()}
        grads, loss = textbook_gradient(now, random_batch(True), 1e-3)
        for name, weight in weights.items():
            weight.grad = torch.tensor(grads[name])
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), config.clip_norm)
        (rate,) = set(schedule.get_last_lr())
        metrics.append((loss, float(norm), rate))
        for name, weight in weights.items():
            tolerance[name] += rate * 3 / config.eps * BOUND * float(weight.grad.abs().max())
            tolerance[name] += 2.0**-24 * float(weight.abs().max())
        optimizer.step()
        schedule.step()
    return {name: weight.numpy() for name, weight in weights.items()}, metrics, tolerance


@pytest.mark.parametrize("mesh", [ONE, DATA_FSDP_TENSOR], ids=case_id)
def test_five_steps_are_those_of_pytorchs_adamw(mesh):
    expected, metrics, tolerance = torch_steps()
    assert metrics[0][1] > CLIP > metrics[-1][1]
    config = adamw_config()
    step = jax.jit(lambda *args: train_step(config, *args))
    found = []
    with jax.set_mesh(mesh_of(mesh)):
        model = random_model(config.model)
        state = jax.jit(adamw(config.optimizer).init)(model)
        batch = shard_batch(random_batch(True), config.training.micro_batches, packed=True)
        for number in range(STEPS):
            model, state, ours = step(model, state, batch, jnp.int32(number))
            found.append([float(ours.loss), float(ours.grad_norm), float(ours.learning_rate)])
    np.testing.assert_allclose(found, metrics, rtol=BOUND)
    error = {name: np.abs(weight - expected[name]).max() for name, weight in leaves(model).items()}
    assert {name: e for name, e in error.items() if not e <= tolerance[name]} == {}
