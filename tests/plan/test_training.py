import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import pytest
from conftest import mesh_of, peer, tiny_config, tiny_model

from llama_jax.checkpoint.tree import eval_shape_on_mesh
from llama_jax.cli.main import main
from llama_jax.config.family import FAMILY
from llama_jax.config.run import Config, DataConfig, MeshConfig, TrainingConfig
from llama_jax.data.windows import Batch
from llama_jax.errors import InputError
from llama_jax.parallel.sharding import activation_spec
from llama_jax.plan import compiler, search, topology, training, training_report
from llama_jax.plan.training import Plan
from llama_jax.training.step import init_state, train_step

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
        ("v9:4x4", r"kinds: v4, v5e, v5p, v6e$"),
        ("v5p:4x4", r"v5p has a network of 3 dimensions, as in v5p:4x4x8"),
        ("0*v5e:4x4", r"v5e has a network of 2 dimensions"),
    ],
)
def test_a_topology_that_is_not_one_is_refused(text, sentence):
    with pytest.raises(InputError, match=sentence):
        topology.parse(text)


def test_a_topology_reads_back():
    assert [str(topology.parse(t)) for t in ("v5p:4x4x8", "2*v6e:16x16")] == [
        "v5p:4x4x8",
        "2*v6e:16x16",
    ]
    assert topology.parse("2*v6e:16x16").size == 512


def test_mfu_is_the_papers_count():
    """65B on 2,048 A100 at 380 tokens/s each is 48.6 % with causal attention."""
    config = run_of("llama-65b", 2048, 2048)
    plan = Plan(config, topology.Pod("v5p", (8, 8, 32), 1))
    seconds = plan.tokens / 380 / 2048
    assert plan.mfu(seconds) * 459 / 312 == pytest.approx(0.486, abs=0.002)
    assert plan.mfu(seconds, causal=False) > plan.mfu(seconds)


def test_attention_takes_its_products_at_half_the_peak():
    config = run_of("llama-7b", 256, 2048, remat="none")
    chip = topology.parse("v5p:4x4x4").chip
    seven = training.attention_seconds(config, {"fsdp": 64}, chip)
    flops = 7 * 32 * 4 * 2048**2 * 32 * 128  # layers, rows of a chip, T², heads of 128
    assert seven == pytest.approx(flops / (459e12 / 2))
    full = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="full"))
    assert training.attention_seconds(full, {"fsdp": 64}, chip) == pytest.approx(seven * 9 / 7)


def test_a_group_uses_the_links_of_the_dimensions_that_it_spans():
    place = topology.parse("2*v5p:4x4x4")
    speeds = [training.network_bandwidth(place, n) for n in (4, 16, 64, 128)]
    assert speeds == [180, 360, 540, training._BETWEEN_SLICES]
    # All 8 of a dimension, and 2 of the 8 of another.
    assert training.network_bandwidth(topology.parse("v5p:8x8x8"), 16) == 270


def test_what_is_searched_divides_and_keeps_what_it_says():
    config = run_of("llama2-70b", 1024, 4096)
    place = topology.parse("v5e:16x16")
    ways = list(search.candidates(config, place))
    assert len(ways) > 50
    for way in ways:
        assert math.prod(dataclasses.astuple(way.mesh)) == place.size
        assert way.data.batch_size % (way.mesh.data * way.mesh.fsdp) == 0
    by_remat = {w.model.remat: search.memory(w) for w in ways if w.mesh == ways[0].mesh}
    kept = ["none", "products", "projections", "attention", "full", "offload"]
    assert sorted(by_remat, key=lambda remat: -by_remat[remat]) == kept
    long = run_of("llama3.1-8b", 16, 131_072)
    assert {way.mesh.context for way in search.candidates(long, place)} > {16}


def test_a_search_ranks_what_compiles(monkeypatch):
    tried = []

    def make(config, place, tell):
        tried.append(config)
        if len(tried) == 1:
            raise InputError("the TPU compiler itself failed")
        return Plan(config, place, memory={"all": 2.0**30}, compiler=1 / len(tried))

    monkeypatch.setattr(training, "make", make)
    told: list[str] = []
    config, place = run_of("llama-7b", 256, 2048), topology.parse(TOPOLOGY)
    found = search.search(config, place, 4, told.append)
    assert [plan.compiler for plan in found] == [1 / 5, 1 / 4, 1 / 3, 1 / 2]
    assert "    the TPU compiler itself failed" in told
    assert len(tried) == len(set(map(search.fragment, tried)))


def test_a_search_learns_from_what_does_not_fit(monkeypatch):
    tried = []

    def make(config, place, tell):
        tried.append(1.1 * search.memory(config))
        return Plan(config, place, memory={"all": tried[-1]}, compiler=1.0)

    monkeypatch.setattr(training, "make", make)
    config, place = run_of("llama2-70b", 1024, 4096), topology.parse("v5e:16x16")
    found = search.search(config, place, 2, lambda _: None)
    first, *others = tried
    assert first > 16 * 2**30 > max(others)
    assert [plan.fits for plan in found] == [True, True, False]


@pytest.fixture(scope="module")
def tiny_plan():
    peer("libtpu")
    # Each part fills the tiles of a TPU: else the compiler sums first and cuts then.
    model = tiny_model(
        dim=512, hidden_dim=1024, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=128,
        vocab_size=1024, context=256, dtype="bfloat16",
    )  # fmt: skip
    config = dataclasses.replace(
        tiny_config(model, steps=1000),
        mesh=MeshConfig(data=16, fsdp=4),
        data=DataConfig(mixture={"x": 1.0}, batch_size=128, seq_len=256),
    )
    return training.make(config, topology.parse(TOPOLOGY), lambda _: None)


def test_a_plan_knows_its_memory(tiny_plan):
    n_params = tiny_plan.config.model.n_params
    assert tiny_plan.memory["weights"] == pytest.approx(4 * n_params / 4, rel=1e-3)
    assert tiny_plan.memory["optimizer"] == pytest.approx(8 * n_params / 4, rel=1e-3)
    # A token's bfloat16s in a layer: 4 of D, queries and twice attention's output, keys and values,
    # 3 of F; and a float32 for each head and each of two norms.
    a_token = 2 * (4 * 512 + 3 * 512 + 2 * 256 + 3 * 1024) + 4 * (4 + 2)
    assert tiny_plan.memory["activations"] == pytest.approx(4 * 2 * 256 * a_token, rel=0.01)
    assert tiny_plan.fits
    # The compiler adds up in float32, whose steps beside its -1 s are 4 µs and more: these layers
    # take less, so nothing is asked of their MFU.
    assert 0 < tiny_plan.compiler < tiny_plan.step


def test_communication_is_as_designed(tiny_plan):
    """Weights are gathered in bfloat16, twice; gradients are scattered as they are summed, once."""
    model = tiny_plan.config.model
    # The embedding is read forward and the head's gradient is made at once: both gathered once.
    ends = 2 * model.vocab_size * model.dim
    layers = model.n_params - ends
    # The last layer's backward pass may find them still there.
    twice = (2 * layers + ends) * 2 * 3 / 4
    traffic = tiny_plan.traffic
    assert 0.9 * twice < traffic["all-gather"].bytes < 1.02 * twice
    scattered = model.n_params * 4 * 3 / 4
    assert traffic["reduce-scatter"].bytes == pytest.approx(scattered, rel=0.02)
    # What is left of each, a quarter, is summed over the replicas: there and back.
    summed = 2 * model.n_params / 4 * 4 * 15 / 16
    assert traffic["all-reduce"].bytes == pytest.approx(summed, rel=0.02)


def test_a_plan_is_told_as_a_table_and_as_json(tiny_plan, capsys):
    training_report.show(tiny_plan)
    told = capsys.readouterr().out
    for part in ("fits in 95 GiB", "+ attention, by a model", "reduce-scatter", "chip-hours"):
        assert part in told
    about = json.loads(json.dumps(training_report.as_dict(tiny_plan)))
    assert about["step_seconds"]["all"] == pytest.approx(tiny_plan.step)
    assert about["chips"] == 64


def test_plan_refuses_what_does_not_divide(capsys, tmp_path):
    peer("libtpu")
    (tmp_path / "run.yaml").write_text(
        "model: {family: llama-7b}\ndata: {mixture: {data/x: 1}, batch_size: 12}\n"
        "training: {out: runs/x, steps: 10}\n"
    )
    assert main(["plan", str(tmp_path / "run.yaml"), "--topology", TOPOLOGY]) == 2
    assert "does not divide the 12 rows" in capsys.readouterr().err
    assert main(["plan", str(tmp_path / "run.yaml"), "--topology", "v5p:2"]) == 2


def test_what_a_layer_keeps_is_read_from_the_step():
    config = tiny_config(tiny_model(n_layers=4, remat="full"))
    with jax.set_mesh(mesh_of((2, 2, 2))):
        model, opt_state = eval_shape_on_mesh(lambda: init_state(config, jax.random.key(0)))
        B, T = config.data.batch_size, config.data.seq_len
        rows = jax.ShapeDtypeStruct(
            (1, B, T),
            jnp.int32,
            sharding=jax.NamedSharding(jax.sharding.get_mesh(), activation_spec("ABT")),
        )
        step = jax.ShapeDtypeStruct((), jnp.int32)
        traced = train_step.trace(config, model, opt_state, Batch(*[rows] * 4), step)
    # What a layer reads, of a device's share of the batch, in float32.
    assert compiler._kept(traced.jaxpr.jaxpr, 4) == 4 * (4 * B // 4 * T * config.model.dim)


def test_what_the_compiler_does_not_know_is_taken_out_of_its_sum():
    assert compiler._known(-51.9529, 0.03) == pytest.approx(0.0471)
    assert compiler._known(0.0471, 0.03) == 0.0471
    assert compiler._known(2.5, 2.1) == 2.5


def test_memory_is_told_also_where_layers_out_of_their_loop_do_not_fit(monkeypatch):
    def compiled(config, *_):
        if not config.model.scan:
            raise compiler.DoesNotFit(None)
        return compiler.Program(8, 16, 24, 40, 124, 0.1, 1e12, [])

    monkeypatch.setattr(training, "make_mesh", lambda *_: mesh_of((1, 1, 1)))
    monkeypatch.setattr(topology, "devices", lambda _: [])
    monkeypatch.setattr(compiler, "compiled", compiled)
    told: list[str] = []
    plan = training.make(tiny_config(), topology.parse("v6e:16x16"), told.append)
    assert plan.compiler == 0
    assert "layers out of their loop do not" in told[-1]
    assert plan.needed == 124
    assert "step_seconds" not in training_report.as_dict(plan)


def test_what_the_compiler_refuses_does_not_fit_however_little_is_missing(monkeypatch):
    def compiled(*_):
        raise compiler.DoesNotFit(int(31.9 * 2**30))

    monkeypatch.setattr(training, "make_mesh", lambda *_: mesh_of((1, 1, 1)))
    monkeypatch.setattr(topology, "devices", lambda _: [])
    monkeypatch.setattr(compiler, "compiled", compiled)
    plan = training.make(tiny_config(), topology.parse("v6e:16x16"), lambda _: None)
    assert not plan.fits
    assert plan.needed < 32 * 2**30


def test_a_compiler_that_fails_is_told_in_a_sentence(monkeypatch):
    class Fails:
        jaxpr = lower = lambda *_: Fails()

        def compile(self, **_):
            raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure\nand more")

    monkeypatch.setattr(compiler.train_step, "trace", lambda *_: Fails(), raising=False)
    with pytest.raises(
        InputError, match=r"itself failed on this step \(INTERNAL: RET_CHECK failure\)"
    ):
        compiler.compiled(tiny_config(), mesh_of((1, 1, 1)), topology.parse(TOPOLOGY).chip)
