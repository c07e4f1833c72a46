"""HumanEval and MBPP: programs from answers, and whether they pass the tests of the data set.

lm-eval's own files for them can't be included: they download their metric when they are imported.
"""

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_jax.evaluation.run_program import passes


def check_humaneval(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Returns whether the function that the model completed passes the tests of the problem."""
    program = f"{doc['prompt']}{results[0]}\n{doc['test']}\ncheck({doc['entry_point']})\n"
    return {"pass@1": float(passes(program))}


def check_mbpp(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Returns whether the program that the model wrote passes the tests of the problem."""
    parts = [doc["test_setup_code"], results[0], *doc["test_list"]]
    return {"pass@1": float(passes("\n".join(parts)))}


def mbpp_examples() -> list[dict[str, Any]]:
    """Returns the three examples of MBPP's prompt (Austin et al. 2021), from lm-eval's source."""
    import lm_eval.tasks

    source = Path(lm_eval.tasks.__file__).with_name("mbpp") / "utils.py"
    functions = {
        node.name: node
        for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    result = functions["list_fewshot_samples"].body[-1]
    assert isinstance(result, ast.Return)
    assert result.value is not None
    return ast.literal_eval(result.value)
