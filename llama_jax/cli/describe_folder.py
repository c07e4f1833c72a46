"""What a folder holds, in one screen. Imports no JAX: it answers at once."""

from pathlib import Path

from llama_jax.checkpoint import folders
from llama_jax.config.family import FAMILY
from llama_jax.config.model import ModelConfig
from llama_jax.convert.receipt import FILE as RECEIPT
from llama_jax.convert.receipt import read_receipt
from llama_jax.convert.sanity_checks import sanity_warnings
from llama_jax.data.shards import TokenStream, is_token_folder, read_meta
from llama_jax.errors import InputError
from llama_jax.tokenizer.tokenizer import TOKENIZER_FILES, Tokenizer, load_tokenizer
from llama_jax.training.metrics import read_metrics


def describe(folder: Path) -> str:
    """Returns lines about a run folder, a model folder or a folder of token shards.

    Raises:
        InputError: it is none of them, or what it holds is damaged.
    """
    if not folder.exists():
        raise InputError(f"there is no folder {folder}: give a run, a model or token shards")
    if is_token_folder(folder):
        lines = _tokens(folder)
    elif folders.is_run_folder(folder):
        lines = _run(folder)
    else:
        lines = _model_folder(folder)
    return "\n".join(lines)


def _model(config: ModelConfig) -> list[str]:
    names = [name for name, member in FAMILY.items() if member.n_params == config.n_params]
    like = f" (the size of {', '.join(names)})" if names else ""
    scaling = config.rope_scaling
    kept = config.param_dtype
    if config.quantized != "none":
        kept = f"{config.quantized} with a scale for each output channel, norms {kept}"
    return [
        f"model       {config.n_params:,} parameters{like}, {kept}",
        f"            {config.n_layers} layers, width {config.dim}, FFN {config.hidden_dim},"
        f" {config.n_heads} heads of {config.head_dim}, {config.n_kv_heads} key/value heads",
        f"            vocabulary {config.vocab_size:,},"
        f" {'tied' if config.tied_head else 'separate'} head, context {config.context:,}",
        f"            norm epsilon {config.norm_eps:g}, rope theta {config.rope_theta:g}"
        + (f", rope scaling factor {scaling.factor:g}" if scaling else ""),
    ]


def _model_folder(folder: Path) -> list[str]:
    config = folders.read_model_config(folder)
    lines = [f"model folder {folder}", *_model(config)]
    has_tokenizer = any((folder / name).is_file() for name in TOKENIZER_FILES)
    tokenizer = load_tokenizer(folder) if has_tokenizer else None
    lines += [_tokenizer(tokenizer)] if tokenizer else []
    if (folder / RECEIPT).is_file():
        lines.append(_receipt(folder))
    lines += [f"looks wrong {warning}" for warning in sanity_warnings(config, tokenizer)]
    return lines


def _receipt(folder: Path) -> str:
    match read_receipt(folder):
        case {
            "source": {"kind": str(kind), "name": str(name)},
            "verified": {"identical": int(identical), "converted": int(converted)},
        }:
            return (
                f"receipt     from {kind} {name}: {identical} weights proven identical,"
                f" {converted} changed in type"
            )
    raise InputError(f"{folder / RECEIPT} is damaged: convert the model again")


def _tokenizer(tokenizer: Tokenizer) -> str:
    ends = ", ".join(map(str, sorted(tokenizer.end_ids)))
    about = f"{tokenizer.n_vocab:,} tokens, begin {tokenizer.bos_id}, end {ends}"
    return f"tokenizer   {tokenizer.path.name}: {about}"


def _run(folder: Path) -> list[str]:
    config = folders.read_run_config(folder)
    records = read_metrics(folder / "metrics.jsonl")
    steps = folders.saved_steps(folder)
    done = steps[-1] if steps else 0
    state = "finished" if done >= config.training.steps else "not finished: train resumes it"
    lines = [
        f"run folder {folder}",
        *_model(config.model),
        _tokenizer(load_tokenizer(folder)),
        f"data        {', '.join(config.data.mixture)}; {config.data.batch_size} windows of"
        f" {config.data.seq_len} tokens a step",
        f"progress    {done} of {config.training.steps} steps saved ({state})",
        f"checkpoints {', '.join(map(str, steps)) or 'none'}",
    ]
    losses = [r for r in records if r.get("loss") is not None]
    validations = [r for r in records if r.get("validation_loss") is not None]
    if losses:
        lines.append(f"loss        {losses[-1]['loss']:.4f} in step {losses[-1]['step']}")
    if validations:
        last = validations[-1]
        lines.append(f"validation  {last['validation_loss']:.4f} after step {last['step']}")
    return lines


def _tokens(folder: Path) -> list[str]:
    meta = read_meta(folder)
    lines = [f"token shards {folder}", f"sources     {', '.join(meta['sources'])}"]
    lines.append(_tokenizer(load_tokenizer(folder)))
    for split, about in meta["splits"].items():
        TokenStream(folder, split)  # opens every file and checks its length
        lines.append(
            f"{split:11} {about['tokens']:,} tokens in {about['documents']:,} documents"
            f" ({about['bytes']:,} bytes), {len(about['shards'])} file(s), unigram entropy"
            f" {about['unigram_entropy']:.3f} nats per token"
        )
    return lines
