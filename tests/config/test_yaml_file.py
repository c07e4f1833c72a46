import dataclasses

import pytest
from conftest import ROOT

from llama_jax.config import yaml_file
from llama_jax.config.family import FAMILY
from llama_jax.config.run import Config
from llama_jax.errors import InputError

MINIMAL = """\
model: {family: llama-7b}
data:
  mixture: {data/x: 1}
  batch_size: 8
training: {out: runs/x, steps: 10}
optimizer:
  peak_lr: 1e-4
"""


@pytest.fixture
def minimal(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def test_a_member_of_the_family_gives_the_defaults_of_the_model(minimal):
    config = yaml_file.load(minimal, ["model.context=4096", "model.remat=none"])
    expected = dataclasses.replace(FAMILY["llama-7b"], context=4096, remat="none")
    assert config.model == expected
    assert config.optimizer.peak_lr == 1e-4  # YAML 1.1 reads 1e-4 as a string


def test_a_saved_configuration_reads_back_equal(minimal, tmp_path):
    phases = "data.phases={500: {data/x: 1, gs://b/y: 0.25}, 20: {data/y: 3}}"
    config = yaml_file.load(minimal, ["model.family=llama3.1-8b", "mesh.tensor=4", phases])
    assert config.data.folders == ["data/x", "data/y", "gs://b/y"]  # in the order of the steps
    (tmp_path / "again.yaml").write_text(yaml_file.dump(config))
    assert yaml_file.load(tmp_path / "again.yaml") == config
    assert hash(yaml_file.load(tmp_path / "again.yaml")) == hash(config)


def test_a_decay_may_fill_all_steps_after_the_warm_up(minimal):
    wsd = ["optimizer.schedule=wsd", "optimizer.warmup_steps=4", "optimizer.decay_steps=6"]
    assert yaml_file.load(minimal, wsd).optimizer.decay_steps == 6
    config = yaml_file.load(minimal, ["optimizer.schedule=wsd"])  # 2000 steps of warm-up
    assert (config.optimizer.decay_steps, config.training.steps) == (0, 10)


def test_every_file_in_configs_is_valid_and_starts_with_its_command():
    paths = sorted((ROOT / "configs").rglob("*.yaml"))
    assert paths
    for path in paths:
        yaml_file.load(path)
        first = path.read_text().splitlines()[0]
        command = "data" if path.parent.name == "data" else "train"
        assert first == f"# llama-jax {command} {path.relative_to(ROOT)}"


def test_included_files_are_found_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()  # a folder, not a file
    assert yaml_file.find("data/llama") == ROOT / "configs/data/llama.yaml"
    for path in ("quickstart", "configs/quickstart.yaml"):
        assert yaml_file.load(path) == yaml_file.load(ROOT / "configs" / "quickstart.yaml")
    (tmp_path / "llama-7b").write_text(MINIMAL)
    assert yaml_file.load("llama-7b").training.steps == 10  # the user's own file takes precedence
    with pytest.raises(
        InputError, match=r"no-such: No such .*; llama_jax includes data/llama, dpo-lora, "
    ):
        yaml_file.load("no-such")


def test_there_are_at_most_90_keys_and_the_manual_explains_each():
    assert len(yaml_file.KEYS) <= 90
    manual = yaml_file.manual()
    for section in dataclasses.fields(Config):
        assert f"\n{section.name}:" in manual
    for key in yaml_file.KEYS.values():
        assert f"  {key.name}  (" in manual
        assert len(key.description) > 10


# An override, and the end of its error message.
BAD_OVERRIDES = [
    (
        "optimizer.peak_lrr=1",
        "optimizer.peak_lrr is not a known key; did you mean optimizer.peak_lr?",
    ),
    ("peak_lr=1", "peak_lr is not a known key; did you mean optimizer.peak_lr?"),
    ("optimizer.steps=3", "optimizer.steps is not a known key; did you mean training.steps?"),
    ("optimiser.peak_lr=1", "optimiser is not a known key; did you mean optimizer?"),
    (
        "checkpoint.local={path: 'gs://b/x'}",
        "checkpoint.local.path: gs://b/x is a bucket: give a folder on a disk or RAM disk of each"
        " host",
    ),
    (
        "checkpoint.local={path: /x, every: 0}",
        "checkpoint.local.every must be greater than or equal to 1, not 0",
    ),
    ("checkpoint.local=5", "checkpoint.local must be a section of keys, not 5"),
    ("optimizer.peak_lr=fast", "optimizer.peak_lr must be a valid number, not 'fast'"),
    ("optimizer.peak_lr=-1", "optimizer.peak_lr must be greater than 0, not -1"),
    ("optimizer.b2=1.5", "optimizer.b2 must be less than or equal to 1, not 1.5"),
    ("optimizer.schedule=step", "optimizer.schedule must be 'cosine' or 'wsd', not 'step'"),
    (
        "optimizer.decay_steps=5",
        "optimizer: decay_steps (5) is for the schedule wsd: set schedule to wsd, or omit"
        " decay_steps (cosine decays in all steps after the warm-up)",
    ),
    (
        "optimizer={schedule: wsd, decay_steps: 7, warmup_steps: 4}",
        "optimizer.decay_steps (7) is larger than training.steps (10) minus optimizer.warmup_steps"
        " (4)",
    ),
    (
        "optimizer={schedule: wsd, decay_steps: 1}",
        "optimizer.decay_steps (1) is larger than training.steps (10) minus optimizer.warmup_steps"
        " (2000)",
    ),
    ("training.steps=true", "training.steps must be a valid integer, not True"),
    ("training.steps=1.5", "training.steps must be a valid integer, not 1.5"),
    ("training.steps=", "training.steps must be a valid integer, not None"),
    ("logging.progress=1", "logging.progress must be a valid boolean, not 1"),
    ("data.corpus=books", "data.corpus must be a list, not 'books'"),
    ("data.mixture={a: heavy}", "data.mixture.a.weight must be a valid number, not 'heavy'"),
    (
        "data.mixture={gs://b/a:1}",
        "data.mixture.gs://b/a:1.weight must be a valid number, not None; write a space after the"
        " colon of {PATH: 1}",
    ),
    ("mesh=3", "mesh must be a section of keys, not 3"),
    ("mesh.fsdp=0", "mesh: the size of an axis is at least 1, or -1 for all other devices"),
    ("model.family=llama-9b", "model.family: 'llama-9b' is not a member; did you mean llama-7b?"),
    ("model.dtype=float8", "model.dtype must be 'float32' or 'bfloat16', not 'float8'"),
    ("model.n_kv_heads=5", "model: n_kv_heads (5) must divide n_heads (32)"),
    ("model.head_dim=7", "model: head_dim (7) must be even for rotary embeddings"),
    ("model.rope_scaling={factor: 0}", "model.rope_scaling.factor must be greater than 0, not 0"),
    ("training.micro_batches=3", "training.micro_batches (3) must divide data.batch_size (8)"),
    ("data.seq_len=9999", "data.seq_len (9999) is longer than model.context (2048)"),
    ("data.mixture={}", "data.mixture must name at least one folder of token shards"),
    (
        "model.param_dtype=bfloat16",
        "model.param_dtype bfloat16 is only for inference and for the frozen base of lora (small"
        " updates round to zero): set float32; model.dtype sets the type of the computation",
    ),
    (
        "model.quantized=int8",
        "model.quantized int8 is only for inference and for the frozen base of lora (integers have"
        " no gradient): omit it, or set lora",
    ),
    ("training.objective=dpo", "needs init_from: the model to train, which is also the reference"),
    ("training.dpo_sft_weight=1", "set objective to dpo, or omit dpo_sft_weight"),
    (
        "training={out: x, steps: 1, objective: dpo, init_from: m, z_loss: 1}",
        "training: z_loss (1.0) is for the objective next_token: omit it",
    ),
    ("lora={}", "lora needs training.init_from, the model that the pairs adapt"),
    ("lora={rank: 0}", "lora.rank must be greater than or equal to 1, not 0"),
    ("lora={dropout: 1}", "lora.dropout must be less than 1, not 1"),
    ("lora={targets: []}", "lora: targets must name at least one matrix"),
    ("lora={targets: [wq, wq]}", "lora: targets names a matrix twice"),
    (
        "lora={targets: [q_proj]}",
        "lora.targets.0 must be 'wq', 'wk', 'wv', 'wo', 'w1', 'w3' or 'w2', not 'q_proj'",
    ),
    ("zzz", "an override has the form section.key=value"),
    ("training.steps=[", "the value is not valid YAML"),
]


@pytest.mark.parametrize(("override", "sentence"), BAD_OVERRIDES)
def test_bad_overrides_get_one_sentence(minimal, override, sentence):
    with pytest.raises(InputError) as caught:
        yaml_file.load(minimal, [override])
    message = str(caught.value)
    assert message.endswith(sentence)
    assert "\n" not in message
    assert message.startswith((f"command line, '{override}'", str(minimal)))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("  peak_lr: 1e-4", "  peak_lrr: 1e-4"), "run.yaml:7: optimizer.peak_lrr is not a known"),
        (("  batch_size: 8", "  batch_size: eight"), "run.yaml:4: data.batch_size must be a valid"),
        (("  batch_size: 8\n", ""), "run.yaml:2: data.batch_size is missing (windows per"),
        (("steps: 10", "steps: 10, steps: 20"), "training.steps is already set in line 5"),
        (("steps: 10", "steps: [10"), "not valid YAML"),
        ((MINIMAL, "- a\n"), "the file must contain sections: model, mesh, data"),
        ((MINIMAL, ""), "the file must contain sections: model, mesh, data"),
    ],
)
def test_errors_in_a_file_name_the_line(tmp_path, change, sentence):
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL.replace(*change))
    with pytest.raises(InputError) as caught:
        yaml_file.load(path)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_binary_file_are_reported(tmp_path):
    with pytest.raises(InputError, match=r"can't read the configuration .*: No such file"):
        yaml_file.load(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        yaml_file.load(tmp_path / "binary.yaml")
