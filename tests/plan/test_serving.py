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
from llama_jax.plan import compiler, serving, serving_program, serving_report, topology
from llama_jax.plan.schedule import Collective
from llama_jax.plan.serving import InferencePlan, Time, Weights
from llama_jax.runtime.chips import PLANNABLE_CHIPS

GIB = 2**30
ROW = 2 * 2 * 256 * 128 * 2  # layers, keys and values, slots, H of a head, bfloat16


def model(**changes):
    return tiny_model(
        dim=256, hidden_dim=512, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=128, context=256,
        vocab_size=1024, dtype="bfloat16", param_dtype="bfloat16", **changes,
    )  # fmt: skip


def plan_of(name: str, batch: int = 8, **changes) -> InferencePlan:
    """A plan of a member on v5e:4x4 whose programs nobody compiled."""
    config = FAMILY[name]
    weights = Weights(2**25, 8 * GIB, 2**25)
    place = topology.parse("v5e:4x4")
    plan = InferencePlan(config, config.n_params, place, 4096, batch, weights, cache_row=GIB // 8)
    return dataclasses.replace(plan, **changes)


@pytest.mark.parametrize("cache_dtype", ["same", "int8"])
def test_bytes_are_those_of_the_model_and_its_cache(cache_dtype):
    config = model(cache_dtype=cache_dtype)
    with jax.set_mesh(one_device_mesh()):
        kept = jax.eval_shape(lambda: init_cache(config, 1, 32).layers)
        made = jax.eval_shape(lambda: Llama(config, jax.random.key(0)))
    weights, row = serving.sizes(config, one_device_mesh(), 32)
    assert row == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept))
    assert sum(weights) == sum(2 * x.size for x in jax.tree.leaves(made)) == 2 * config.n_params
    assert weights.embedding == 2 * 1024 * 256


def test_matrices_in_int8_take_half_and_their_scales():
    plain, int8 = (
        serving.sizes(model(quantized=kept), one_device_mesh(), 256)[0] for kept in ("none", "int8")
    )
    outputs = 4 * 128 + 2 * 2 * 128 + 256 + 2 * 512 + 256  # q, k and v, wo, w1 and w3, w2
    matrices = plain.layers - 2 * 2 * 2 * 256  # all but two norms in each of two layers
    assert int8.layers == plain.layers - matrices // 2 + 2 * 4 * outputs


def test_key_value_heads_are_copied_over_more_chips_than_there_are():
    mesh = mesh_of((1, 1, 4))
    config = serving_program.over(model(), mesh)
    assert config.n_kv_heads == 4
    _, row = serving.sizes(config, mesh, 256)
    assert row == ROW


def test_a_step_reads_all_but_the_embedding_which_a_tied_head_reads_too():
    plan = plan_of("llama2-70b")
    assert serving.step_bytes(plan, 8) == 8 * GIB + 2**25 + 8 * GIB // 8
    tied = dataclasses.replace(
        plan_of("llama3.2-3b"), weights=Weights(2**25, 8 * GIB, 2**10), cache_row=0
    )
    assert serving.step_bytes(tied, 8) == 8 * GIB + 2**25


def test_reading_a_prompt_counts_two_flops_a_weight_and_half_of_attention():
    config = FAMILY["llama2-7b"]
    layers = config.n_params - 2 * 32_000 * 4096
    expected = 2 * layers * 1024 + 2 * 32_000 * 4096 + 32 * 2 * 4096 * 1024**2
    assert serving.prefill_flops(config, 1024) == pytest.approx(expected)


def test_the_largest_batch_fits_and_one_more_does_not():
    """A row takes more than its cache, which two compiled batches tell."""
    plan = plan_of("llama2-70b", prefill_room=GIB)
    compiled = []

    def peak(batch: int) -> float:
        compiled.append(batch)
        return 9 * GIB + batch * 0.15 * GIB

    plan.decode_peak = peak(8)
    serving._find_largest(plan, peak)
    assert plan.largest_batch == 45 == int((15.75 - 9) / 0.15)
    assert plan.largest_peak == peak(45) <= plan.usable < peak(46)
    assert plan.row_slope == pytest.approx(0.15 * GIB)
    assert len(compiled) <= 6
    assert plan.largest_context == pytest.approx(45 * 4096, rel=0.01)


def test_a_prompt_must_find_room_beside_the_cache_of_the_largest_batch():
    plan = plan_of("llama2-70b", prefill_room=4 * GIB)
    plan.decode_peak = 9 * GIB
    serving._find_largest(plan, lambda batch: 8 * GIB + batch * GIB / 8)
    at_most = (plan.usable - sum(plan.weights) - 4 * GIB) / plan.cache_row
    assert at_most - 1 < plan.largest_batch <= at_most


def test_no_row_fits_where_the_weights_alone_do_not():
    plan = plan_of("llama2-70b", weights=Weights(0, 17 * GIB, 0), decode_peak=18.0 * GIB)
    serving._find_largest(plan, lambda _: pytest.fail("nothing is to be compiled"))
    assert plan.largest_batch == 0
    assert not plan.fits


def test_an_estimate_is_no_faster_than_memory_and_waits_for_the_network():
    assert Time(3, 1, 2, cycles=2, compiler=9).estimate == 5
    assert Time(3, 1, 2, cycles=4, compiler=9).estimate == 6
    assert Time(3, 1, 2, cycles=4, compiler=9).roofline == 3
    assert Time(3, 1, 4, cycles=4, compiler=9).bound == "network"


def test_a_sum_crosses_a_slice_and_comes_back():
    # 4 × 4 of v5e are lines: from corner to corner 6 links; a corner sends over two.
    place = topology.parse("v5e:4x4")
    sent = Collective("all-reduce", 90e3, 16)
    assert serving.collective_seconds(sent, place) == pytest.approx(1e-6 + 12e-6)
    assert serving.collective_seconds(sent._replace(kind="all-gather"), place) == pytest.approx(
        1e-6 + 6e-6
    )
    assert [topology.parse(t).hops for t in ("v5e:16x16", "v5p:4x4x8", "v5p:2x2x1")] == [16, 8, 2]


def test_slices_make_tokens_side_by_side():
    time = Time(0.01, 0.0, 0.0, 0.0, 0.0)
    plan = plan_of("llama2-70b", decode={8: time})
    assert plan.tokens_per_second(8) == pytest.approx(800)
    twice = dataclasses.replace(plan, pod=plan.pod._replace(slices=2))
    assert twice.tokens_per_second(8) == pytest.approx(1600)


def test_what_can_not_be_served_is_refused(capsys):
    config = FAMILY["llama2-7b"]
    with pytest.raises(InputError, match=r"--context 4097 is not in 1 … 4096"):
        serving.check(config, 4097, 1)
    with pytest.raises(InputError, match=r"--batch must be at least 1, not 0"):
        serving.check(config, 4096, 0)
    with pytest.raises(InputError, match=r"over the 64 chips .* 1, 2, 4, 8, 16, 32$"):
        serving_program.mesh_of(config, topology.parse("v5e:8x8"))
    assert tensor_sizes(config) == [1, 2, 4, 8, 16, 32]
    for words, sentence in [
        (["llama2-7b", "--inference", "--topology", "v5e:3"], "v5e has a network of 2 dimensions"),
        (["llama9", "--inference", "--topology", "v5e:2x2"], "there is no llama9: give a model"),
        (["llama2-7b", "a.b=1", "--inference", "--topology", "v5e:2x2"], "overrides are for"),
        (["x.yaml", "--batch", "3", "--topology", "v5e:2x2"], "--batch is for plan --inference"),
    ]:
        assert main(["plan", *words]) == 2
        assert sentence in capsys.readouterr().err


@pytest.fixture(scope="module")
def tiny_plan():
    peer("libtpu")
    with pytest.MonkeyPatch.context() as patch:
        # Of a chip as small as the model: its largest batch is compiled.
        patch.setitem(
            PLANNABLE_CHIPS,
            "v5e",
            dataclasses.replace(PLANNABLE_CHIPS["v5e"], usable_hbm_gib=0.005),
        )
        yield serving.make(model(), topology.parse("v5e:2x2"), 256, 1, lambda _: None)


def test_a_plan_of_a_tiny_model_holds_together(tiny_plan):
    assert tiny_plan.cache_row == ROW
    assert tiny_plan.fits
    assert 1 < tiny_plan.largest_batch < 20
    more = serving.batch_that_fits(
        tiny_plan.usable, tiny_plan.largest_peak, tiny_plan.largest_batch, tiny_plan.row_slope
    )
    assert more == tiny_plan.largest_batch
    assert list(tiny_plan.decode) == [1, tiny_plan.largest_batch]
    for batch, time in tiny_plan.decode.items():
        assert time.memory == serving.step_bytes(tiny_plan, batch) / 819e9
        # Two sums in each of two layers, and one of the embedding, of 4 links there and back.
        assert time.network == pytest.approx(5 * 4e-6, rel=0.02)
        assert time.cycles > 0
        assert time.compute > 0
    assert 0 < tiny_plan.prefill_mfu < 1


def test_a_plan_of_serving_is_told_as_a_table_and_as_json(tiny_plan, capsys):
    serving_report.show(tiny_plan)
    told = capsys.readouterr().out
    for part in ("keys and values, 1 row(s)", "fits in", "decode, batch 1", "read 256 tokens"):
        assert part in told
    about = json.loads(json.dumps(serving_report.as_dict(tiny_plan)))
    assert set(about) == {
        "topology", "chips", "parameters", "context", "batch", "fits", "memory", "largest_batch",
        "largest_batch_needed", "largest_context", "decode", "prefill",
    }  # fmt: skip
    assert about["parameters"] == model().n_params
    assert about["decode"][0]["tokens_per_second"] == pytest.approx(
        1 / tiny_plan.decode[1].estimate
    )
    memory = about["memory"]
    parts = ("embedding", "layers", "head", "cache", "decode_temporaries")
    assert sum(memory[part] for part in parts) == tiny_plan.decode_peak


def test_what_no_compiler_accepts_is_told_without_a_number(monkeypatch, capsys):
    def refuse(*_):
        raise compiler.DoesNotFit(None)

    for name in ("compile_prefill", "compile_decode"):
        monkeypatch.setattr(serving_program, name, refuse)
    monkeypatch.setattr(serving_program, "mesh_of", lambda *_: one_device_mesh())
    plan = serving.make(model(), topology.parse("v5e:2x2"), 256, 2, lambda _: None)
    assert not plan.fits
    assert serving_report.as_dict(plan)["memory"]["needed"] is None
    serving_report.show(plan)
    told = capsys.readouterr().out
    assert "no program that reads 256 tokens in one piece fits" in told
    assert "not one row of this context fits" in told
