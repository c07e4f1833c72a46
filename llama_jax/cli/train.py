"""`llama-jax train`."""

import argparse
from typing import TYPE_CHECKING

from llama_jax.cli import generate
from llama_jax.cli.arguments import add_config, add_hosts
from llama_jax.errors import InputError

if TYPE_CHECKING:
    from llama_jax.config.run import Config
    from llama_jax.model.weights import Llama
    from llama_jax.training import loop

MANUAL = """\
Train a model with a configuration file, or resume the run in its run folder.

The run folder (training.out) receives config.yaml, checkpoints/, metrics.jsonl, TensorBoard
files, loss.png and the tokenizer. The same command resumes: the run continues with the same
batches and losses as an uninterrupted run, also on another mesh. SIGTERM and Ctrl-C save a
checkpoint and exit. If the folder of token shards is missing, it is first created from data.corpus.
CONFIG is a file, or the name of one that is included in llama_jax: quickstart, llama-7b,
llama3-8b …

With --replay STEP nothing is trained: the step of the run is computed again from the nearest
checkpoint before it, on the same mesh bit for bit, and compared with metrics.jsonl. The output has
the loss of each row, the norms of weights and gradients of each layer, and the text of the rows
with the highest losses. The run folder is only read; if it has been moved, set training.out.

On a TPU pod, under SLURM, Open MPI or a Kubernetes JobSet, run the command on every host: the hosts
find each other. Elsewhere, give each host the three flags. training.out and the data must be on
shared storage.

example:
  llama-jax train quickstart
  llama-jax train quickstart training.steps=600 optimizer.peak_lr=1e-3
  llama-jax train quickstart --replay 250 --rows 1
  llama-jax train configs/llama-7b.yaml --coordinator 10.0.0.2:8476 --processes 4 --process 0
"""

_SAMPLE_TOKENS = 80


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command, and the reference of the configuration's keys."""
    from llama_jax.config import yaml_file

    parser.epilog = f"The keys of a configuration file (type, default):\n{yaml_file.manual()}"
    add_config(parser)
    parser.add_argument("--replay", type=int, metavar="STEP", help="compute a step again instead")
    parser.add_argument("--rows", type=int, metavar="N", help="rows of --replay with text (4)")
    parser.add_argument("--json", action="store_true", help="print the result of --replay as JSON")
    add_hosts(parser)


def run(args: argparse.Namespace) -> int:
    """Trains until the run is finished or stopped; returns the exit code."""
    from llama_jax.runtime import hosts

    if args.replay is None and (args.rows is not None or args.json):
        raise InputError("--rows and --json are for --replay: give a step, or omit them")
    if args.rows is not None and args.rows < 0:
        raise InputError(f"--rows must be at least 0, not {args.rows}")
    with hosts.join(args.coordinator, args.processes, args.process):
        return _train(args)


def _train(args: argparse.Namespace) -> int:
    from llama_jax.config import yaml_file

    config = yaml_file.load(args.config, args.overrides)
    # JAX is imported after the configuration has been checked.
    if args.replay is not None:
        from llama_jax.cli.show_replay import show_replay

        return show_replay(config, args.replay, 4 if args.rows is None else args.rows, args.json)
    from llama_jax.inference.sampling import Sampling
    from llama_jax.runtime import hosts
    from llama_jax.runtime.compile_cache import enable_compile_cache
    from llama_jax.runtime.console import print_status
    from llama_jax.training import loop

    # Only host 0 writes JAX's cache: several hosts need a folder that they share.
    if not hosts.is_multi_host():
        enable_compile_cache()
    sample_chats, evaluate = _chat_samples(config), None
    if config.training.evaluate:
        from llama_jax.evaluation.in_training import evaluator

        evaluate = evaluator(config)
    try:
        outcome = loop.run(config, sample_chats, evaluate)
    except loop.RunStopped as error:
        print_status(f"llama-jax train: {error}")
        return 1
    if not outcome.finished:
        command = " ".join(["llama-jax train", args.config, *args.overrides])
        print_status(f"saved after step {outcome.step}; continue with: {command}")
        return 0
    if not hosts.is_host_zero():
        return 0
    if outcome.validation_loss is not None and outcome.unigram_entropy is not None:
        print(
            f"validation loss {outcome.validation_loss:.3f} nats per token; unigram entropy of the"
            f" held-out text {outcome.unigram_entropy:.3f}"
        )
    # No samples on several hosts: all of them would have to load the model and generate together.
    prompts = () if sample_chats or hosts.is_multi_host() else config.logging.samples
    for i, prompt in enumerate(prompts):
        print(f"\n--- sample {i + 1} of {len(prompts)}: {prompt!r}")
        sampling = Sampling(temperature=0.7, top_p=0.95)
        generate.continue_text(outcome.folder, prompt, _SAMPLE_TOKENS, sampling, seed=i)
    print(f"\nlosses: {outcome.folder / 'loss.png'}")
    prompt = '--chat --prompt "Hello!"' if _learns_chats(config) else '--prompt "def "'
    print(f"continue with: llama-jax generate {outcome.folder} {prompt}")
    return 0


def _learns_chats(config: "Config") -> bool:
    """Returns whether the first folder of the mixture exists and contains chats or preferences."""
    from llama_jax.data.shards import read_meta
    from llama_jax.runtime.storage import parse_path

    folder = parse_path(next(iter(config.data.mixture)))
    return folder.exists() and read_meta(folder)["kind"] != "text"


def _chat_samples(config: "Config") -> "loop.Sample | None":
    """Returns the function that answers `logging.samples` during a run on chats; otherwise None.

    Raises:
        InputError: a prompt doesn't fit the chat format or the context of the model.
    """
    from llama_jax.inference.samples import continue_prompts
    from llama_jax.inference.stream import check_prompt
    from llama_jax.parallel.mesh import context_shards
    from llama_jax.runtime import hosts
    from llama_jax.runtime.console import print_status
    from llama_jax.tokenizer.tokenizer import load_tokenizer

    prompts = config.logging.samples
    if not prompts or not _learns_chats(config):
        return None
    tokenizer = load_tokenizer(next(iter(config.data.mixture)))
    ids = [tokenizer.encode_chat([{"role": "user", "content": prompt}]) for prompt in prompts]
    for row in ids:
        check_prompt(config.model, row, _SAMPLE_TOKENS)

    def sample(model: "Llama", step: int) -> None:
        if context_shards() > 1:
            print_status("no samples: the mesh splits sequences")
            return
        texts = continue_prompts(config.model, model, tokenizer, ids, max_new_tokens=_SAMPLE_TOKENS)
        for prompt, text in zip(prompts, texts, strict=True):
            if hosts.is_host_zero():
                print(f"\n--- step {step}: {prompt!r}\n{text}", flush=True)

    return sample
