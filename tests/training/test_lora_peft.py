"""LoRA beside PEFT and transformers: the same weights and rows, in float32."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import peer, tiny_config
from test_gradients import (
    assert_close,
    leaves,
    random_batch,
    random_model,
    shard_batch,
    small_model,
)
from test_lora_gradients import pair_gradients, trained_pairs

from llama_jax.config.lora import LoraConfig
from llama_jax.config.run import OptimizerConfig
from llama_jax.model.lora import attach
from llama_jax.model.transformer import forward
from llama_jax.parallel.mesh import one_device_mesh
from llama_jax.training.optimizer import adamw
from llama_jax.training.step import train_step

STEPS, RATE = 20, 3e-3
MODULES = {
    "wq": "self_attn.q_proj", "wk": "self_attn.k_proj", "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj", "w1": "mlp.gate_proj", "w3": "mlp.up_proj", "w2": "mlp.down_proj",
}  # fmt: skip
# Rows without padding. Each row is one text: transformers has no packed batches.
BATCH = random_batch(False, rows=4)


def lora_config(rank_stabilized):
    optimizer = OptimizerConfig(
        schedule="wsd", warmup_steps=0, peak_lr=RATE, weight_decay=0.1, clip_norm=0.5
    )
    lora = LoraConfig(rank=4, alpha=6.0, rank_stabilized=rank_stabilized)
    config = tiny_config(small_model(), init_from="base", steps=STEPS)
    return replace(config, lora=lora, optimizer=optimizer)


def peft_model(config, base, pairs):
    """Returns PEFT's model with these weights and pairs, by our names; both have layers stacked."""
    torch, transformers, peft = peer("torch"), peer("transformers"), peer("peft")
    c = config.model
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=c.dim, num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
            num_key_value_heads=c.n_kv_heads, head_dim=c.head_dim, intermediate_size=c.hidden_dim,
            vocab_size=c.vocab_size, rms_norm_eps=c.norm_eps, attn_implementation="eager",
        )
    )  # fmt: skip
    state = {
        "model.embed_tokens.weight": base["tok_embeddings"],
        "model.norm.weight": base["norm"],
        "lm_head.weight": base["output"].T,
    }
    norms = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    for i in range(c.n_layers):
        layer = f"model.layers.{i}"
        state |= {f"{layer}.{norms[n]}.weight": base[f"layers.{n}"][i] for n in norms}
        for name, module in MODULES.items():
            w = base[f"layers.{name}"][i]
            inputs = w.shape[0] * w.shape[1] if name == "wo" else w.shape[0]
            state[f"{layer}.{module}.weight"] = w.reshape(inputs, -1).T
    model.load_state_dict({name: torch.tensor(w) for name, w in state.items()})
    lora = config.lora
    model = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, target_modules=[*MODULES.values()],
            use_rslora=lora.rank_stabilized, lora_dropout=0.0,
        ),
    )  # fmt: skip
    for (name, i, side), parameter in pair_parameters(model).items():
        ours = pairs[f"layers.{name}.{side}"][i]
        ours = ours.reshape(-1, lora.rank) if side == "a" else ours.reshape(lora.rank, -1)
        with torch.no_grad():
            parameter.copy_(torch.tensor(ours.T))
    return model


def pair_parameters(model):
    """Returns PEFT's parameters by our name of the matrix, layer and side."""
    found = {}
    names = {module.rpartition(".")[2]: name for name, module in MODULES.items()}
    for path, parameter in model.named_parameters():
        if "lora_" in path:
            parts = path.split(".")
            side = "a" if "lora_A" in parts else "b"
            layer = int(parts[parts.index("layers") + 1])
            found[names[parts[-4]], layer, side] = parameter
    return found


def to_ours(values, like):
    """Returns arrays of PEFT's pairs with our names and shapes."""
    result = {name: np.zeros(shape.shape) for name, shape in like.items()}
    for (name, i, side), array in values.items():
        target = result[f"layers.{name}.{side}"][i]
        target[...] = array.T.reshape(target.shape)
    return result


def peft_losses(torch, model):
    """Returns the loss of each target, from PEFT's model."""
    logits = model(torch.tensor(BATCH.tokens).long()).logits.double()
    targets = torch.tensor(BATCH.targets).long()
    chosen = logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return (torch.logsumexp(logits, -1) - chosen)[targets >= 0]


# PEFT asks transformers for an attribute by its old name.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is:FutureWarning")
@pytest.mark.slow
@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_losses_gradients_and_twenty_steps_are_those_of_peft(rank_stabilized):
    torch = peer("torch")
    peer("peft")
    config = lora_config(rank_stabilized)
    with jax.set_mesh(one_device_mesh()):
        base, adapters = random_model(config.model), trained_pairs(config)
        names = leaves(base, np.float32), leaves(adapters, np.float32)
        model = peft_model(config, *names)
        batch = shard_batch(BATCH, 1, packed=False)
        # The loss of each token.
        compiled = jax.jit(forward, static_argnums=0)
        logits = compiled(config.model, attach(config.lora, base, adapters), BATCH.tokens)
        logits = np.asarray(logits, np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        rows, columns = np.nonzero(BATCH.targets >= 0)
        ours = -log_p[rows, columns, BATCH.targets[rows, columns]]
        theirs = peft_losses(torch, model)
        np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=1e-5)
        # The gradients.
        theirs.mean().backward()
        found = {key: p.grad.numpy() for key, p in pair_parameters(model).items()}
        expected = to_ours(found, names[1])
        grads, loss, _ = pair_gradients(config, adapters, batch, base)
        assert_close(leaves(grads), expected)
        assert float(loss) == pytest.approx(ours.mean(), rel=1e-6)
        # Twenty steps of AdamW. All have clipped gradients.
        opt_state = jax.jit(adamw(config.optimizer).init)(adapters)
        optimizer = torch.optim.AdamW(
            pair_parameters(model).values(), lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1
        )
        for step in range(STEPS):
            adapters, opt_state, metrics = train_step(
                config, adapters, opt_state, batch, jnp.int32(step), base
            )
            optimizer.zero_grad()
            theirs = peft_losses(torch, model).mean()
            theirs.backward()
            torch.nn.utils.clip_grad_norm_(pair_parameters(model).values(), 0.5)
            optimizer.step()
            assert float(metrics.loss) == pytest.approx(theirs.item(), rel=2e-5)
    assert theirs.item() < ours.mean() - 0.5
    found = {key: p.detach().numpy() for key, p in pair_parameters(model).items()}
    expected = to_ours(found, names[1])
    for name, w in leaves(adapters).items():
        error = np.linalg.norm(w - expected[name]) / np.linalg.norm(expected[name])
        assert error < 1e-4, name
