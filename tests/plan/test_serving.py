import dataclasses
import json

import jax
import pytest
from conftest import mesh_of, peer, tiny_model

from llama_jax.cli.main import main
from llama_jax.config.family import FAMILY
from llama_jax.errors import InputError
from llama_jax.model.cache import init_cache
from llama_jax.model.weights import Llama
from llama_jax.parallel.mesh import one_device_mesh, tensor_sizes
from llama_jax.plan import serving, serving_program, serving_report, topology
from llama_jax.plan.compiler import DoesNotFit
from llama_jax.plan.program_time import ProgramTime, collective_seconds
from llama_jax.plan.schedule import Collective
from llama_jax.plan.serving import InferencePlan, WeightBytes
from llama_jax.runtime.chips import PLANNABLE_CHIPS

GIB = 2**30
CACHE_BYTES_PER_ROW = 2 * 2 * 256 * 128 * 2  # L, keys and values, S, H of one head, bfloat16


def model(**changes):
    return tiny_model(
        dim=256, hidden_dim=512, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=128, context=256,
        vocab_size=1024, dtype="bfloat16", param_dtype="bfloat16", **changes,
    )  # fmt: skip


def plan_of(name: str, batch: int = 8, **changes) -> InferencePlan:
    """Returns a plan of a family member on v5e:4x4, with nothing compiled."""
    config = FAMILY[name]
    plan = InferencePlan(
        config=config, pod=topology.parse("v5e:4x4"), context=4096,
        batch=batch, weights=WeightBytes(embedding=2**25, layers=8 * GIB, head=2**25),
        cache_bytes_per_row=GIB // 8,
    )  # fmt: skip
    return dataclasses.replace(plan, **changes)


@pytest.mark.parametrize("cache_dtype", ["same", "int8"])
def test_planned_bytes_are_those_of_the_real_model_and_its_cache(cache_dtype):
    config = model(cache_dtype=cache_dtype)
    with jax.set_mesh(one_device_mesh()):
        cache = jax.eval_shape(lambda: init_cache(config, 1, 32).layers)
        llama = jax.eval_shape(lambda: Llama(config, jax.random.key(0)))
    weights, row = serving.weight_and_cache_bytes(config, one_device_mesh(), 32)
    assert row == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    assert sum(weights) == sum(2 * x.size for x in jax.tree.leaves(llama)) == 2 * config.n_params
    assert weights.embedding == 2 * 1024 * 256


def test_int8_matrices_take_half_the_bytes_plus_their_scales():
    plain, int8 = (
        serving.weight_and_cache_bytes(model(quantized=quantized), one_device_mesh(), 256)[0]
        for quantized in ("none", "int8")
    )
    outputs = 4 * 128 + 2 * 2 * 128 + 256 + 2 * 512 + 256  # q, k and v, wo, w1 and w3, w2
    matrices = plain.layers - 2 * 2 * 2 * 256  # all but two norms in each of two layers
    assert int8.layers == plain.layers - matrices // 2 + 2 * 4 * outputs


def test_key_value_heads_are_copied_where_there_are_more_chips():
    mesh = mesh_of((1, 1, 4))
    layer = serving_program.abstract_weights(model(), mesh).layers[0]
    assert 4 in jax.tree.leaves(layer.wk)[0].shape
    _, row = serving.weight_and_cache_bytes(model(), mesh, 256)
    assert row == CACHE_BYTES_PER_ROW


def test_a_decode_step_reads_the_embedding_only_if_it_is_the_head_too():
    plan = plan_of("llama2-70b")
    assert serving.decode_step_bytes(plan, 8) == 8 * GIB + 2**25 + 8 * GIB // 8
    weights = WeightBytes(embedding=2**25, layers=8 * GIB, head=2**10)
    tied = plan_of("llama3.2-3b", weights=weights, cache_bytes_per_row=0)
    assert serving.decode_step_bytes(tied, 8) == 8 * GIB + 2**25


def test_prefill_counts_two_flops_per_weight_and_half_of_attention():
    config = FAMILY["llama2-7b"]
    layers = config.n_params - 2 * 32_000 * 4096
    expected = 2 * layers * 1024 + 2 * 32_000 * 4096 + 32 * 2 * 4096 * 1024**2
    assert serving.prefill_flops(config, 1024) == pytest.approx(expected)


def test_the_largest_batch_fits_and_one_more_does_not():
    """A row takes more than its cache; two compiled batches show how much."""
    plan = plan_of("llama2-70b", prefill_bytes=GIB)
    compiled = []

    def peak_bytes(batch: int) -> float:
        compiled.append(batch)
        return 9 * GIB + batch * 0.15 * GIB

    plan.decode_peak_bytes = peak_bytes(8)
    serving._find_largest_batch(plan, peak_bytes)
    assert plan.largest_batch == 45 == int((15.75 - 9) / 0.15)
    assert plan.largest_batch_bytes == peak_bytes(45) <= plan.usable_bytes < peak_bytes(46)
    assert plan.decode_bytes_per_row == pytest.approx(0.15 * GIB)
    assert len(compiled) <= 6
    assert plan.largest_context == pytest.approx(45 * 4096, rel=0.01)


def test_the_largest_batch_leaves_memory_for_the_prefill_of_a_prompt():
    plan = plan_of("llama2-70b", prefill_bytes=4 * GIB)
    plan.decode_peak_bytes = 9 * GIB
    serving._find_largest_batch(plan, lambda batch: 8 * GIB + batch * GIB / 8)
    limit = (plan.usable_bytes - sum(plan.weights) - 4 * GIB) / plan.cache_bytes_per_row
    assert limit - 1 < plan.largest_batch <= limit


def test_no_row_fits_where_the_weights_alone_do_not():
    weights = WeightBytes(embedding=0, layers=17 * GIB, head=0)
    plan = plan_of("llama2-70b", weights=weights, decode_peak_bytes=18.0 * GIB)
    serving._find_largest_batch(plan, lambda _: pytest.fail("nothing should be compiled"))
    assert plan.largest_batch == 0
    assert not plan.fits


def test_an_estimate_is_the_longest_of_memory_compute_and_cycles_plus_the_network():
    time = ProgramTime(memory=3, compute=1, network=2, cycles=2, compiler=9)
    assert time.estimate == 5
    assert dataclasses.replace(time, cycles=4).estimate == 6
    assert dataclasses.replace(time, cycles=4).roofline == 3
    assert dataclasses.replace(time, network=4).bound == "network"


def test_an_all_reduce_crosses_a_slice_twice():
    # The 4 × 4 dimensions of v5e are lines: 6 links between corners, and a corner sends over two.
    pod = topology.parse("v5e:4x4")
    all_reduce = Collective("all-reduce", 90e3, 16)
    all_gather = Collective("all-gather", 90e3, 16)
    assert collective_seconds(all_reduce, pod) == pytest.approx(1e-6 + 12e-6)
    assert collective_seconds(all_gather, pod) == pytest.approx(1e-6 + 6e-6)
    neighbors = Collective("all-to-all", 45e3, 2)
    assert collective_seconds(neighbors, pod) == pytest.approx(1e-6 + 1e-6)
    assert [topology.parse(t).hops for t in ("v5e:16x16", "v5p:4x4x8", "v5p:2x2x1")] == [16, 8, 2]


def test_slices_generate_tokens_in_parallel():
    time = ProgramTime(memory=0.01, compute=0.0, network=0.0, cycles=0.0, compiler=0.0)
    plan = plan_of("llama2-70b", decode_times={8: time})
    assert plan.tokens_per_second(8) == pytest.approx(800)
    two_slices = dataclasses.replace(plan, pod=plan.pod._replace(n_slices=2))
    assert two_slices.tokens_per_second(8) == pytest.approx(1600)


def test_impossible_serving_plans_are_rejected(capsys):
    config = FAMILY["llama2-7b"]
    with pytest.raises(InputError, match=r"--context 4097 is not in 1 … 4096"):
        serving.check_context_and_batch(config, 4097, 1)
    with pytest.raises(InputError, match=r"--batch must be at least 1, not 0"):
        serving.check_context_and_batch(config, 4096, 0)
    with pytest.raises(InputError, match=r"over the 64 chips .* 1, 2, 4, 8, 16, 32$"):
        serving_program.slice_mesh(config, topology.parse("v5e:8x8"))
    assert tensor_sizes(config) == [1, 2, 4, 8, 16, 32]
    for words, sentence in [
        (["llama2-7b", "--inference", "--topology", "v5e:3"], "v5e has a network of 2 dimensions"),
        (["llama9", "--inference", "--topology", "v5e:2x2"], "there is no llama9: give a model"),
        (["llama2-7b", "a.b=1", "--inference", "--topology", "v5e:2x2"], "can have overrides"),
        (["x.yaml", "--batch", "3", "--topology", "v5e:2x2"], "--batch is for plan --inference"),
    ]:
        assert main(["plan", *words]) == 2
        assert sentence in capsys.readouterr().err


@pytest.fixture(scope="module")
def tiny_plan():
    peer("libtpu")
    with pytest.MonkeyPatch.context() as patch:
        # A chip with so little memory that the largest batch of a tiny model is small.
        v5e = dataclasses.replace(PLANNABLE_CHIPS["v5e"], usable_hbm_gib=0.005)
        patch.setitem(PLANNABLE_CHIPS, "v5e", v5e)
        yield serving.plan_inference(model(), topology.parse("v5e:2x2"), 256, 1, lambda _: None)


def test_the_figures_of_a_tiny_plan_are_consistent(tiny_plan):
    # Two of the four chips have the same head: each stores a part of each page.
    assert tiny_plan.cache_bytes_per_row == CACHE_BYTES_PER_ROW // 2
    assert tiny_plan.fits
    assert 1 < tiny_plan.largest_batch < 20
    by_arithmetic = serving.largest_batch_within(
        tiny_plan.usable_bytes, tiny_plan.largest_batch_bytes, tiny_plan.largest_batch,
        tiny_plan.decode_bytes_per_row,
    )  # fmt: skip
    assert by_arithmetic == tiny_plan.largest_batch
    assert list(tiny_plan.decode_times) == [1, tiny_plan.largest_batch]
    for batch, time in tiny_plan.decode_times.items():
        assert time.memory == serving.decode_step_bytes(tiny_plan, batch) / 819e9
        # 5 all-reduces (two in each of two layers, one of the embedding) over 4 hops each, and of
        # each layer queries and sums that chips with the same head exchange over one.
        assert time.network == pytest.approx(5 * 4e-6 + 2 * 2 * 1e-6, rel=0.02)
        assert time.cycles > 0
        assert time.compute > 0
    assert 0 < tiny_plan.prefill_mfu < 1


def test_a_serving_plan_is_reported_as_tables_and_as_json(tiny_plan, capsys):
    serving_report.show(tiny_plan)
    printed = capsys.readouterr().out
    for part in ("KV cache, 1 row(s)", "fits in", "decode, batch 1", "prefill 256 tokens"):
        assert part in printed
    report = json.loads(json.dumps(serving_report.as_dict(tiny_plan)))
    assert set(report) == {
        "topology", "chips", "parameters", "context", "batch", "fits", "memory", "largest_batch",
        "largest_batch_needed", "largest_cache_tokens", "largest_context", "decode", "prefill",
    }  # fmt: skip
    assert report["parameters"] == model().n_params
    assert report["decode"][0]["tokens_per_second"] == pytest.approx(
        1 / tiny_plan.decode_times[1].estimate
    )
    memory = report["memory"]
    parts = ("embedding", "layers", "head", "cache", "decode_temporaries")
    assert sum(memory[part] for part in parts) == tiny_plan.decode_peak_bytes


def test_a_rejected_plan_is_reported_without_numbers(monkeypatch, capsys):
    def reject(*_):
        raise DoesNotFit(None)

    for name in ("compile_prefill", "compile_decode_loop"):
        monkeypatch.setattr(serving_program, name, reject)
    monkeypatch.setattr(serving_program, "slice_mesh", lambda *_: one_device_mesh())
    plan = serving.plan_inference(model(), topology.parse("v5e:2x2"), 256, 2, lambda _: None)
    assert not plan.fits
    assert serving_report.as_dict(plan)["memory"]["needed"] is None
    serving_report.show(plan)
    printed = capsys.readouterr().out
    assert "no program fits that prefills 256 tokens in one piece" in printed
    assert "not a single row of this context fits" in printed
