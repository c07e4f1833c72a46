"""The manual pages of the command line and its arguments."""

import argparse

from llama_jax import __version__
from llama_jax.config import yaml_file
from llama_jax.errors import install

_TRAIN = """\
Train a model as a configuration file says, or go on where its run folder stopped.

The run folder (training.out) receives config.yaml, checkpoints/, metrics.jsonl, TensorBoard
files, loss.png and the tokenizer. The same command resumes: the run continues with the very
batches and losses that it would have had, also on another mesh. SIGTERM and Ctrl-C save and exit.
A folder of token shards that is missing is made from data.corpus first. CONFIG is a file, or the
name of one that comes with llama_jax: quickstart, llama-7b, llama3-8b …

On a TPU pod, under SLURM, Open MPI or a JobSet of Kubernetes, run it on every host: they find each
other. Elsewhere give each host the three flags. training.out and the data lie on shared storage.

example:
  llama-jax train quickstart
  llama-jax train quickstart training.steps=600 optimizer.peak_lr=1e-3
  llama-jax train configs/llama-7b.yaml --coordinator 10.0.0.2:8476 --processes 4 --process 0
"""

_TOKENIZE = """\
Turn text or JSON lines (one {"text": …} a line) into a folder of token shards.

A .jsonl or .ndjson file is JSON lines, a .txt, .md, .py or .rst file is one text, whatever is in
it; of any other file, such as the .json.gz of C4, the first line decides. Also .gz and .zst.

A tokenizer is trained as LLaMA's was (BPE, split digits, bytes for the unknown, nothing
normalised) with --vocab-size, or taken with --tokenizer. All cores work. Every 1/fraction-th
document is held out for validation. A long text is encoded in pieces that end where no token can
cross, so that memory stays small. The folder appears when it is complete, or not at all; what a
killed process left of it is removed by the next that makes it. SIGTERM and Ctrl-C leave nothing.

example:
  llama-jax tokenize 'corpus/*.jsonl.zst' --out data/mine --vocab-size 32000
  llama-jax tokenize books/ --out data/books --tokenizer llama/tokenizer.model
"""

_GENERATE = """\
Continue a text with the model in a run folder or model folder.

Standard output carries the text alone, as it is made; everything else goes to standard error.
The default is the most likely token each time; --temperature above 0 draws instead, among the
tokens that --top-k, --top-p and --min-p leave (in this order, after the penalties, as transformers
has it). Compiled programs are kept in JAX_COMPILATION_CACHE_DIR, or ~/.cache/llama_jax.

example:
  llama-jax generate runs/quickstart --prompt 'def '
  llama-jax generate runs/quickstart --prompt 'import ' --temperature 0.8 --top-p 0.95 --seed 1
  llama-jax generate models/llama3.1-8b-instruct --chat --prompt 'Why is the sky blue?'
"""

_SERVE = f"""\
Answer requests over HTTP, as OpenAI's API does, with the model in a run folder or model folder.

Clients of OpenAI's use http://HOST:PORT/v1 (completions, chat/completions, models); a page to try
the model stands at /, counts for Prometheus at /metrics. Requests share one batch of --rows texts;
more wait, up to --queue, and then get the status 429. SIGTERM and Ctrl-C end it: what is being made
has 20 s to come to its end. docs/serve.md tells the rest. Needs:
{install("serve")}

Without a key everybody who reaches HOST can use the model, by an address, localhost, HOST or a name
of --allow-host: other names are refused, since any site's name may lead here. A key in the
environment variable LLAMA_JAX_API_KEY stays out of the list of processes, where --api-key can be
read.

example:
  llama-jax serve models/llama3.1-8b-instruct
  llama-jax serve runs/quickstart --port 9000 --rows 16 --context 1024
  LLAMA_JAX_API_KEY=$(cat key) llama-jax serve models/llama3.1-8b-instruct --host 0.0.0.0
"""

_PERPLEXITY = """\
Measure how well a model foretells a text: nats per token, and perplexity, which is their exp.

The text is cut into windows of 2048 tokens, or of the model's context where that is less, and each
token is foretold from those before it in its window. With --quantize the model is measured as it
is and with its weights quantized, and what that loses is told.

example:
  llama-jax perplexity models/llama3.2-1b book.txt
  llama-jax perplexity models/llama3.2-1b book.txt --quantize int8
"""

_CONVERT = """\
Bring a LLaMA checkpoint from any format into another, and prove that nothing was lost.

Reads Meta folders (params.json, consolidated.NN.pth), Hugging Face folders (safetensors or
PyTorch files), GGUF files, llama2.c's .bin files, and model and run folders of llama_jax. Writes
a model folder (--to orbax), a Hugging Face folder (hf) or a Meta folder (meta), with the
tokenizer. No PyTorch is needed, and nothing that a checkpoint contains is run. One weight at a
time is in memory. At the end what was written is read back and turned into the source's tensors
again, bit for bit; receipt.json tells it. The folder appears when it is whole, or not at all.
--verify does that proof once more, with the source hashed again where it is named.

--quantize int8 keeps each matrix as whole numbers with a scale for each output channel, for
inference alone: a quarter of the size of float32. No other format can be made from that;
llama-jax perplexity measures what it loses.

example:
  llama-jax convert Llama-3.1-8B/original models/llama3.1-8b
  llama-jax convert models/llama3.1-8b export/llama3.1-8b --to hf
  llama-jax convert Llama-3.1-8B/original models/llama3.1-8b-int8 --quantize int8
  llama-jax convert Llama-2-70b mp16 --to meta --shards 16
  llama-jax convert --verify models/llama3.1-8b Llama-3.1-8B/original
"""

_PLAN = f"""\
Tell what a training run will need and reach on a TPU pod, without the pod.

The very step that would run is compiled by XLA's TPU compiler, which needs no TPU (install it with
{install("plan")}), three times: whole, for its memory and its schedule, and with one and
with two layers, unrolled, for what a layer and what the rest cost, since it counts the body
of a loop once. All figures are estimates:

  the compiler's estimate alone   its cost model of every operation but kernels and network
  + attention, by a model         7 products (9 where it is computed twice), half of them masked,
                                  at 50 % of the peak (less for heads below 128)
  + network that nothing hides    the whole schedule is played, loops as often as they go round:
                                  one collective travels after the other, at the links' full
                                  speed, and what computes must wait for what has not arrived

MFU is that of the model's own FLOPs, with the causal half of attention or all of it (full); HFU
counts what is computed twice as well. --search tries meshes, rematerialisation and micro-batches:
it leaves out by arithmetic what can't fit, compiles what is left of the fastest, and ranks them.

--inference tells what serving a model needs and reaches instead: of a model folder, a member of
the family by name, or the model of a configuration file. Each slice holds the whole model, each
layer split over all its chips, key/value heads copied where there are fewer. Estimates of a step:

  memory     weights and all slots of the cache are read once, at the memory's bandwidth
  compute    the program's FLOPs at the peak
  network    its collectives, one after the other: bytes over the links, and 1 µs for each link
             that a message crosses
  cycles     the compiler's own count for all operations, at the chip's clock
  compiler   its cost model's sum, without network; it counts what stays in the chip's fast memory
             as read from the large one, so for decoding it is far too high
  roofline   the largest of memory, compute and network, as if none waited for another
  estimate   the largest of memory, compute and cycles, and the network on top, which is awaited

Two layers and three are compiled and extrapolated; the loop over new tokens is compiled whole, for
its memory. Steps leave sampling out, and what a program waits for what it fetches ahead.
docs/plan.md shows how the tables are read.

example:
  llama-jax plan configs/llama-7b.yaml --topology v5p:4x4x4 --picture 7b.png
  llama-jax plan configs/llama-65b.yaml --topology v5p:8x8x16 --json
  llama-jax plan configs/llama3-8b.yaml --topology '2*v5e:16x16' --search
  llama-jax plan llama2-70b --inference --topology v5e:4x4 --context 4096 --batch 8
"""

_INFO = """\
Show in one screen what a folder holds: a run, a model, or token shards.

example:
  llama-jax info runs/quickstart
  llama-jax info data/quickstart
"""


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line; `name` becomes the command's."""
    made = argparse.ArgumentParser(
        prog="llama-jax", description="LLaMA in JAX: train it, run it, look inside."
    )
    made.add_argument("--version", action="version", version=f"llama_jax {__version__}")
    commands = made.add_subparsers(dest="name", metavar="COMMAND", required=True)

    def command(name: str, manual: str, epilog: str | None = None) -> argparse.ArgumentParser:
        raw = argparse.RawDescriptionHelpFormatter
        summary = manual.split("\n")[0]
        return commands.add_parser(
            name, help=summary, description=manual, epilog=epilog, formatter_class=raw
        )

    def of_config(name: str, manual: str, epilog: str | None = None) -> argparse.ArgumentParser:
        made = command(name, manual, epilog)
        made.add_argument(
            "config", metavar="CONFIG", help="YAML file, or the name of one that comes along"
        )
        made.add_argument(
            "overrides", metavar="section.key=value", nargs="*", help="changes a key of the file"
        )
        return made

    def of_folder(name: str, manual: str) -> argparse.ArgumentParser:
        made = command(name, manual)
        made.add_argument("folder", metavar="FOLDER", help="run folder or model folder")
        return made

    keys = "The keys of a configuration file (type, default):\n" + yaml_file.manual()
    train = of_config("train", _TRAIN, epilog=keys)
    train.add_argument("--coordinator", metavar="HOST:PORT", help="process 0, for the others")
    train.add_argument("--processes", type=int, metavar="N", help="processes in all, one a host")
    train.add_argument("--process", type=int, metavar="I", help="number of this one, from 0")

    plan = of_config("plan", _PLAN)
    plan.add_argument(
        "--topology", required=True, metavar="POD", help="v5p:4x4x4, v6e:16x16, 2*v5e:16x16 …"
    )
    plan.add_argument("--json", action="store_true", help="figures in bytes, seconds and shares")
    plan.add_argument(
        "--picture", metavar="FILE", help="draw memory and time as well: FILE.png or FILE.svg"
    )
    plan.add_argument("--search", action="store_true", help="look for the fastest way to run")
    plan.add_argument(
        "--compile",
        type=int,
        default=4,
        metavar="N",
        help="ways that fit which --search compiles (4)",
    )
    plan.add_argument(
        "--inference",
        action="store_true",
        help="plan serving; CONFIG may be a model folder or a member of the family",
    )
    plan.add_argument(
        "--context", type=int, metavar="T", help="slots of a row (4096, or the model's context)"
    )
    plan.add_argument("--batch", type=int, metavar="B", help="rows of each slice (8)")
    plan.add_argument(
        "--dtype", choices=["bfloat16", "float32"], help="of weights and activations (bfloat16)"
    )
    plan.add_argument("--cache", choices=["same", "int8"], help="of keys and values (the model's)")
    plan.add_argument("--quantize", choices=["int8"], help="of matrices (as the model is)")

    tokenize = command("tokenize", _TOKENIZE)
    tokenize.add_argument("sources", metavar="SOURCE", nargs="+", help="file, folder or glob")
    tokenize.add_argument("--out", required=True, metavar="FOLDER", help="folder to make")
    kind = tokenize.add_mutually_exclusive_group(required=True)
    kind.add_argument("--vocab-size", type=int, metavar="N", help="train a tokenizer of N tokens")
    kind.add_argument("--tokenizer", metavar="FILE", help="use this tokenizer (file or folder)")
    tokenize.add_argument(
        "--validation-fraction", type=float, default=0.05, metavar="X", help="held out (0.05)"
    )
    tokenize.add_argument("--workers", type=int, metavar="N", help="processes (one a core)")

    generate = of_folder("generate", _GENERATE)
    generate.add_argument("--prompt", default="", metavar="TEXT", help="text to continue (none)")
    generate.add_argument(
        "--chat",
        action="store_true",
        help="ask the prompt in the model's chat format",
    )
    generate.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="at most N (200, or what the context holds)"
    )
    generate.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0: greedy")
    generate.add_argument("--top-k", type=int, default=0, metavar="K", help="0: all (default)")
    generate.add_argument("--top-p", type=float, default=1.0, metavar="P", help="1: all (default)")
    generate.add_argument("--min-p", type=float, default=0.0, metavar="P", help="0: all (default)")
    for name in ("repetition", "presence", "frequency"):
        default = 1.0 if name == "repetition" else 0.0
        generate.add_argument(
            f"--{name}-penalty", type=float, default=default, metavar="X", help=f"{default:g}: none"
        )
    generate.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="ends before it (repeatable)"
    )
    generate.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (0)")
    generate.add_argument(
        "--ignore-eos", action="store_true", help="go on after an end-of-text token"
    )
    generate.add_argument(
        "--stats", action="store_true", help="tokens/s, and the share of the memory's bandwidth"
    )
    _add_int8(generate)

    serve = of_folder("serve", _SERVE)
    serve.add_argument("--host", default="127.0.0.1", metavar="HOST", help="(127.0.0.1)")
    serve.add_argument("--port", type=int, default=8000, metavar="N", help="0: a free one (8000)")
    serve.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME",
        help="that clients may use for the server, beside localhost, addresses and HOST; again for"
        " more, '*' for all (none)",
    )  # fmt: skip
    serve.add_argument("--api-key", metavar="KEY", help="that clients must send (none)")
    serve.add_argument(
        "--name", dest="model", metavar="NAME", help="of the model, for clients (the folder's)"
    )
    _add_int8(serve)
    serve.add_argument("--rows", type=int, default=8, metavar="N", help="texts made at once (8)")
    serve.add_argument(
        "--context", type=int, metavar="N",
        help="longest prompt and output together [tokens] (the model's, 8192 at most)",
    )  # fmt: skip
    serve.add_argument("--queue", type=int, default=64, metavar="N", help="texts that wait (64)")
    serve.add_argument(
        "--max-tokens", type=int, default=4096, metavar="N", help="longest output (4096)"
    )
    serve.add_argument("--max-body", default="2MiB", metavar="SIZE", help="of a request (2MiB)")
    serve.add_argument(
        "--timeout", type=float, default=600, metavar="S", help="of a request [s] (600)"
    )

    perplexity = of_folder("perplexity", _PERPLEXITY)
    perplexity.add_argument("text", metavar="TEXT_FILE", help="text in UTF-8")
    perplexity.add_argument("--quantize", choices=["int8"], help="compare with quantized weights")

    convert = command("convert", _CONVERT)
    convert.add_argument("source", metavar="SRC", help="checkpoint: a folder or a file")
    convert.add_argument("folder", metavar="DST", nargs="?", help="folder to make")
    convert.add_argument(
        "--to", choices=["orbax", "hf", "meta"], default="orbax", help="format (orbax)"
    )
    convert.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights (as stored)"
    )
    convert.add_argument(
        "--max-ram", metavar="SIZE", help="4GiB, 800MB … (the largest tensor × 3 + 1GiB)"
    )
    convert.add_argument(
        "--model",
        metavar="NAME",
        help="member of the family, instead of what the files say",
    )
    convert.add_argument("--tokenizer", metavar="FILE", help="instead of the checkpoint's own")
    convert.add_argument("--shards", type=int, default=1, metavar="N", help="files, with --to meta")
    convert.add_argument(
        "--mesh", metavar="fsdp=8,tensor=4", help="cut the chunks of a model folder for this mesh"
    )
    convert.add_argument("--quantize", choices=["int8"], help="keep the matrices as int8")
    convert.add_argument(
        "--verify", action="store_true", help="prove SRC once more, against the source DST if named"
    )

    info = command("info", _INFO)
    info.add_argument("folder", metavar="FOLDER")
    return made


def _add_int8(command: argparse.ArgumentParser) -> None:
    command.add_argument("--quantize", choices=["int8"], help="weights, when they are loaded")
    command.add_argument("--cache", choices=["int8"], help="type of cached keys and values")
