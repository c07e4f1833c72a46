"""The recipes of published runs of MaxText: topology, batch, settings and XLA options."""

from typing import Any, NamedTuple

from llama_jax.plan import topology

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
BLOCKS = dict.fromkeys(
    (f"sa_block_{name}" for name in ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute")),
    2048,
)
LARGE_BLOCKS = BLOCKS | {"sa_block_q_dq": 2048, "sa_block_kv_dq": 2048}
LARGE_BLOCKS |= {"sa_use_fused_bwd_kernel": True}


def stored(where: str, *names: str) -> dict[str, str]:
    """Returns the settings that store these results of the forward pass on the device or host."""
    return {"remat_policy": "custom"} | dict.fromkeys(names, where)


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


OFFLOAD_8B = stored(
    "offload", "decoder_layer_input", "out_proj", "query_proj", "key_proj", "value_proj"
)
OFFLOAD_70B = stored("offload", "decoder_layer_input", "query_proj", "key_proj", "value_proj")
V6E = LARGE_VMEM | SCATTER_LAYOUT | DATA_PARALLEL | GATHER_FUSION | HOST_OFFLOAD
QKV = "query", "key", "value", "qkv"
IRONWOOD = {
    "opt_type": "adamw", "mu_dtype": "bfloat16", "sa_use_fused_bwd_kernel": True,
    "sa_q_layout": "SEQ_MINOR", "sa_k_layout": "SEQ_MINOR", "sa_v_layout": "HEAD_DIM_MINOR",
    "use_tokamax_splash": True,
}  # fmt: skip
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
        stored("offload", "context", "mlpwo") | LARGE_BLOCKS
        | {"sa_use_fused_bwd_kernel": False, "num_vocab_tiling": 4},
        LARGE_VMEM | GATHER_FUSION | HOST_OFFLOAD,
    ),
    # The recipe of tpu-recipes/training/ironwood; a chip is two devices.
    "llama3.1-70b-tpu7x-128": Recipe(
        "tpu7x:4x4x4", "tpu7x-128", "llama3.1-70b", 4, 8192,
        stored("device", "decoder_layer_input", "context", *(f"{x}_proj" for x in QKV))
        | BLOCKS | IRONWOOD,
        {
            "xla_tpu_scoped_vmem_limit_kib": "61440",
            "xla_tpu_bf16_emission_mode": "NATIVE_EMISSION",
            "xla_tpu_enable_sparse_core_collective_offload_all_reduce": "true",
            "xla_tpu_use_single_sparse_core_for_all_gather_offload": "true",
        },
    ),
}  # fmt: skip
