"""What a run trains: all weights of a model, or the low-rank pairs beside frozen ones (LoRA)."""

import jax

from llama_jax.config.run import Config
from llama_jax.model.lora import Adapters, Trained, attach
from llama_jax.model.weights import Llama


def init_trained(config: Config, key: jax.Array) -> Trained:
    """Returns initial weights or pairs, sharded on the current mesh.

    Args:
        config: of the run.
        key: `initial_key(config)`, or any key if only the shapes matter.
    """
    if config.lora is None:
        return Llama(config.model, key)
    return Adapters(config.model, config.lora, key)


def initial_key(config: Config) -> jax.Array:
    """Returns the random key of the initial weights, or of the initial pairs."""
    if config.lora is None:
        return jax.random.key(config.training.seed)
    return _lora_key(config.lora.seed, 0)


def dropout_keys(config: Config, step: jax.Array | None) -> jax.Array | None:
    """Returns the random key of each micro-batch of a step, [A]; None without dropout.

    The masks depend on the seed, the step and the number of the micro-batch alone: a resumed run
    draws the same ones, on any mesh and any number of hosts.
    """
    if config.lora is None or not config.lora.dropout or step is None:
        return None
    key = jax.random.fold_in(_lora_key(config.lora.seed, 1), step)
    return jax.random.split(key, config.training.micro_batches)


def _lora_key(seed: int, number: int) -> jax.Array:
    return jax.random.split(jax.random.key(seed))[number]


def complete_model(
    config: Config, trained: Trained, base: Llama | None, dropout_key: jax.Array | None = None
) -> Llama:
    """Returns the model that computes the loss: `trained`, or the base with `trained` attached.

    Args:
        config: of the run.
        trained: all weights, or the pairs.
        base: the frozen weights of a LoRA run, otherwise None.
        dropout_key: of one micro-batch; None: no dropout.
    """
    if isinstance(trained, Llama):
        return trained
    assert config.lora
    assert base is not None
    return attach(config.lora, base, trained, dropout_key)
