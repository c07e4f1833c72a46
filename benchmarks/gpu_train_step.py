"""MFU of one training step (forward, backward, AdamW) on a GPU, compared with PyTorch.

    pip install torch transformers        # the peer; without them take --no-peer
    python benchmarks/gpu_train_step.py [--shape llama3.2-1b] [--batch 4] [--seq-len 4096]
    python benchmarks/gpu_train_step.py --gate            # is packing safe with this kernel?
    python benchmarks/gpu_train_step.py --shape tiny      # both sides, on a GPU or a CPU

Both sides compute in bfloat16, residual stream included, with float32 weights, gradients and
moments. llama_jax uses cuDNN's attention. The peer is transformers' model with PyTorch's flash
attention, torch.compile around model and loss, and fused AdamW. Rows are single texts. Each round
starts a new process for each side, which has all of the GPU's memory; later rounds reuse the
compiled programs.

MFU is relative to the GPU's dense bfloat16 peak (`llama_jax.runtime.chips`), with the causal count
(attention's lower half, `ModelConfig.flops_per_token`) and with the full one (all of attention).
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
from result import Result, add_json_option, append_result
from train_step import build_step

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


def run_in_new_process(function: Callable[..., Any], *args: Any) -> Any:
    """Runs `function` in a new process and returns its result after the process has ended."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def device() -> tuple[str, str]:
    """Returns JAX's platform and the kind of its first device."""
    import jax

    return jax.default_backend(), jax.devices()[0].device_kind


def random_tokens(args: argparse.Namespace) -> np.ndarray:
    vocabulary = SHAPES[args.shape].vocab_size
    return np.random.default_rng(0).integers(0, vocabulary, (args.batch, args.seq_len + 1))


def llama_jax(args: argparse.Namespace) -> Callable[[], Any]:
    """Returns a function that dispatches one step of llama_jax and returns its loss."""
    compute = {"attention": args.kernel, "remat": args.remat, "scan": args.scan}
    model = replace(SHAPES[args.shape], dtype=args.dtype, **compute)
    return build_step(model, random_tokens(args), segments=args.packed)


def transformers(args: argparse.Namespace) -> Callable[[], Any]:
    """Returns a function that dispatches one step of transformers and returns its loss."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama import modeling_llama

    on_gpu = args.platform == "gpu"
    if on_gpu and not torch.cuda.is_available():
        sys.exit("PyTorch sees no GPU where JAX does: install its CUDA build, or take --no-peer")
    platform = "cuda" if on_gpu else "cpu"
    # Under torch.compile before PyTorch 2.14, transformers creates a causal mask, which flash
    # attention rejects; without a mask transformers requests causal attention.
    modeling_llama.create_causal_mask = lambda *args, **kwargs: None
    shape = config_json(SHAPES[args.shape], None, ()) | {"use_cache": False}
    config = LlamaConfig.from_dict(shape, attn_implementation="sdpa")
    torch.manual_seed(0)
    with torch.device(platform):
        model = LlamaForCausalLM(config).float()
    settings = {"lr": 3e-4, "betas": (0.9, 0.95), "weight_decay": 0.1, "fused": True}
    adamw = torch.optim.AdamW(model.parameters(), **settings)
    tokens = torch.from_numpy(random_tokens(args)).to(platform)

    @torch.compile
    def mean_loss(inputs: Any, targets: Any) -> Any:
        # Autocast leaves the embeddings, and so the complete residual stream, in float32.
        embedded = model.get_input_embeddings()(inputs).to(getattr(torch, args.dtype))
        logits = model(inputs_embeds=embedded).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def step() -> Any:
        flash = sdpa_kernel(SDPBackend.FLASH_ATTENTION) if on_gpu else nullcontext()
        with flash, torch.autocast(platform, torch.bfloat16, enabled=on_gpu):
            loss = mean_loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
        return loss.detach()

    return step


def measure(side: Callable[..., Any], args: argparse.Namespace) -> tuple[float, float]:
    """Returns the seconds of a step and the last loss; synchronizes once, after the last step."""
    step = side(args)
    for _ in range(3):  # the first compiles
        float(step())
    start = time.perf_counter()
    for _ in range(args.steps - 1):
        step()
    loss = float(step())
    return (time.perf_counter() - start) / args.steps, loss


def compare(args: argparse.Namespace, kind: str) -> None:
    """Prints each round, the medians, and the median ratio of the pairs."""
    shape, peak = SHAPES[args.shape], peak_flops(LoggingConfig(), kind)
    peak_text = f"peak {peak / 1e12:.0f} TFLOP/s" if peak else "peak unknown: no MFU"
    print(f"{args.shape}, {shape.n_params:,} weights, {args.batch}×{args.seq_len} tokens a step")
    print(f"{kind}, {peak_text}; {args.dtype}, attention {args.kernel}, remat {args.remat}")
    sides = [llama_jax] if args.no_peer else [llama_jax, transformers]
    seconds: dict[str, list[float]] = {side.__name__: [] for side in sides}
    for number in range(1, args.rounds + 1):
        for side in sides:
            step_seconds, loss = run_in_new_process(measure, side, args)
            seconds[side.__name__].append(step_seconds)
            line = f"{side.__name__:12} {1e3 * step_seconds:8.1f} ms, loss {loss:.3f}"
            print(f"round {number}: {line}", flush=True)
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
        result = Result(
            name=f"a training step, {args.shape}, {kind}", unit="tokens/s",
            ours=rates["llama_jax"], peer="torch.compile", theirs=rates["transformers"],
            ratio=ratio, note=mfu.strip(),
        )  # fmt: skip
        append_result(args.json, result)


def gate(args: argparse.Namespace) -> str:
    """Checks that the kernel isolates documents; returns the message that it passed.

    Exits with a message that names the first output that fails.
    """
    import jax
    import jax.numpy as jnp

    from llama_jax.model.attention import attention
    from llama_jax.parallel.mesh import one_device_mesh, shard_array

    (N, K, H), T = SHAPES[args.shape].shape("NKH"), args.seq_len
    names = ("values", "gradient of q", "gradient of k", "gradient of v")
    draw = np.random.default_rng(0).standard_normal
    # Scores with a standard deviation of 2: few keys share a query's weight, so that an error in
    # each is visible.
    arrays = (2 * H**-0.5 * draw((2, T, N, H)), *(draw((2, T, n, H)) for n in (K, K, N)))
    *operands, d_out = (x.astype(jnp.bfloat16) for x in arrays)
    packed = np.where(np.arange(T) < np.array([[T // 3], [T // 2 + 1]]), 1, 2).astype(np.int32)

    @partial(jax.jit, static_argnums=0)
    def forward_and_gradients(
        kernel: str, q: Any, k: Any, v: Any, d_out: Any, segments: Any
    ) -> Any:
        out, vjp = jax.vjp(lambda q, k, v: attention(q, k, v, segments, kernel), q, k, v)
        return out, *vjp(d_out)

    def run(kernel: str, operands: Any, d_out: Any, segments: Any, dtype: Any = jnp.bfloat16):
        sharded = (shard_array(x.astype(dtype), "BTNH") for x in (*operands, d_out))
        ids = segments if segments is None else shard_array(segments, "BT")
        return [np.asarray(x, np.float32) for x in forward_and_gradients(kernel, *sharded, ids)]

    def check_isolation(case: str, mine: np.ndarray, segments: Any) -> None:
        """Exits if positions outside `mine` affect outputs in it, or receive gradient from it."""
        out, *grads = run(args.kernel, operands, d_out * mine[..., None, None], segments)
        for name, grad in zip(names[1:], grads, strict=True):
            if not grad[mine].any() or grad[~mine].any():
                sys.exit(f"gate: the {name} of {args.kernel} leaks {case}")
        changed = [np.where(mine[..., None, None], x, x.dtype.type(1e3)) for x in operands]
        if not np.array_equal(run(args.kernel, changed, d_out, segments)[0][mine], out[mine]):
            sys.exit(f"gate: the values of {args.kernel} leak {case}")

    worst = 0.0
    with jax.set_mesh(one_device_mesh()):
        for number in (1, 2):
            check_isolation(f"across the border of document {number}", packed == number, packed)
        check_isolation("from the future into the past", packed == 1, None)
        for case, segments in (("two documents", packed), ("no segments", None)):
            found = run(args.kernel, operands, d_out, segments)
            plain = run("xla", operands, d_out, segments)
            with jax.default_matmul_precision("highest"):
                exact = run("xla", operands, d_out, segments, jnp.float32)
            for name, a, b, c in zip(names, found, plain, exact, strict=True):
                # The unit is xla's error from bfloat16. The kernel's error may be twice as large
                # (as in FlashAttention's own tests), so 3 units from xla. The unit itself is at
                # most 16 roundings of 2^-8: of weights, their gradients, sums, results.
                unit, error = np.abs(b - c).max(), np.abs(a - b).max()
                if not (error <= 3 * unit and unit <= np.abs(c).max() / 16):
                    sys.exit(
                        f"gate: {name} of {args.kernel} and xla, {case}, differ by {error:.2e};"
                        f" allowed are 3 × {unit:.2e}, xla's own error from bfloat16"
                    )
                worst = max(worst, float(error / unit))
    return (
        f"gate: {args.kernel} passes at T={T}: nothing leaks across documents or from the future;"
        f" the largest difference from xla is {worst:.2f} (of 3) times xla's error from bfloat16"
    )


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
    add_json_option(parser)
    args = parser.parse_args()
    args.seq_len = args.seq_len or min(4096, SHAPES[args.shape].context)
    # Only one side uses the GPU at a time, so XLA may take nearly all memory, not three quarters.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    args.platform, kind = run_in_new_process(device)
    if not (on_gpu := args.platform == "gpu") and args.shape != "tiny":
        sys.exit(f"{args.shape} needs an NVIDIA GPU, and JAX finds none here; take --shape tiny")
    # XLA's CPU backend lacks some bfloat16 products: on a CPU both sides compute in float32.
    args.kernel, args.dtype = ("cudnn", "bfloat16") if on_gpu else ("xla", "float32")
    peers = [importlib.util.find_spec(name) for name in ("torch", "transformers")]
    if not (args.no_peer or args.gate or all(peers)):
        sys.exit("the peer needs torch and transformers: install them, or take --no-peer")
    if args.gate:
        print(run_in_new_process(gate, args))
        return
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache)
        compare(args, kind)


if __name__ == "__main__":
    main()
