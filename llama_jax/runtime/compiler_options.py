"""XLA options of the training step on TPUs: collectives that overlap compute, and matmul tiles."""

# Chips whose SparseCore can drive the network while the TensorCore computes: it runs all-gathers
# and reduce-scatters. All-reduces stay with the TensorCore: tried on v5p, the compiler of libtpu
# 0.0.42.1 overflows its stack at large ones.
_OFFLOAD = "xla_tpu_enable_sparse_core_collective_offload_"
SPARSE_CORE_OFFLOAD = {
    _OFFLOAD + "all_gather": "true",
    # The same over two dimensions of the network at once.
    _OFFLOAD + "2d_all_gather": "true",
    _OFFLOAD + "reduce_scatter": "true",
    # The SparseCore uses the TensorCore's layout, and one program serves both cores of a chip.
    "xla_tpu_use_tc_device_shape_on_sc": "true",
    "xla_sc_disable_megacore_partitioning": "true",
    # The offload of all-gathers requires both: they are traced, and not fused into matmuls.
    "xla_tpu_enable_all_gather_offload_tracing": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "false",
}

# Twice the default VMEM for the tiles of a matmul: a layer of 7B takes 27.7 ms instead of 28.2, by
# the compiler's cycle count 46.1 million instead of 54.6. Four times gives 27.5 ms, but compiling
# takes three times as long again.
LARGE_TILES = {"xla_tpu_scoped_vmem_limit_kib": "32768"}

# Chips without a SparseCore, or with an old one: the TensorCore drives the network as well.
OVERLAP = {
    # All-gathers of weights run in steps inside the matmuls that they overlap.
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    # One all-gather may span several matmuls.
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
}
