"""`import llama_jax as lj`: the names, their examples, the README's and the notebook's."""

import ast
import doctest
import importlib
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import ROOT, tiny_config, tiny_model

import llama_jax as lj
from llama_jax import config_file
from llama_jax.config import CheckpointConfig, DataConfig, LoggingConfig, OptimizerConfig
from llama_jax.sharding import one_device_mesh

SENTENCE = "The capital of France is Paris. "


@pytest.fixture(scope="module")
def world(token_folder, tmp_path_factory):
    """A folder as the examples know it, and their names.

    It holds a model that has learnt one sentence by heart, its configuration and its data.
    """
    folder = tmp_path_factory.mktemp("world")
    (folder / "data").mkdir()
    (folder / "data" / "tiny").symlink_to(token_folder)
    tokenizer = lj.load_tokenizer(token_folder)
    ids = tokenizer.encode(SENTENCE * 2, bos=True)
    run = replace(
        tiny_config(tiny_model(), steps=60),
        data=DataConfig(mixture={"data/tiny": 1.0}, seq_len=len(ids) - 1, batch_size=1),
        optimizer=OptimizerConfig(peak_lr=3e-2, warmup_steps=5),
    )
    rows = np.array([[ids]])
    positions = np.arange(len(ids) - 1).reshape(1, 1, -1)
    batch = lj.Batch(rows[..., :-1], rows[..., 1:], positions, None)
    with jax.set_mesh(one_device_mesh()):
        model, opt_state = lj.initial_state(run)
        for step in range(60):
            model, opt_state, metrics = lj.train_step(run, model, opt_state, batch, step)
        print(metrics.loss, len(ids))
        lj.save_model(folder / "models" / "tiny", run.model, model, tokenizer)
    return folder


def test_x(world):
    with jax.set_mesh(one_device_mesh()):
        config, model = lj.load(world/"models/tiny")
        tok=lj.load_tokenizer(world/"models/tiny")
        print(repr(lj.complete(config,model,tok,"The capital of France", stops=["."])))
        print(repr(lj.complete(config,model,tok,"The capital of France", max_new_tokens=12)))
        p=tok.encode("The capital of France is",bos=True)
        made=lj.generate(config,model,np.array([p]*2),np.array([len(p)]*2),lj.Sampling(),np.arange(2),max_new_tokens=5)
        print(made.logprobs_Bn, [tok.decode([i]) for i in tok.encode(SENTENCE)])
