"""Estimates runs that others published, from their own programs, as `llama-jax plan` does.

    git clone https://github.com/jax-ml/jax-llm-examples     # needs etils and flatbuffers
    python benchmarks/calibrate.py jax-llm-examples jax-llm-examples/llama3 --batch 8 --slots 2048

    pip install 'maxtext[tpu]==0.2.5'       # Python 3.12, in an environment of its own
    PYTHONPATH=. python benchmarks/calibrate.py maxtext llama3.1-8b-v6e-256

No TPU is needed. Each command compiles the program of the published run for its topology and
prints the estimate and its parts as JSON [s]. `llama_jax/plan/published_runs.yaml` has the
estimates beside the measurements. A compilation of MaxText's step takes minutes.
"""

# pyright: reportMissingImports=false

import argparse
import dataclasses
import json
import sys
import time
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from maxtext_recipes import RECIPES, Recipe

from llama_jax.config.family import FAMILY
from llama_jax.config.mesh import MeshConfig
from llama_jax.config.run import Config, DataConfig, TrainingConfig
from llama_jax.errors import InputError
from llama_jax.plan import topology
from llama_jax.plan.compiler import CompiledProgram, bytes_per_device, compile_program
from llama_jax.plan.program_time import DEPTHS, estimate_time
from llama_jax.plan.topology import Pod
from llama_jax.plan.training import TrainingPlan, estimate_step

LLAMA31_70B = {
    "hidden_size": 8192, "intermediate_size": 28_672, "num_attention_heads": 64,
    "num_key_value_heads": 8, "num_hidden_layers": 80, "head_dim": 128, "vocab_size": 128_256,
    "rope_theta": 500_000.0,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def compile_known(lowered: Any, pod: Pod, options: dict[str, str]) -> CompiledProgram:
    """Compiles a program; options that this version of libtpu lacks are left out and named."""
    options = dict(options)
    while True:
        try:
            return compile_program(lowered, pod.chip, options, "the recipe")
        except InputError as error:
            unknown = next((name for name in options if f"'{name}'" in str(error)), None)
            if unknown is None:
                raise
            log(f"this libtpu has no option {unknown}: left out")
            del options[unknown]


def estimate_maxtext(recipe: Recipe) -> dict[str, Any]:
    """Returns the estimate of a training step of MaxText, as `plan` computes it for our own."""
    pod = topology.parse(recipe.pod)
    plan = TrainingPlan(
        # remat 'full': MaxText's policies save no result of attention either, so that its kernel
        # runs again in the backward pass.
        config=Config(
            model=dataclasses.replace(FAMILY[recipe.model], remat="full"),
            mesh=MeshConfig(data=1, fsdp=pod.n_devices),
            data=DataConfig(
                mixture={"x": 1.0}, batch_size=recipe.rows * pod.n_chips, seq_len=recipe.seq_len
            ),
            training=TrainingConfig(out="x", steps=1),
        ),
        pod=pod,
    )
    topology.devices(pod)  # sets the variables that libtpu reads
    start = time.monotonic()
    complete, one, two = (
        compile_maxtext(recipe, pod, n_layers, scan) for n_layers, scan in
        ((plan.config.model.n_layers, True), (1, False), (2, False))
    )  # fmt: skip
    estimate_step(plan, complete, one, two, {"fsdp": pod.n_devices})
    return {
        "seconds": plan.step_seconds,
        "compiler": plan.compiler_seconds,
        "attention": plan.attention_seconds,
        "exposed": plan.exposed_seconds,
        "traffic": {kind: total._asdict() for kind, total in plan.traffic.items()},
        "mfu_causal": plan.mfu(plan.step_seconds),
        "hfu": plan.hfu,
        "peak_gib": complete.peak_bytes / 2**30,
        "layer_seconds": two.seconds - one.seconds,
        "layer_flops": two.flops - one.flops,
        "layer_cycles": sum(e.cycles for e in two.events) - sum(e.cycles for e in one.events),
        "versions": versions("maxtext", "jax", "libtpu"),
        "compile_seconds": time.monotonic() - start,
    }


def compile_maxtext(recipe: Recipe, pod: Pod, n_layers: int, scan: bool) -> CompiledProgram:
    """Compiles MaxText's training step, as its own `train_compile.py` does."""
    import jax
    from flax.core.spmd import logical_axis_rules
    from maxtext.configs import pyconfig
    from maxtext.trainers.pre_train import train, train_compile
    from maxtext.utils import maxtext_utils, sharding

    log(f"compiling {n_layers} layer(s), {'scanned' if scan else 'unrolled'} …")
    settings = {
        "model_name": recipe.model,
        "per_device_batch_size": recipe.rows / pod.chip.devices_per_chip,
        "max_target_length": recipe.seq_len,
        "compile_topology": recipe.accelerator,
        "compile_topology_num_slices": 1,
        "base_num_decoder_layers": n_layers,
        "override_model_config": True,
        "scan_layers": scan,
        "ici_fsdp_parallelism": -1,
        "attention": "flash",
        "use_iota_embed": True,
        "dataset_type": "synthetic",
        "enable_checkpointing": False,
        "skip_jax_distributed_system": True,
        "run_name": "calibrate",
        "base_output_directory": "/nowhere",
    } | recipe.settings
    base = files("maxtext") / "configs" / "base.yml"
    config = pyconfig.initialize(["", str(base), *(f"{k}={v}" for k, v in settings.items())])
    mesh = train_compile.get_topology_mesh(config)
    arguments, keywords, state_shardings, _, model = train_compile.get_shaped_inputs(mesh, config)
    params_shardings, state_shardings = sharding.maybe_update_params_sharding_with_opt(
        config, state_shardings
    )
    step, in_shardings, out_shardings, static, donated = (
        maxtext_utils.get_functional_train_with_signature(
            train.train_step, sharding.get_input_data_sharding(config, mesh), state_shardings,
            model, config, params_shardings,
        )
    )  # fmt: skip
    with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
        jitted = jax.jit(
            step, in_shardings=in_shardings, out_shardings=out_shardings, static_argnums=static,
            donate_argnums=donated,
        )  # fmt: skip
        lowered = jitted.lower(*arguments, **keywords)
    return compile_known(lowered, pod, recipe.options)


def estimate_decoding(folder: str, batch: int, slots: int, data: int) -> dict[str, Any]:
    """Returns the estimate of a decode step of jax-llm-examples: Llama 3.1 70B on 16 v5e.

    Weights and cache are int8, and attention is XLA's, as in its main.py.
    """
    pod = topology.parse("v5e:4x4")
    devices = topology.devices(pod)
    sys.path.insert(0, folder)
    import jax
    import jax.numpy as jnp
    from jax.experimental import mesh_utils
    from jax.sharding import AxisType, PartitionSpec
    from llama3_jax import model as peer

    shape = data, 8, len(devices) // 8 // data
    mesh = jax.sharding.Mesh(
        mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True),
        ("x", "y", "z"),
        axis_types=(AxisType.Explicit,) * 3,
    )
    n_layers, programs, bytes_read = LLAMA31_70B["num_hidden_layers"], [], 0
    for depth in DEPTHS:
        log(f"compiling {depth} layers …")
        config = dataclasses.replace(
            peer.llama_to_jax_config(LLAMA31_70B | {"num_hidden_layers": depth}),
            mesh=mesh, max_seq_len=slots, quant_layer=True, quant_cache=True,
        )  # fmt: skip

        def abstract(kind: Any, *arguments: Any, config: Any = config) -> Any:
            return jax.tree.map(
                lambda info, s: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=s),
                kind.abstract(config, *arguments), kind.shardings(config, *arguments),
                is_leaf=peer.is_param,
            )  # fmt: skip

        weights, cache = abstract(peer.Weights), abstract(peer.KVCache, batch)
        by_batch = jax.NamedSharding(mesh, PartitionSpec("x", None))
        tokens = jax.ShapeDtypeStruct((batch, 1), jnp.int32, sharding=by_batch)
        with jax.set_mesh(mesh):
            lowered = peer.decode_step.lower(tokens, weights, cache, config)
        programs.append(compile_program(lowered, pod.chip, {}, "--batch or --slots"))
        layers = bytes_per_device((weights.layers, cache.k, cache.v))
        bytes_read = n_layers * layers // depth + bytes_per_device(weights.lm_head)
    times = estimate_time(programs, n_layers, bytes_read, pod)
    return {"seconds": times.estimate, **dataclasses.asdict(times),
            "versions": versions("jax", "libtpu")}  # fmt: skip


def versions(*packages: str) -> str:
    return ", ".join(f"{name} {version(name)}" for name in packages)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="program", required=True)
    maxtext = commands.add_parser("maxtext", help="a training step of MaxText")
    maxtext.add_argument("recipe", choices=RECIPES)
    decoding = commands.add_parser("jax-llm-examples", help="a decode step of 70B on 16 v5e")
    decoding.add_argument("folder", help="llama3/ of a clone of jax-llm-examples")
    decoding.add_argument("--batch", type=int, default=8)
    decoding.add_argument("--slots", type=int, default=2048, help="of the cache, in each row")
    decoding.add_argument("--data", type=int, default=1, help="replicas; each has 16 / DATA chips")
    args = parser.parse_args()
    if args.program == "maxtext":
        figures = estimate_maxtext(RECIPES[args.recipe])
    else:
        figures = estimate_decoding(args.folder, args.batch, args.slots, args.data)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
