"""Writes items like HellaSwag's about Python code: which two lines follow these eight?

    python docs/code_choices.py eval-code
    llama-jax train quickstart \\
        'training.evaluate={tasks: [hellaswag], data: eval-code, every: 25, limit: 200}'

The code is that of the tests of Python's standard library, which the corpus `python-stdlib` leaves
out. The three wrong endings follow other places of the same file.
"""

import json
import random
import sys
import sysconfig
from pathlib import Path

N_CONTEXT, N_ENDING, N_ENDINGS = 8, 2, 4


def main() -> None:
    """Writes hellaswag_validation.jsonl into the folder that the argument names."""
    [folder] = map(Path, sys.argv[1:])
    folder.mkdir(exist_ok=True)
    rng, rows = random.Random(0), []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"], "test").glob("test_*.py")):
        lines = [line for line in path.read_text(errors="ignore").splitlines() if line.strip()]
        starts = range(0, len(lines) - N_CONTEXT - N_ENDING, N_CONTEXT + N_ENDING)
        if len(starts) < 4 * N_ENDINGS:
            continue
        chosen = rng.sample(starts, N_ENDINGS)
        ends = ["\n".join(lines[s + N_CONTEXT :][:N_ENDING]).strip() for s in chosen]
        context = "\n".join(lines[chosen[0] :][:N_CONTEXT])
        label = len(rows) % N_ENDINGS
        endings = [*ends[1 : label + 1], ends[0], *ends[label + 1 :]]
        item = {"activity_label": path.stem, "ctx_a": context, "ctx_b": ""}
        rows.append(item | {"endings": endings, "label": str(label)})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "hellaswag_validation.jsonl").write_text(text)
    print(f"{folder}: {len(rows)} items")


if __name__ == "__main__":
    main()
