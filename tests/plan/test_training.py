import dataclasses
import json
import math

import jax
import pytest
from conftest import mesh_of, peer, tiny_config, tiny_model
from program_folder import program_folder

from llama_jax.cli.main import main
from llama_jax.config.family import FAMILY
from llama_jax.config.mesh import MeshConfig
from llama_jax.config.run import Config, DataConfig, TrainingConfig
from llama_jax.errors import InputError
from llama_jax.plan import (
    compiler,
    search,
    topology,
    training,
    training_program,
    training_report,
)
from llama_jax.plan.compiler import CompiledProgram, DoesNotFit
from llama_jax.plan.training import TrainingPlan
from llama_jax.plan.training_program import CompiledTrainStep

TOPOLOGY = "v5p:4x4x4"


def run_of(name: str, batch: int, seq_len: int, **changes) -> Config:
    return Config(
        model=dataclasses.replace(FAMILY[name], **changes),
        mesh=MeshConfig(),
        data=DataConfig(mixture={"x": 1.0}, batch_size=batch, seq_len=seq_len),
        training=TrainingConfig(out="x", steps=1000),
    )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("v5p", r"write KIND:SHAPE as in v5p:4x4x4"),
        ("v9:4x4", r"kinds: v4, v5e, v5p, v6e, tpu7x, a100, h100, h200, b200$"),
        ("v5p:4x4", r"v5p has a network of 3 dimensions, as in v5p:4x4x8"),
        ("0*v5e:4x4", r"v5e has a network of 2 dimensions"),
        ("h100:8x2", r"h100 has a network of 1 dimension, as in h100:8"),
    ],
)
def test_a_malformed_topology_is_rejected(text, sentence):
    with pytest.raises(InputError, match=sentence):
        topology.parse(text)


def test_parsing_and_printing_a_topology_round_trips():
    assert [str(topology.parse(t)) for t in ("v5p:4x4x8", "2*v6e:16x16")] == [
        "v5p:4x4x8",
        "2*v6e:16x16",
    ]
    assert topology.parse("2*v6e:16x16").n_chips == 512


def test_mfu_is_the_count_of_the_paper():
    """65B on 2,048 A100 at 380 tokens/s each is 48.6 % with causal attention."""
    config = run_of("llama-65b", 2048, 2048)
    plan = TrainingPlan(config=config, pod=topology.parse("v5p:8x8x32"))
    seconds = plan.tokens_per_step / 380 / 2048
    assert plan.mfu(seconds) * 459 / 312 == pytest.approx(0.486, abs=0.002)
    assert plan.mfu(seconds, causal=False) > plan.mfu(seconds)


def test_attention_seconds_takes_its_products_at_half_the_peak():
    config = run_of("llama-7b", 256, 2048, remat="none")
    chip = topology.parse("v5p:4x4x4").chip
    seven = training.attention_seconds(config, {"fsdp": 64}, chip)
    flops = 7 * 32 * 4 * 2048**2 * 32 * 128  # layers, rows of a chip, T², heads of 128
    assert seven == pytest.approx(flops / (459e12 / 2))
    full = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="full"))
    assert training.attention_seconds(full, {"fsdp": 64}, chip) == pytest.approx(seven * 9 / 7)


def test_a_group_of_chips_uses_the_links_of_the_dimensions_it_spans():
    pod = topology.parse("2*v5p:4x4x4")
    speeds = [topology.network_bandwidth(pod, n) for n in (4, 16, 64, 128)]
    assert speeds == [180, 360, 540, topology.BETWEEN_SLICES]
    # All 8 of a dimension, and 2 of the 8 of another.
    assert topology.network_bandwidth(topology.parse("v5p:8x8x8"), 16) == 270


def test_a_chip_of_two_devices_has_the_peak_of_both_and_shares_its_links():
    pod = topology.parse("tpu7x:4x4x4")
    assert (pod.n_chips, pod.n_devices, pod.device_name) == (64, 128, "device, 2 in a chip")
    # 8, 32 and 128 devices are 4, 16 and 64 chips: one, two and three rings.
    assert [topology.network_bandwidth(pod, n) for n in (8, 32, 128)] == [90, 180, 270]
    # Llama 3.1 70B at 2,687 tokens/s/chip: 1,207 TFLOP/s of 2,307 are published.
    plan = TrainingPlan(config=run_of("llama3.1-70b", 256, 8192), pod=pod)
    seconds = plan.tokens_per_step / 2686.98 / pod.n_chips
    assert plan.mfu(seconds) * 2307 == pytest.approx(1207, rel=0.01)
    assert topology.parse("v5p:4x4x4").n_devices == 64


def test_search_candidates_divide_the_pod_and_save_fewer_activations_in_order():
    config = run_of("llama2-70b", 1024, 4096)
    pod = topology.parse("v5e:16x16")
    variants = list(search.candidates(config, pod))
    assert len(variants) > 50
    for variant in variants:
        assert math.prod(dataclasses.astuple(variant.mesh)) == pod.n_chips
        assert variant.data.batch_size % (variant.mesh.data * variant.mesh.fsdp) == 0
    same_mesh = [variant for variant in variants if variant.mesh == variants[0].mesh]
    by_remat = {variant.model.remat: search.estimate_memory(variant) for variant in same_mesh}
    most_first = ["none", "products", "projections", "attention", "full", "offload"]
    assert sorted(by_remat, key=lambda remat: -by_remat[remat]) == most_first
    long = run_of("llama3.1-8b", 16, 131_072)
    assert {variant.mesh.context for variant in search.candidates(long, pod)} > {16}


def test_the_search_ranks_the_candidates_that_compile(monkeypatch):
    tried = []

    def plan_training(config, pod, log):
        tried.append(config)
        if len(tried) == 1:
            raise InputError("the TPU compiler itself failed")
        memory = {"all": 2.0**30}
        return TrainingPlan(config=config, pod=pod, memory=memory, compiler_seconds=1 / len(tried))

    monkeypatch.setattr(search, "plan_training", plan_training)
    lines: list[str] = []
    config, pod = run_of("llama-7b", 256, 2048), topology.parse(TOPOLOGY)
    found = search.find_fastest(config, pod, 4, lines.append)
    assert [plan.compiler_seconds for plan in found] == [1 / 5, 1 / 4, 1 / 3, 1 / 2]
    assert "    the TPU compiler itself failed" in lines
    assert len(tried) == len(set(map(search.as_overrides, tried)))


def test_the_search_corrects_its_memory_estimate_by_a_plan_that_does_not_fit(monkeypatch):
    tried = []

    def plan_training(config, pod, log):
        tried.append(1.1 * search.estimate_memory(config))
        return TrainingPlan(config=config, pod=pod, memory={"all": tried[-1]}, compiler_seconds=1.0)

    monkeypatch.setattr(search, "plan_training", plan_training)
    config, pod = run_of("llama2-70b", 1024, 4096), topology.parse("v5e:16x16")
    found = search.find_fastest(config, pod, 2, lambda _: None)
    first, *others = tried
    assert first > 16 * 2**30 > max(others)
    assert [plan.fits for plan in found] == [True, True, False]


def test_the_search_continues_after_a_program_that_is_rejected_without_a_number(monkeypatch):
    tried = []

    def plan_training(config, pod, log):
        tried.append(config)
        if len(tried) == 1:
            return TrainingPlan(config=config, pod=pod, memory={"all": math.inf}, rejected=True)
        return TrainingPlan(config=config, pod=pod, memory={"all": 2.0**30}, compiler_seconds=1.0)

    monkeypatch.setattr(search, "plan_training", plan_training)
    lines: list[str] = []
    config, pod = run_of("llama-7b", 256, 2048), topology.parse(TOPOLOGY)
    found = search.find_fastest(config, pod, 2, lines.append)
    assert [plan.fits for plan in found] == [True, True, False]
    assert "    does not fit: ? of 95 GiB" in lines


@pytest.fixture(scope="module")
def tiny_plan():
    peer("libtpu")
    # Each shard fills complete TPU tiles: otherwise the compiler all-reduces and slices.
    model = tiny_model(
        dim=512, hidden_dim=1024, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=128,
        vocab_size=1024, context=256, dtype="bfloat16",
    )  # fmt: skip
    config = dataclasses.replace(
        tiny_config(model, steps=1000),
        mesh=MeshConfig(data=16, fsdp=4),
        data=DataConfig(mixture={"x": 1.0}, batch_size=128, seq_len=256),
    )
    return training.plan_training(config, topology.parse(TOPOLOGY), lambda _: None)


def test_the_memory_of_a_plan_is_that_of_weights_optimizer_and_saved_activations(tiny_plan):
    n_params = tiny_plan.config.model.n_params
    assert tiny_plan.memory["weights"] == pytest.approx(4 * n_params / 4, rel=1e-3)
    assert tiny_plan.memory["optimizer"] == pytest.approx(8 * n_params / 4, rel=1e-3)
    # Bytes per token and layer. In bfloat16: 4 of D; queries and attention's output twice; keys and
    # values; 3 of F. In float32: one for each head and each of two norms.
    per_token = 2 * (4 * 512 + 3 * 512 + 2 * 256 + 3 * 1024) + 4 * (4 + 2)
    assert tiny_plan.memory["activations"] == pytest.approx(4 * 2 * 256 * per_token, rel=0.01)
    assert tiny_plan.fits
    # No assertion about MFU: the compiler adds up in float32, which next to its -1 s an operation
    # resolves 4 µs at best, more than these layers take.
    assert 0 < tiny_plan.compiler_seconds < tiny_plan.step_seconds


def test_each_collective_sends_the_bytes_of_the_sharding_design(tiny_plan):
    """Weights are gathered in bfloat16, twice; gradients are reduce-scattered in float32, once."""
    model = tiny_plan.config.model
    # Gathered once: the embedding, which only the forward pass reads, and the head, whose gradient
    # is computed along with the loss.
    embedding_and_head = 2 * model.vocab_size * model.dim
    layers = model.n_params - embedding_and_head
    gathered = (2 * layers + embedding_and_head) * 2 * 3 / 4
    traffic = tiny_plan.traffic
    # Fewer bytes are possible: the backward pass may reuse the gathered weights of the last layer.
    assert 0.9 * gathered < traffic["all-gather"].bytes < 1.02 * gathered
    scattered = model.n_params * 4 * 3 / 4
    assert traffic["reduce-scatter"].bytes == pytest.approx(scattered, rel=0.02)
    # The all-reduce over replicas sends each device's shard, a quarter, twice.
    reduced = 2 * model.n_params / 4 * 4 * 15 / 16
    assert traffic["all-reduce"].bytes == pytest.approx(reduced, rel=0.02)


def test_a_training_plan_is_reported_as_tables_and_as_json(tiny_plan, capsys):
    training_report.show(tiny_plan)
    printed = capsys.readouterr().out
    for part in ("fits in 95 GiB", "+ attention, modelled", "reduce-scatter", "chip-hours"):
        assert part in printed
    report = json.loads(json.dumps(training_report.as_dict(tiny_plan)))
    assert report["step_seconds"]["all"] == pytest.approx(tiny_plan.step_seconds)
    assert report["chips"] == 64


def test_plan_rejects_a_batch_that_the_pod_does_not_divide(capsys, tmp_path):
    peer("libtpu")
    (tmp_path / "run.yaml").write_text(
        "model: {family: llama-7b}\ndata: {mixture: {data/x: 1}, batch_size: 12}\n"
        "training: {out: runs/x, steps: 10}\n"
    )
    assert main(["plan", str(tmp_path / "run.yaml"), "--topology", TOPOLOGY]) == 2
    assert "does not divide the 12 rows" in capsys.readouterr().err
    assert main(["plan", str(tmp_path / "run.yaml"), "--topology", "v5p:2"]) == 2


def test_saved_activations_are_measured_in_the_traced_step():
    config = tiny_config(tiny_model(n_layers=4, remat="full"))
    traced, *_ = training_program.trace_train_step(config, mesh_of((2, 2, 2)))
    B, T = config.data.batch_size, config.data.seq_len
    # With remat 'full' each layer saves its input, in float32, of a device's quarter of the batch.
    saved = training_program.saved_activation_bytes(traced.jaxpr.jaxpr, 4)
    assert saved == 4 * (4 * B // 4 * T * config.model.dim)


def test_operations_without_an_estimate_are_removed_from_the_compilers_sum():
    assert compiler._remove_unknown_operations(-51.9529, 0.03) == pytest.approx(0.0471)
    assert compiler._remove_unknown_operations(0.0471, 0.03) == 0.0471
    assert compiler._remove_unknown_operations(2.5, 2.1) == 2.5


@pytest.fixture
def no_compiler(monkeypatch):
    """Replaces the pod's devices by this machine's, so that libtpu is not needed."""
    monkeypatch.setattr(training, "make_mesh", lambda *_: mesh_of((1, 1, 1)))
    monkeypatch.setattr(topology, "devices", lambda _: [])


def test_memory_is_reported_even_where_unrolled_layers_do_not_fit(no_compiler, monkeypatch):
    def compile_train_step(config, *_):
        if not config.model.scan:
            raise DoesNotFit(None)
        program = CompiledProgram(
            argument_bytes=24, peak_bytes=124, seconds=0.1, flops=1e12, events=[]
        )
        return CompiledTrainStep(weights=8, optimizer=16, saved_activations=40, program=program)

    monkeypatch.setattr(training_program, "compile_train_step", compile_train_step)
    lines: list[str] = []
    plan = training.plan_training(tiny_config(), topology.parse("v6e:16x16"), lines.append)
    assert plan.compiler_seconds == 0
    assert "unrolled layers do not" in lines[-1]
    assert plan.needed_bytes == 124
    assert "step_seconds" not in training_report.as_dict(plan)


def test_a_rejected_program_does_not_fit_even_if_it_needs_less_than_the_chip_has(
    no_compiler, monkeypatch
):
    def reject(*_):
        raise DoesNotFit(int(31.9 * 2**30))

    monkeypatch.setattr(training_program, "compile_train_step", reject)
    plan = training.plan_training(tiny_config(), topology.parse("v6e:16x16"), lambda _: None)
    assert not plan.fits
    assert plan.needed_bytes < 32 * 2**30


def test_the_memory_of_a_program_that_is_rejected_without_a_number_is_unknown(
    no_compiler, monkeypatch, capsys
):
    def reject(*_):
        raise DoesNotFit(None)

    monkeypatch.setattr(training_program, "compile_train_step", reject)
    plan = training.plan_training(tiny_config(), topology.parse("v6e:16x16"), lambda _: None)
    printed = json.loads(json.dumps(training_report.as_dict(plan), allow_nan=False))
    assert printed["memory"] == {"hbm": 32 * 2**30, "needed": None, "all": None}
    training_report.show(plan)
    training_report.show_ranking([plan])
    assert "inf" not in capsys.readouterr().out


def test_a_failure_of_the_compiler_is_reported_in_one_sentence():
    class Lowered:
        def compile(self, **_):
            raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure\nand more")

    with pytest.raises(
        InputError, match=r"itself failed on this step \(INTERNAL: RET_CHECK failure\)"
    ):
        compiler.compile_program(Lowered(), topology.parse(TOPOLOGY).chip, {}, "model.remat")


@pytest.mark.slow
def test_a_program_of_another_chip_is_not_read_from_the_compilation_cache(tmp_path):
    peer("libtpu")
    pod = topology.parse("v5e:2x2")
    mesh = jax.sharding.Mesh(topology.devices(pod), ("x",))
    sharding = jax.NamedSharding(mesh, jax.P("x"))
    x = jax.ShapeDtypeStruct((256, 256), jax.numpy.bfloat16, sharding=sharding)
    with program_folder(tmp_path):
        jax.config.update("jax_enable_compilation_cache", True)
        for _ in range(2):  # a program that was found would be a warning, which is an error here
            program = compiler.compile_program(jax.jit(lambda x: x @ x).lower(x), pod.chip, {}, "")
            assert program.flops == 2 * 256**3 / 4
        assert jax.config.jax_enable_compilation_cache
        assert not list(tmp_path.iterdir())


def test_a_run_of_dpo_has_a_frozen_copy_of_the_weights_and_a_forward_pass_more():
    full, dpo = (
        dataclasses.replace(
            tiny_config(init_from="m", objective=objective), mesh=MeshConfig(fsdp=4)
        )
        for objective in ("next_token", "dpo")
    )
    _, trained, _, base = training_program.trace_train_step(dpo, mesh_of((1, 4, 1)))
    assert compiler.bytes_per_device(base) == compiler.bytes_per_device(trained)
    copy = search.estimate_memory(dpo) - search.estimate_memory(full)
    assert copy == pytest.approx(4 * full.model.n_params / 4)
    assert dpo.flops_per_token == pytest.approx(full.flops_per_token * 4 / 3)
    chip = topology.parse(TOPOLOGY).chip
    seconds = [training.attention_seconds(run, {"fsdp": 4}, chip) for run in (full, dpo)]
    assert seconds[1] == pytest.approx(seconds[0] * 9 / 7)
