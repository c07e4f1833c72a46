"""The start of an engine whose programs are stored."""

import jax
import pytest
from engine_requests import CONFIG, DRAWN, random_prompt, submit, tokens_alone
from program_folder import program_folder

from llama_jax.inference.engine.engine import Engine
from llama_jax.inference.engine.requests import Request
from llama_jax.inference.engine.row_programs import cache_sizes
from llama_jax.inference.engine.warm_up import n_programs
from llama_jax.model.weights import Llama, unstack_layers
from llama_jax.parallel.mesh import one_device_mesh
from llama_jax.runtime.compile_cache import compile_statistics
from llama_jax.runtime.program_store import StoredProgram, stored_programs


@pytest.mark.slow
def test_the_second_start_reads_its_programs_and_generates_the_same_tokens(tmp_path, monkeypatch):
    requests = [
        Request(random_prompt(5), 9, DRAWN, seed=3),
        Request(random_prompt(40), 500),  # needs the larger cache, which may not be ready
        Request(random_prompt(300), 4, DRAWN, seed=7),
    ]
    assert len(cache_sizes(1000)) == 2
    lowered = []
    lower = StoredProgram._lower_afresh

    def count(program, *args, **named):
        lowered.append(program)
        return lower(program, *args, **named)

    monkeypatch.setattr(StoredProgram, "_lower_afresh", count)
    counts, reported = [], []
    with jax.set_mesh(one_device_mesh()):
        model = unstack_layers(jax.jit(Llama, static_argnums=0)(CONFIG, jax.random.key(0)))
        expected = [tokens_alone(model, request) for request in requests]
        with program_folder(tmp_path):
            for _ in range(2):
                with stored_programs("test"):
                    assert n_programs(1000, paged=False) == 4
                    engine = Engine(
                        CONFIG, model, rows=2, context=1000,
                        progress=lambda *args: reported.append(args),
                    )  # fmt: skip
                    before = compile_statistics().programs
                    responses = submit(engine, *requests)
                    assert [response.wait().ids for response in responses] == expected
                    engine.close()
                    counts.append((len(lowered), compile_statistics().programs - before))
                lowered.clear()
    assert len(reported) == 8
    (first, _), (second, compiled) = counts
    assert first > 10
    assert (second, compiled) == (0, 0)
