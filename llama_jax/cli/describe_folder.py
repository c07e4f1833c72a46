"""Describes a folder on one screen. Imports no JAX, so that `llama-jax info` answers at once."""

from collections.abc import Mapping
from typing import Any

from llama_jax.checkpoint import folders
from llama_jax.config.family import FAMILY
from llama_jax.config.model import ModelConfig
from llama_jax.config.run import Config
from llama_jax.convert.receipt import FILE as RECEIPT
from llama_jax.convert.receipt import read_receipt
from llama_jax.convert.sanity_checks import sanity_warnings
from llama_jax.data.shards import TokenStream, is_token_folder, read_meta
from llama_jax.errors import InputError
from llama_jax.runtime.duration import format_duration
from llama_jax.runtime.manifest import find_damage
from llama_jax.runtime.storage import AnyPath
from llama_jax.tokenizer.tokenizer import TOKENIZER_FILES, Tokenizer, load_tokenizer
from llama_jax.training.events import read_events
from llama_jax.training.ledger import read_sessions, sum_sessions
from llama_jax.training.metrics import read_metrics


def describe(folder: AnyPath) -> str:
    """Returns lines about a run folder, a model folder or a folder of token shards.

    Raises:
        InputError: the folder is none of them, or its contents are damaged.
    """
    check_exists(folder)
    if is_token_folder(folder):
        lines = _describe_tokens(folder)
    elif folders.is_run_folder(folder):
        lines = _describe_run(folder)
    else:
        lines = _describe_model_folder(folder)
    return "\n".join(lines)


def check_exists(folder: AnyPath) -> None:
    """Raises `InputError` if there is no such folder."""
    if not folder.exists():
        raise InputError(f"there is no folder {folder}: give a run, a model or token shards")


def _describe_model(config: ModelConfig) -> list[str]:
    names = [name for name, member in FAMILY.items() if member.n_params == config.n_params]
    like = f" (the size of {', '.join(names)})" if names else ""
    scaling = config.rope_scaling
    storage = config.param_dtype
    if config.quantized != "none":
        storage = f"{config.quantized} with a scale for each output channel, norms {storage}"
    return [
        f"model       {config.n_params:,} parameters{like}, {storage}",
        f"            {config.n_layers} layers, width {config.dim}, FFN {config.hidden_dim},"
        f" {config.n_heads} heads of {config.head_dim}, {config.n_kv_heads} key/value heads",
        f"            vocabulary {config.vocab_size:,},"
        f" {'tied' if config.tied_head else 'separate'} head, context {config.context:,}",
        f"            norm epsilon {config.norm_eps:g}, rope theta {config.rope_theta:g}"
        + (f", rope scaling factor {scaling.factor:g}" if scaling else ""),
    ]


def _describe_model_folder(folder: AnyPath) -> list[str]:
    config = folders.read_model_config(folder)
    lines = [f"model folder {folder}", *_describe_model(config)]
    has_tokenizer = any((folder / name).is_file() for name in TOKENIZER_FILES)
    tokenizer = load_tokenizer(folder) if has_tokenizer else None
    if tokenizer:
        lines.append(_describe_tokenizer(tokenizer))
    if (folder / RECEIPT).is_file():
        lines.append(_describe_receipt(folder))
    lines += [f"warning     {warning}" for warning in sanity_warnings(config, tokenizer)]
    return lines


def _describe_receipt(folder: AnyPath) -> str:
    match read_receipt(folder):
        case {
            "source": {"kind": str(kind), "name": str(name)},
            "verified": {"identical": int(identical), "converted": int(converted), **others},
        }:
            merged = others.get("merged", 0)
            return (
                f"receipt     from {kind} {name}: {identical} weights proven identical,"
                f" {converted} changed in type"
            ) + (f", {merged} merged with low-rank pairs" if type(merged) is int and merged else "")
        case {"source": {"kind": str(kind), "name": str(name)}, "verified": None}:
            return (
                f"receipt     from {kind} {name}: not verified when it was written:"
                f" llama-jax convert --verify {folder}"
            )
    raise InputError(f"{folder / RECEIPT} is damaged: convert the model again")


def _describe_tokenizer(tokenizer: Tokenizer) -> str:
    ends = ", ".join(map(str, sorted(tokenizer.end_ids)))
    return (
        f"tokenizer   {tokenizer.path.name}: {tokenizer.n_vocab:,} tokens,"
        f" begin {tokenizer.bos_id}, end {ends}"
    )


def _describe_run(folder: AnyPath) -> list[str]:
    config = folders.read_run_config(folder)
    records = read_metrics(folder / "metrics.jsonl")
    steps, damaged, incomplete = _checkpoints(folder / "checkpoints")
    done = steps[-1] if steps else 0
    state = "finished" if done >= config.training.steps else "not finished: train resumes it"
    lines = [
        f"run folder {folder}",
        *_describe_model(config.model),
        *_describe_lora(config),
        _describe_tokenizer(load_tokenizer(folder)),
        f"data        {', '.join(config.data.folders)}; {config.data.batch_size} windows of"
        f" {config.data.seq_len} tokens per step",
        f"progress    {done} of {config.training.steps} steps saved ({state})",
        f"checkpoints {', '.join(map(str, steps)) or 'none'}",
    ]
    lines += [f"damaged     {step} ({reason}; not used)" for step, reason in damaged.items()]
    if incomplete:
        lines.append(f"incomplete  {', '.join(map(str, incomplete))} (not used)")
    losses = [r for r in records if r.get("loss") is not None]
    validations = [r for r in records if r.get("validation_loss") is not None]
    if losses:
        lines.append(f"loss        {losses[-1]['loss']:.4f} in step {losses[-1]['step']}")
    if validations:
        last = validations[-1]
        accuracy = last.get("validation_accuracy")  # of preferences
        more = "" if accuracy is None else f", {accuracy:.1%} of the preferences right"
        lines.append(f"validation  {last['validation_loss']:.4f} after step {last['step']}{more}")
    if len(config.data.folders) > 1:
        lines += _describe_source_losses(config, records)
    seconds = sum(r["step_seconds"] for r in losses if "data_wait" in r)
    if seconds:
        waited = sum(r["data_wait"] * r["step_seconds"] for r in losses if "data_wait" in r)
        lines.append(f"data wait   {waited / seconds:.2%} of the step time")
    return lines + _describe_spikes(folder) + _describe_ledger(folder)


def _describe_spikes(folder: AnyPath) -> list[str]:
    """Returns the line about the spikes of a run; none if it had none."""
    steps = [event["step"] for event in read_events(folder, "spike")]
    if not steps:
        return []
    last = ", ".join(map(str, steps[-5:]))
    rewinds = len(read_events(folder, "rewind"))
    more = f"; {rewinds} {'rewind' if rewinds == 1 else 'rewinds'}" if rewinds else ""
    return [
        f"spikes      {len(steps)}, the last in step {last}{more} (info --spike STEP shows one)"
    ]


def _describe_ledger(folder: AnyPath) -> list[str]:
    """Returns the line about the time of a run; none if it has no ledger."""
    sessions = read_sessions(folder)
    if not sessions:
        return []
    sums = sum_sessions(sessions)
    total = sum(sums.values())
    shares = {kind: seconds / total for kind, seconds in sums.items() if seconds > 0.0005 * total}
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    starts = f"{len(sessions)} starts" if len(sessions) > 1 else "1 start"
    return [
        f"time        {format_duration(total)} since the first of {starts}: "
        + ", ".join(f"{kind} {share:.1%}" for kind, share in ordered)
    ]


def _describe_source_losses(config: Config, records: list[dict[str, Any]]) -> list[str]:
    """Returns a line about the last losses of each source; sources without one are left out."""
    lines = list[str]()
    for folder in config.data.folders:
        parts = list[str]()
        for name, key, when in (
            ("loss", f"loss/{folder}", "in"),
            ("validation", f"validation_loss/{folder}", "after"),
        ):
            found = [r for r in records if r.get(key) is not None]
            if found:
                parts.append(f"{name} {found[-1][key]:.4f} {when} step {found[-1]['step']}")
        if parts:
            lines.append(f"{'' if lines else 'sources':11} {folder}: {', '.join(parts)}")
    return lines


def _describe_lora(config: Config) -> list[str]:
    """Returns the lines about the low-rank pairs of a run; none if it trains all weights."""
    lora = config.lora
    if lora is None:
        return []
    n_params = lora.n_params(config.model)
    share = n_params / config.model.n_params
    root = "√" if lora.rank_stabilized else ""
    return [
        f"pairs       {n_params:,} trained parameters ({share:.2%}), rank {lora.rank},"
        f" α/{root}R {lora.scale:g}, beside {', '.join(lora.targets)}",
        f"base        {config.training.init_from}",
    ]


def _checkpoints(folder: AnyPath) -> tuple[list[int], dict[int, str], list[int]]:
    """Returns the steps of the complete, the damaged (with the reason) and the incomplete ones.

    Only small files are verified here; `--verify` reads the arrays.
    """
    steps, incomplete = folders.committed_steps(folder)
    found = {step: find_damage(folder / str(step)) for step in steps}
    damaged = {step: reason for step, reason in found.items() if reason}
    return [step for step in steps if step not in damaged], damaged, incomplete


def _describe_tokens(folder: AnyPath) -> list[str]:
    meta = read_meta(folder)
    lines = [f"token shards {folder}", f"sources     {', '.join(meta['sources'])}"]
    lines.append(_describe_tokenizer(load_tokenizer(folder)))
    for name, split in meta["splits"].items():
        TokenStream(folder, name)  # opens every file and checks its length
        entropy = f"unigram entropy {split['unigram_entropy']:.3f} nats per"
        if meta["kind"] == "text":
            lines.append(
                f"{name:11} {split['tokens']:,} tokens in {split['documents']:,} documents"
                f" ({split['bytes']:,} bytes), {entropy} token"
            )
        else:
            lines.append(f"{name:11} {describe_packed_split(meta, split)}, {entropy} trained token")
    return lines


def describe_packed_split(meta: Mapping[str, Any], split: Mapping[str, Any]) -> str:
    """Returns one line about a split of chats or preferences.

    Args:
        meta: content of the folder's `meta.json`.
        split: entry of the split in it.
    """
    windows = split["tokens"] // meta["seq_len"]
    fill = split["example_tokens"] / max(1, split["tokens"])
    trained = split["trained_tokens"] / max(1, split["example_tokens"])
    return (
        f"{split['documents']:,} {meta['kind']} in {windows:,} windows of {meta['seq_len']:,}"
        f" tokens, {fill:.2%} full, {split['trained_tokens']:,} tokens trained ({trained:.1%})"
    )
