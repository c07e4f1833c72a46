"""`import llama_jax as lj`: its names and their examples, the README, the notebook."""

import ast
import doctest
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import jax
import numpy as np
import pytest
from conftest import ROOT, tiny_config

import llama_jax as lj
from llama_jax.config import family, yaml_file
from llama_jax.config.run import DataConfig, LoggingConfig, OptimizerConfig
from llama_jax.parallel.mesh import one_device_mesh

SENTENCE = "The capital of France is Paris. "


@pytest.fixture(scope="module")
def world(token_folder, tmp_path_factory):
    """Returns the folder in which the examples run, and the variables that they use.

    The folder contains a model that was trained on one sentence, its data, and the run's
    configuration.
    """
    folder = tmp_path_factory.mktemp("world")
    (folder / "data").mkdir()
    (folder / "data" / "tiny").symlink_to(token_folder)
    tokenizer = lj.load_tokenizer(token_folder)
    ids = tokenizer.encode(SENTENCE * 2, bos=True)
    T = len(ids) - 1
    run = replace(
        tiny_config(steps=60, out="runs/tiny", eval_batches=1),
        data=DataConfig(
            mixture={"data/tiny": 1.0}, seq_len=T, batch_size=1, isolate_documents=False
        ),
        optimizer=OptimizerConfig(peak_lr=3e-2, warmup_steps=5),
        logging=LoggingConfig(tensorboard=False, progress=False),
    )
    (folder / "tiny.yaml").write_text(yaml_file.dump(run))
    rows = np.array([[ids]])
    batch = lj.Batch(rows[..., :-1], rows[..., 1:], np.arange(T).reshape(1, 1, T), None)
    with jax.set_mesh(one_device_mesh()):
        model, opt_state = lj.initial_state(run)
        for step in range(run.training.steps):
            model, opt_state, _ = lj.train_step(run, model, opt_state, batch, step)
        lj.save_model(folder / "models" / "tiny", run.model, model, tokenizer)
        (folder / "models" / "smollm2").symlink_to("tiny")
        config, model = lj.load(folder / "models" / "tiny")
    names = {"lj": lj, "np": np, "jax": jax, "config": config, "model": model}
    return folder, names | {"tokenizer": tokenizer, "run": run, "batch": batch}


@pytest.fixture
def names(world, one_device, monkeypatch):
    """Returns the variables of the examples, in their folder, on a machine with one device."""
    folder, names = world
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:1])
    monkeypatch.chdir(folder)
    return dict(names)


@pytest.mark.parametrize("name", lj.__all__)
def test_the_examples_of_each_name_pass(name, names):
    text = family.__doc__ if name == "FAMILY" else getattr(lj, name).__doc__
    test = doctest.DocTestParser().get_doctest(text, names, name, None, 0)
    output: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(test, out=output.append)
    assert result.attempted > 0
    assert result.failed == 0, "".join(output)


def test_the_readme_example_runs(names, capsys):
    section = (ROOT / "README.md").read_text().split("## As a library")[1].split("\n## ")[0]
    exec(re.findall("```python\n(.*?)```", section, re.S)[0], names)
    assert capsys.readouterr().out.startswith(" Paris.")


def test_the_notebook_inspects_a_model_and_trains(names, capsys):
    """Runs its code on the tiny model; .ci/run executes the notebook in Jupyter."""
    notebook = json.loads((ROOT / "docs" / "notebook.ipynb").read_text())
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    assert "../models/smollm2" in cells[0]
    code = "\n".join(cells).replace("../models/smollm2", "models/tiny")
    exec(compile(code, "notebook.ipynb", "exec"), names)
    out = capsys.readouterr().out
    assert "45,216 parameters, 2 layers" in out
    assert out.count("--- seed") == 2
    assert np.shape(names["next_token_logprobs"]) == (2, len(names["prompt"]) - 1)
    assert np.max(names["next_token_logprobs"]) < 0  # logarithms of probability
    assert names["image"].get_array().shape == np.shape(names["next_token_logprobs"])
    losses = names["losses"]
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 1


def test_without_a_mesh_load_shards_over_all_devices_and_sets_no_mesh(world):
    folder, names = world

    def load_in_thread():  # a mesh is set per thread
        model = lj.load(folder / "models" / "tiny")[1]
        return jax.sharding.get_mesh().size, model.layers[0].w1[...]

    with ThreadPoolExecutor(1) as thread:
        size, w1_DF = thread.submit(load_in_thread).result()
    assert (size, len(w1_DF.addressable_shards)) == (8, 8)
    assert jax.sharding.get_mesh().empty
    np.testing.assert_array_equal(w1_DF, names["model"].layers[0].w1[...])


def test_changelog_and_citation_name_the_version():
    changelog, citation = ((ROOT / n).read_text() for n in ("CHANGELOG.md", "CITATION.cff"))
    version, date = re.findall(r"^## (\S+) \((.+)\)$", changelog, re.M)[0]
    assert version == lj.__version__
    assert f"version: {version}\ndate-released: {date}\n" in citation


def test_lazy_imports_and_type_checker_imports_agree():
    imports = {}
    for node in ast.walk(ast.parse((ROOT / "llama_jax" / "__init__.py").read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llama_jax."):
            module = node.module.removeprefix("llama_jax.")
            imports |= {a.asname or a.name: f"{module}.{a.name}" for a in node.names}
    assert imports == lj._MODULES
    assert sorted(imports) == sorted(lj.__all__) == dir(lj)
    with pytest.raises(AttributeError, match="no attribute 'forwards'"):
        lj.forwards  # noqa: B018


@pytest.mark.parametrize(
    "statement", ["import llama_jax; dir(llama_jax)", "import llama_jax.cli.describe_folder"]
)
def test_these_imports_load_no_jax(statement):
    """With JAX, Orbax and Grain, `llama-jax info` took 3.4 s."""
    program = f"import sys; {statement}; print({{'jax', 'flax', 'orbax'}} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"
