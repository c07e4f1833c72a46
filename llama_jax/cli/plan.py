"""`llama-jax plan`."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from llama_jax.cli.arguments import add_config, parse_picture
from llama_jax.errors import InputError, install_command

MANUAL = f"""\
Estimate the memory, step time and MFU of a training run on a TPU pod, without the pod; or the
memory of a run on GPUs, without the GPUs.

XLA's TPU compiler, which needs no TPU, compiles the training step itself. Install it:
  {install_command("plan")}

It compiles the step three times: complete, for its memory and schedule, and unrolled with one layer
and with two, for the cost of a layer and of the rest, because its cost model counts the body of a
loop only once. All figures are estimates:

  the compiler's estimate  its cost model, of all operations except attention kernels and
                           communication
  attention                a model: 7 products (9 if the backward pass recomputes them), half of
                           them masked, at 50 % of the peak (less for heads below 128)
  exposed communication    the complete schedule is simulated, with all iterations of its loops:
                           one collective at a time, at the full speed of the links; compute waits
                           for data that has not arrived

MFU counts the model's own FLOPs, with the causal half of attention or with all of attention (full).
HFU also counts recomputed FLOPs. --search tries meshes, rematerialization and micro-batches: it
rejects by arithmetic the combinations that can't fit, compiles the fastest of the others, and ranks
them.

--inference estimates serving instead, for a model folder, a member of the family by name, or the
model of a configuration file. Each slice has all weights; each layer is sharded over all chips of
its slice, and key/value heads are replicated if there are fewer of them. Estimates of a step:

  memory     weights and all slots of the KV cache are read once, at the memory's bandwidth
  compute    the program's FLOPs at the peak
  network    its collectives, one after the other: bytes over the links, and 1 µs for each link
             that a message crosses
  cycles     the compiler's own count for all operations, at the chip's clock
  compiler   the sum of its cost model, without network; it counts data that stays in the chip's
             fast memory as read from the large memory, so it is far too high for decoding
  roofline   the largest of memory, compute and network, as if they overlapped completely
  estimate   the largest of memory, compute and cycles, plus the network, which is not overlapped

The step is compiled with two layers and with three, and extrapolated. The decoding loop is compiled
with all layers, for its memory. The estimates exclude sampling, and the wait for prefetched data.

For GPUs (--topology h100:8, or 4*h100:8 for four nodes) the plan has the memory alone, and the time
in which a decode step can read weights and cache: XLA compiles for GPUs that are not there, but has
no estimates of time for them. This needs JAX 0.11 or later and its compiler for GPUs:
  {install_command("gpu")}

Steps of training and of decoding are also corrected: others measured runs on some of these chips,
and the estimates of their programs by the same method show how far it is off. The last lines say
from how many runs. docs/plan.md explains the tables.

example:
  llama-jax plan configs/llama-7b.yaml --topology v5p:4x4x4 --picture 7b.png
  llama-jax plan configs/llama-65b.yaml --topology v5p:8x8x16 --json
  llama-jax plan configs/llama3-8b.yaml --topology '2*v5e:16x16' --search
  llama-jax plan llama2-70b --inference --topology v5e:4x4 --context 4096 --batch 8
  llama-jax plan configs/llama-7b.yaml --topology h100:8 mesh.fsdp=8 data.batch_size=32
"""

_INFERENCE_FLAGS = ("context", "batch", "dtype", "cache", "quantize")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add_config(parser)
    parser.add_argument(
        "--topology", required=True, metavar="POD", help="v5p:4x4x4, 2*v5e:16x16, h100:8 …"
    )
    parser.add_argument("--json", action="store_true", help="print JSON: bytes, seconds, fractions")
    parser.add_argument(
        "--picture", metavar="FILE", help="also draw memory and time: FILE.png or FILE.svg"
    )
    parser.add_argument("--search", action="store_true", help="search for the fastest settings")
    parser.add_argument(
        "--compile", type=int, default=4, metavar="N",
        help="number of settings that --search compiles (4)",
    )  # fmt: skip
    parser.add_argument(
        "--inference", action="store_true",
        help="plan serving; CONFIG may be a model folder or a member of the family",
    )  # fmt: skip
    parser.add_argument(
        "--context", type=int, metavar="T",
        help="slots of a row (4096, or the model's context if that is shorter)",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, metavar="B", help="rows per slice (8)")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], help="of weights and activations (bfloat16)"
    )
    parser.add_argument("--cache", choices=["same", "int8"], help="of the KV cache (the model's)")
    parser.add_argument("--quantize", choices=["int8"], help="of the matrices (the model's)")


def run(args: argparse.Namespace) -> int:
    """Prints the plan; returns the exit code: 0 if the program fits into memory, 1 if not."""
    return _plan_inference(args) if args.inference else _plan_training(args)


def _plan_training(args: argparse.Namespace) -> int:
    from llama_jax.config import yaml_file
    from llama_jax.config.family import FAMILY

    if given := [name for name in _INFERENCE_FLAGS if getattr(args, name) is not None]:
        raise InputError(f"--{given[0]} is for plan --inference: add --inference, or omit the flag")
    if not yaml_file.find(args.config).is_file() and (
        args.config in FAMILY or Path(args.config).is_dir()
    ):
        raise InputError(
            f"{args.config} is a model, and a training run needs a configuration file: give one, or"
            f" add --inference to plan serving {args.config}"
        )
    config = yaml_file.load(args.config, args.overrides)
    from llama_jax.plan import figure, search, topology, training, training_report
    from llama_jax.runtime.console import print_status

    pod = topology.parse(args.topology)
    picture = args.picture and parse_picture(args.picture)
    if args.compile < 1:
        raise InputError(f"--compile must be at least 1, not {args.compile}")
    if args.search and pod.chip.gpu:
        raise InputError(
            f"--search ranks by estimates of time, which XLA has only for TPUs: omit it for {pod}"
        )
    if args.search:
        plans = search.find_fastest(config, pod, args.compile, print_status)
    else:
        plans = [training.plan_training(config, pod, print_status)]
    if picture:
        figure.draw_chart(picture, figure.chart_training(plans[0]))
    if args.json:
        dicts = [training_report.as_dict(plan) for plan in plans]
        print(json.dumps(dicts if args.search else dicts[0], indent=1))
    else:
        training_report.show(plans[0])
    if args.search and not args.json:
        training_report.show_ranking(plans)
        print(f"\nthe fastest, for the configuration file:\n{search.as_yaml(plans[0].config)}")
    return 0 if plans[0].fits else 1


def _plan_inference(args: argparse.Namespace) -> int:
    from llama_jax.checkpoint import folders
    from llama_jax.config import yaml_file
    from llama_jax.config.family import FAMILY

    if args.search:
        raise InputError("--search is for training runs: omit it with --inference")
    file = yaml_file.find(args.config)
    if args.overrides and not file.is_file():
        raise InputError(f"{args.overrides[0]}: only a configuration file can have overrides")
    if args.config in FAMILY and not args.overrides:
        config = FAMILY[args.config]
    elif file.is_file():
        config = yaml_file.load(file, args.overrides).model
    elif Path(args.config).is_dir():
        config = folders.read_model_config(args.config)
    else:
        raise InputError(
            f"there is no {args.config}: give a model folder, a configuration file, or one of"
            f" {', '.join(FAMILY)}"
        )
    from llama_jax.plan import figure, serving, serving_report, topology
    from llama_jax.runtime.console import print_status

    picture = args.picture and parse_picture(args.picture)
    dtype = args.dtype or "bfloat16"
    config = replace(
        config,
        dtype=dtype,
        param_dtype=dtype,
        cache_dtype=args.cache or config.cache_dtype,
        quantized=args.quantize or config.quantized,
    )
    context = min(4096, config.context) if args.context is None else args.context
    batch = 8 if args.batch is None else args.batch
    pod = topology.parse(args.topology)
    plan = serving.plan_inference(config, pod, context, batch, print_status)
    if picture:
        figure.draw_chart(picture, figure.chart_inference(plan))
    if args.json:
        print(json.dumps(serving_report.as_dict(plan), indent=1))
    else:
        serving_report.show(plan)
    return 0 if plan.fits else 1
