"""MFU of one training step (forward, backward, AdamW) on a GPU, beside transformers and PyTorch.

    pip install torch transformers        # the peer; without them take --no-peer
    python benchmarks/gpu_train_step.py [--shape llama3.2-1b] [--batch 4] [--seq-len 4096]
    python benchmarks/gpu_train_step.py --gate            # is packing safe with this kernel?
    python benchmarks/gpu_train_step.py --shape tiny      # both sides on whatever there is

Both compute in bfloat16, residual stream included, and keep float32 weights, gradients and moments.
Ours has cuDNN's attention; the peer has PyTorch's flash attention, torch.compile around model and
loss, and fused AdamW. Rows are plain texts without documents. Each round starts each side in turn
in a process of its own, which has all of the GPU's memory; later rounds find programs compiled.

MFU is by the causal count (attention's lower half, `ModelConfig.flops_per_token`) and by the full
one (all of attention), over the GPU's dense bfloat16 peak (`llama_jax.runtime.chips`).
"""

# pyright: reportMissingImports=false, reportPrivateImportUsage=false

import argparse
import importlib.util
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from result import Result, add_argument, keep
from train_step import stepper

from llama_jax.config.family import FAMILY
from llama_jax.config.model import ModelConfig
from llama_jax.config.run import LoggingConfig
from llama_jax.convert.formats.huggingface import config_json
from llama_jax.training.metrics import peak_flops

TINY = ModelConfig(
    dim=128, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=32, hidden_dim=352, vocab_size=1024,
    tied_head=True, context=256,
)  # fmt: skip
SHAPES = FAMILY | {"tiny": TINY}


def alone(function: Callable[..., Any], *args: Any) -> Any:
    """Returns what `function` returns in a fresh process, which has ended by then."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def device() -> tuple[str, str]:
    """Returns the platform that JAX computes on, and the kind of its device."""
    import jax

    return jax.default_backend(), jax.devices()[0].device_kind


def random_tokens(args: argparse.Namespace) -> np.ndarray:
    vocabulary = SHAPES[args.shape].vocab_size
    return np.random.default_rng(0).integers(0, vocabulary, (args.batch, args.seq_len + 1))


def llama_jax(args: argparse.Namespace) -> Callable[[], Any]:
    """Returns a function that begins one step of llama_jax and returns its loss."""
    computed = {"attention": args.kernel, "remat": args.remat, "scan": args.scan}
    model = replace(SHAPES[args.shape], dtype=args.dtype, **computed)
    return stepper(model, random_tokens(args), segments=args.packed)


def transformers(args: argparse.Namespace) -> Callable[[], Any]:
    """Returns a function that begins one step of transformers and returns its loss."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama import modeling_llama

    on_gpu = args.platform == "gpu"
    if on_gpu and not torch.cuda.is_available():
        sys.exit("PyTorch sees no GPU where JAX does: install its CUDA build, or take --no-peer")
    where = "cuda" if on_gpu else "cpu"
    # Compiled, transformers makes a causal mask (before PyTorch 2.14), which flash attention
    # refuses; without one it asks for plain causal attention.
    modeling_llama.create_causal_mask = lambda *args, **kwargs: None
    shape = config_json(SHAPES[args.shape], None, ()) | {"use_cache": False}
    config = LlamaConfig.from_dict(shape, attn_implementation="sdpa")
    torch.manual_seed(0)
    with torch.device(where):
        model = LlamaForCausalLM(config).float()
    settings = {"lr": 3e-4, "betas": (0.9, 0.95), "weight_decay": 0.1, "fused": True}
    adamw = torch.optim.AdamW(model.parameters(), **settings)
    tokens = torch.from_numpy(random_tokens(args)).to(where)

    @torch.compile
    def mean_loss(inputs: Any, targets: Any) -> Any:
        # Autocast leaves embeddings in float32, and with them all of the residual stream.
        embedded = model.get_input_embeddings()(inputs).to(getattr(torch, args.dtype))
        logits = model(inputs_embeds=embedded).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def step() -> Any:
        flash = sdpa_kernel(SDPBackend.FLASH_ATTENTION) if on_gpu else nullcontext()
        with flash, torch.autocast(where, torch.bfloat16, enabled=on_gpu):
            loss = mean_loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
        return loss.detach()

    return step


def measure(side: Callable[..., Any], args: argparse.Namespace) -> tuple[float, float]:
    """Returns the seconds of a step and the last loss; the steps are waited for once."""
    step = side(args)
    for _ in range(3):  # the first compiles
        float(step())
    begun = time.perf_counter()
    for _ in range(args.steps - 1):
        step()
    loss = float(step())
    return (time.perf_counter() - begun) / args.steps, loss


def compare(args: argparse.Namespace, kind: str) -> None:
    """Prints rounds, medians, and the ratio, pair by pair."""
    shape, peak = SHAPES[args.shape], peak_flops(LoggingConfig(), kind)
    known = f"peak {peak / 1e12:.0f} TFLOP/s" if peak else "peak unknown: no MFU"
    print(f"{args.shape}, {shape.n_params:,} weights, {args.batch}×{args.seq_len} tokens a step")
    print(f"{kind}, {known}; {args.dtype}, attention {args.kernel}, remat {args.remat}")
    sides = [llama_jax] if args.no_peer else [llama_jax, transformers]
    seconds: dict[str, list[float]] = {side.__name__: [] for side in sides}
    for number in range(1, args.rounds + 1):
        for side in sides:
            one, loss = alone(measure, side, args)
            seconds[side.__name__].append(one)
            told = f"{side.__name__:12} {1e3 * one:8.1f} ms, loss {loss:.3f}"
            print(f"round {number}: {told}", flush=True)
    rates: dict[str, float] = {}
    mfu = ""
    for name, times in seconds.items():
        rate = rates[name] = args.batch * args.seq_len / statistics.median(times)
        line = f"{name:12} {rate:9,.0f} tokens/s (median of rounds)"
        if peak:
            causal, full = (shape.flops_per_token(T) for T in (args.seq_len, 2 * args.seq_len))
            line += f", MFU {rate * causal / peak:.1%} causal, {rate * full / peak:.1%} full"
            mfu += f"{name} MFU {rate * causal / peak:.1%} causal "
        print(line)
    if not args.no_peer:
        ratios = [theirs / ours for ours, theirs in zip(*seconds.values(), strict=True)]
        ratio = statistics.median(ratios)
        print(f"llama_jax / transformers, median of pairs: {ratio:.2f}")
        what, ours, theirs = f"a training step, {args.shape}, {kind}", *rates.values()
        keep(args.json, Result(what, "tokens/s", ours, "torch.compile", theirs, ratio, mfu.strip()))


def gate(args: argparse.Namespace) -> str:
    """Returns a sentence that says that the kernel passed; exits with one that says where not."""
    import jax
    import jax.numpy as jnp

    from llama_jax.model.attention import attention
    from llama_jax.parallel.mesh import one_device_mesh, shard_array

    (N, K, H), T = SHAPES[args.shape].shape("NKH"), args.seq_len
    names = ("values", "gradient of q", "gradient of k", "gradient of v")
    draw = np.random.default_rng(0).standard_normal
    # Scores of deviation 2: few keys share a query's weight, so that each counts.
    drawn = (2 * H**-0.5 * draw((2, T, N, H)), *(draw((2, T, n, H)) for n in (K, K, N)))
    *operands, d_out = (x.astype(jnp.bfloat16) for x in drawn)
    packed = np.where(np.arange(T) < np.array([[T // 3], [T // 2 + 1]]), 1, 2).astype(np.int32)

    @partial(jax.jit, static_argnums=0)
    def pulled(kernel: str, q: Any, k: Any, v: Any, d_out: Any, segments: Any) -> Any:
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, segments, kernel), q, k, v)
        return out, *pull(d_out)

    def run(kernel: str, operands: Any, d_out: Any, segments: Any, dtype: Any = jnp.bfloat16):
        arrays = (shard_array(x.astype(dtype), "BTNH") for x in (*operands, d_out))
        ids = segments if segments is None else shard_array(segments, "BT")
        return [np.asarray(x, np.float32) for x in pulled(kernel, *arrays, ids)]

    def isolated(case: str, mine: np.ndarray, segments: Any) -> None:
        """Refuses a kernel in which the others reach the outputs of `mine`."""
        out, *grads = run(args.kernel, operands, d_out * mine[..., None, None], segments)
        for name, grad in zip(names[1:], grads, strict=True):
            if not grad[mine].any() or grad[~mine].any():
                sys.exit(f"gate: {args.kernel} gives a {name} that crosses {case}")
        changed = [np.where(mine[..., None, None], x, x.dtype.type(1e3)) for x in operands]
        if not np.array_equal(run(args.kernel, changed, d_out, segments)[0][mine], out[mine]):
            sys.exit(f"gate: {args.kernel} gives values that cross {case}")

    worst = 0.0
    with jax.set_mesh(one_device_mesh()):
        for number in (1, 2):
            isolated(f"the border of document {number}", packed == number, packed)
        isolated("from the future into the past", packed == 1, None)
        for case, segments in (("two documents", packed), ("no segments", None)):
            found = run(args.kernel, operands, d_out, segments)
            plain = run("xla", operands, d_out, segments)
            with jax.default_matmul_precision("highest"):
                exact = run("xla", operands, d_out, segments, jnp.float32)
            for name, a, b, c in zip(names, found, plain, exact, strict=True):
                # What bfloat16 costs xla is the unit. A kernel may err twice as much (as in
                # FlashAttention's own tests), and so be 3 units from xla. The unit itself is at
                # most 16 roundings of 2^-8: of weights, their gradients, sums, results.
                unit, apart = np.abs(b - c).max(), np.abs(a - b).max()
                if not (apart <= 3 * unit and unit <= np.abs(c).max() / 16):
                    where = f"{name} of {args.kernel} and xla, {case}, are {apart:.2e} apart"
                    sys.exit(f"gate: {where}; 3 × {unit:.2e}, what bfloat16 costs xla, is allowed")
                worst = max(worst, float(apart / unit))
    passed = f"gate: {args.kernel} passes at T={T}: nothing crosses documents or comes from later,"
    return f"{passed} and it is at most {worst:.2f} (of 3) errors of bfloat16 from xla"


def main() -> None:
    """Times both sides, or checks the gate."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--shape", choices=SHAPES, default="llama3.2-1b", help="(llama3.2-1b)")
    parser.add_argument("--batch", type=int, default=4, help="rows of a step (4)")
    parser.add_argument("--seq-len", type=int, help="tokens of a row (4096, or the context)")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a round (10)")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side (3)")
    parser.add_argument("--no-peer", action="store_true", help="time llama_jax alone")
    parser.add_argument("--remat", default="none", help="model.remat of llama_jax (none)")
    parser.add_argument("--scan", action="store_true", help="model.scan of llama_jax (unrolled)")
    parser.add_argument("--packed", action="store_true", help="with segment ids, as in training")
    parser.add_argument("--gate", action="store_true", help="check the attention kernel instead")
    add_argument(parser)
    args = parser.parse_args()
    args.seq_len = args.seq_len or min(4096, SHAPES[args.shape].context)
    # A side is alone on the GPU, so XLA may take nearly all of it, not three quarters.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    args.platform, kind = alone(device)
    if not (on_gpu := args.platform == "gpu") and args.shape != "tiny":
        sys.exit(f"{args.shape} needs an NVIDIA GPU, and JAX finds none here; take --shape tiny")
    # XLA's CPU back end lacks some bfloat16 products; there both sides compute in float32.
    args.kernel, args.dtype = ("cudnn", "bfloat16") if on_gpu else ("xla", "float32")
    peers = [importlib.util.find_spec(name) for name in ("torch", "transformers")]
    if not (args.no_peer or args.gate or all(peers)):
        sys.exit("the peer needs torch and transformers: install them, or take --no-peer")
    if args.gate:
        print(alone(gate, args))
        return
    with tempfile.TemporaryDirectory() as compiled:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", compiled)
        compare(args, kind)


if __name__ == "__main__":
    main()
