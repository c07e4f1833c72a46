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
from typing import Any, NamedTuple

from llama_jax.config.family import FAMILY
from llama_jax.config.mesh import MeshConfig
from llama_jax.config.run import Config, DataConfig, TrainingConfig
from llama_jax.errors import InputError
from llama_jax.plan import topology
from llama_jax.plan.compiler import CompiledProgram, bytes_per_device, compile_program
from llama_jax.plan.program_time import DEPTHS, estimate_time
from llama_jax.plan.topology import Pod
from llama_jax.plan.training import TrainingPlan, estimate_step

# Groups of XLA options of MaxText's benchmarks/xla_flags_library.py, of its tag tpu-recipes-v0.1.4.
GATHER_FUSION = {
    "xla_tpu_enable_async_collective_fusion": "true",
    # The recipes request this too, but libtpu 0.0.52 refuses it, except on v5e.
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "false",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    "xla_enable_async_all_gather": "true",
}
DATA_PARALLEL = {
    "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
    "xla_tpu_data_parallel_opt_different_sized_ops": "true",
}
SCATTER_LAYOUT = {
    "xla_tpu_use_minor_sharding_for_major_trivial_input": "true",
    "xla_tpu_relayout_group_size_threshold_for_reduce_scatter": "1",
    "xla_tpu_assign_all_reduce_scatter_layout": "true",
}
SPARSE_CORE_ALL_REDUCE = {
    "xla_sc_disable_megacore_partitioning": "true",
    "xla_tpu_enable_all_reduce_offload_tracing": "true",
    "xla_tpu_use_tc_device_shape_on_sc": "true",
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": "true",
    "xla_sc_disjoint_spmem": "false",
}
HOST_OFFLOAD = {
    "xla_tpu_enable_all_experimental_scheduler_features": "true",
    "xla_tpu_enable_scheduler_memory_pressure_tracking": "true",
    "xla_tpu_host_transfer_overlap_limit": "24",
    "xla_tpu_aggressive_opt_barrier_removal": "ENABLED",
    "xla_lhs_prioritize_async_depth_over_stall": "ENABLED",
    "xla_tpu_enable_ag_backward_pipelining": "true",
    "xla_should_allow_loop_variant_parameter_in_chain": "ENABLED",
    "xla_should_add_loop_invariant_op_in_chain": "ENABLED",
    "xla_max_concurrent_host_send_recv": "100",
    "xla_tpu_scheduler_percent_shared_memory_limit": "100",
    "xla_latency_hiding_scheduler_rerun": "2",
}
NO_COLLECTIVE_MATMUL = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
LARGE_VMEM = {"xla_tpu_scoped_vmem_limit_kib": "98304"}

# Settings of MaxText's benchmarks/maxtext_trillium_model_configs.py and …_v5p_model_configs.py.
LARGE_BLOCKS = {
    f"sa_block_{name}": 2048
    for name in (*("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq"),)
} | {"sa_use_fused_bwd_kernel": True}


def offloaded(*names: str) -> dict[str, str]:
    return {"remat_policy": "custom"} | dict.fromkeys(names, "offload")


class Recipe(NamedTuple):
    """A published run of MaxText.

    Attributes:
        pod: topology.
        accelerator: MaxText's name of the topology.
        model: member of `FAMILY`; MaxText has the same names.
        rows: rows of a chip.
        seq_len: tokens of a row.
        settings: MaxText's settings.
        options: XLA options.
    """

    pod: str
    accelerator: str
    model: str
    rows: int
    seq_len: int
    settings: dict[str, Any]
    options: dict[str, str]


OFFLOAD_8B = offloaded("decoder_layer_input", "out_proj", "query_proj", "key_proj", "value_proj")
OFFLOAD_70B = offloaded("decoder_layer_input", "query_proj", "key_proj", "value_proj")
V6E = LARGE_VMEM | SCATTER_LAYOUT | DATA_PARALLEL | GATHER_FUSION | HOST_OFFLOAD
V5P = DATA_PARALLEL | GATHER_FUSION
V6E_8B = V6E | SPARSE_CORE_ALL_REDUCE


def on_v6e(
    model: str, shape: str, rows: int, settings: dict[str, Any], options: dict[str, str]
) -> Recipe:
    pod = topology.parse(f"v6e:{shape}")
    accelerator = f"v6e-{pod.n_chips}"
    return Recipe(str(pod), accelerator, model, rows, 8192, settings | LARGE_BLOCKS, options)


def of_8b(shape: str, rows: int, options: dict[str, str] = V6E_8B) -> Recipe:
    return on_v6e("llama3.1-8b", shape, rows, OFFLOAD_8B, options)


def of_70b(shape: str, rows: int, options: dict[str, str] = V6E, **settings: Any) -> Recipe:
    return on_v6e("llama3.1-70b", shape, rows, OFFLOAD_70B | settings, options)


RECIPES = {
    "llama3.1-8b-v6e-8": of_8b("2x4", 3, V6E_8B | NO_COLLECTIVE_MATMUL),
    "llama3.1-8b-v6e-16": of_8b("4x4", 3, V6E_8B | NO_COLLECTIVE_MATMUL),
    "llama3.1-8b-v6e-32": of_8b("4x8", 3, V6E_8B | NO_COLLECTIVE_MATMUL),
    "llama3.1-8b-v6e-64": of_8b("8x8", 5),
    "llama3.1-8b-v6e-128": of_8b("8x16", 4),
    "llama3.1-8b-v6e-256": of_8b("16x16", 4),
    "llama3.1-70b-v6e-32": of_70b("4x8", 2, V6E | NO_COLLECTIVE_MATMUL, weight_dtype="bfloat16"),
    "llama3.1-70b-v6e-64": of_70b("8x8", 2),
    "llama3.1-70b-v6e-128": of_70b("8x16", 4),
    "llama3.1-70b-v6e-256": of_70b("16x16", 5),
    "llama2-7b-v5p-128": Recipe(
        "v5p:4x4x4", "v5p-128", "llama2-7b", 4, 4096, {"remat_policy": "minimal"}, V5P
    ),
    "llama2-70b-v5p-1024": Recipe(
        "v5p:8x8x8", "v5p-1024", "llama2-70b", 4, 4096,
        {"remat_policy": "save_dot_except_mlpwi"}, V5P,
    ),
    # Of MaxText's commit 3eb77db.
    "llama3.1-405b-v5p-1024": Recipe(
        "v5p:8x8x8", "v5p-1024", "llama3.1-405b", 2, 8192,
        offloaded("context", "mlpwo") | LARGE_BLOCKS
        | {"sa_use_fused_bwd_kernel": False, "num_vocab_tiling": 4},
        LARGE_VMEM | GATHER_FUSION | HOST_OFFLOAD,
    ),
}  # fmt: skip

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
            mesh=MeshConfig(data=1, fsdp=pod.n_chips),
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
    estimate_step(plan, complete, one, two, {"fsdp": pod.n_chips})
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
        "per_device_batch_size": recipe.rows,
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
