"""`llama-jax convert`."""

import argparse
import sys
import time

from llama_jax.errors import InputError
from llama_jax.runtime.storage import parse_path

MANUAL = """\
Convert a LLaMA checkpoint into another format, and prove that the weights are identical.

Sources are Meta folders (params.json, consolidated.NN.pth), Hugging Face folders (safetensors or
PyTorch files), GGUF files, .bin files of llama2.c, and model and run folders of llama_jax. The
output is a model folder (--to orbax), a Hugging Face folder (hf) or a Meta folder (meta), with the
tokenizer. PyTorch is not needed, and no code in a checkpoint is executed. Memory contains one
weight at a time. At the end, the output is read back and converted into the tensors of the source,
which must be equal bit for bit; receipt.json records the result. The folder appears only when it is
complete. --verify repeats the proof later; if the source is given as DST, it also hashes the
source again. --verify-later leaves the proof to such a command.

A LoRA run is converted with its low-rank pairs merged into its base: w + α·BA/r, added in float32
and verified weight by weight. --lora merges the pairs of a LoRA run or of a PEFT folder into SRC.
--to peft writes the pairs of a LoRA run for PEFT. The export of a fine-tune has the chat template
and all end tokens of its training.

--quantize int8 stores each matrix as 8-bit integers with a scale for each output channel, for
inference only: a quarter of the size of float32. An int8 model can't be converted into another
format, except with low-rank pairs: the sum is no longer int8. llama-jax eval measures the loss of
quality.

example:
  llama-jax convert Llama-3.1-8B/original models/llama3.1-8b
  llama-jax convert models/llama3.1-8b export/llama3.1-8b --to hf
  llama-jax convert Llama-3.1-8B/original models/llama3.1-8b-int8 --quantize int8
  llama-jax convert runs/lora export/merged --to hf
  llama-jax convert runs/lora export/adapter --to peft
  llama-jax convert models/llama3.1-8b models/tuned --lora export/adapter
  llama-jax convert Llama-2-70b mp16 --to meta --shards 16
  llama-jax convert --verify models/llama3.1-8b Llama-3.1-8B/original
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("source", metavar="SRC", help="checkpoint: a folder or a file")
    parser.add_argument("folder", metavar="DST", nargs="?", help="folder to create")
    parser.add_argument(
        "--to",
        choices=["orbax", "hf", "meta", "peft"], default="orbax",
        help="output format (orbax)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"],
        help="type of the weights (as in the source)",
    )  # fmt: skip
    parser.add_argument(
        "--max-ram", metavar="SIZE",
        help="memory limit: 4GiB, 800MB … (three times the largest tensor, plus 1GiB)",
    )  # fmt: skip
    parser.add_argument(
        "--model", metavar="NAME",
        help="take the shape of this member of the family, not the shape in the source",
    )  # fmt: skip
    parser.add_argument("--tokenizer", metavar="FILE", help="replaces the checkpoint's tokenizer")
    parser.add_argument(
        "--shards", type=int, default=1, metavar="N", help="number of files, with --to meta (1)"
    )
    parser.add_argument(
        "--mesh", metavar="fsdp=8,tensor=4", help="chunk a model folder's arrays for this mesh"
    )
    parser.add_argument("--quantize", choices=["int8"], help="store the matrices as int8")
    parser.add_argument(
        "--verify", action="store_true", help="repeat the proof of SRC; DST may name its source"
    )
    parser.add_argument(
        "--verify-later", action="store_true", help="leave out the proof, for --verify to do"
    )
    parser.add_argument(
        "--lora", metavar="PAIRS",
        help="merge these low-rank pairs into the weights: a LoRA run, or a folder of PEFT",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Converts or verifies a checkpoint; returns the exit code."""
    from llama_jax.convert.convert import convert
    from llama_jax.convert.formats.model_folder import parse_mesh
    from llama_jax.convert.verify import verify
    from llama_jax.runtime.byte_size import parse_size
    from llama_jax.runtime.process_memory import release_freed_memory

    if args.verify:
        folder, lora = (path and parse_path(path) for path in (args.folder, args.lora))
        counts = verify(parse_path(args.source), folder, lora=lora)
        print(f"{args.source}: {_proof(**counts)}")
        return 0
    if args.folder is None:
        raise InputError("the folder to create is missing: write llama-jax convert SRC DST")
    start = time.monotonic()
    release_freed_memory()
    outcome = convert(
        args.source,
        args.folder,
        to=args.to,
        dtype=args.dtype,
        max_ram=args.max_ram and parse_size(args.max_ram, "--max-ram"),
        model=args.model,
        tokenizer=args.tokenizer,
        shards=args.shards,
        mesh=args.mesh and parse_mesh(args.mesh),
        quantize=args.quantize,
        lora=args.lora,
        verify_later=args.verify_later,
    )
    seconds = time.monotonic() - start
    for note in outcome.notes:
        print(f"warning: {note}", file=sys.stderr)
    print(
        f"{outcome.folder}: {outcome.bytes_written / 1e9:.3f} GB in {seconds:.1f} s"
        f" ({outcome.bytes_written / 1e6 / seconds:.0f} MB/s,"
        f" with{'out' * args.verify_later} the proof), peak memory {outcome.peak / 2**30:.2f} GiB"
    )
    if args.verify_later:
        print(f"not verified yet: llama-jax convert --verify {outcome.folder}")
    else:
        print(f"{outcome.folder}: {_proof(outcome.identical, outcome.converted, outcome.merged)}")
    if args.quantize:
        print(f"measure the loss of quality: llama-jax eval {outcome.folder} --perplexity TEXT")
    return 0


def _proof(identical: int, converted: int, merged: int = 0) -> str:
    """Returns the result of a verification.

    Args:
        identical: number of weights with the bits of the source.
        converted: number of weights of another type than in the source.
        merged: number of weights into which a low-rank pair was merged.
    """
    parts = [f"{identical} weights are bit-identical to the source's"] if identical else []
    parts += [f"{converted} equal the source's after the change of type"] if converted else []
    parts += [f"{merged} equal base + α·BA/r"] if merged else []
    return ", ".join(parts)
