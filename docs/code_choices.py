"""Writes items like HellaSwag's about Python code: which ending has its words in order?

    python docs/code_choices.py eval-code
    llama-jax train quickstart \\
        'training.evaluate={tasks: [hellaswag], data: eval-code, every: 15, limit: 100}'

The code is that of the tests of Python's standard library, which the corpus `python-stdlib` leaves
out. Each item has two lines as context and the two lines after them; the three wrong endings have
the same words in another order.
"""

import json
import random
import re
import sys
import sysconfig
from pathlib import Path

N_ENDINGS = 4


def shuffle_words(text: str, rng: random.Random) -> str:
    """Returns a text with its words in another order, and all else in place."""
    words = re.findall(r"\w+", text)
    rng.shuffle(words)
    return re.sub(r"\w+", lambda _: words.pop(), text)


def main() -> None:
    """Writes hellaswag_validation.jsonl into the folder that the argument names."""
    [folder] = map(Path, sys.argv[1:])
    folder.mkdir(exist_ok=True)
    rng, rows = random.Random(0), []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"], "test").glob("test_*.py")):
        lines = [line for line in path.read_text(errors="ignore").splitlines() if line.strip()]
        if len(lines) < 5:
            continue
        start = rng.randrange(len(lines) - 4)
        context, ending = ("\n".join(lines[i : i + 2]).strip() for i in (start, start + 2))
        wrong = {shuffle_words(ending, rng) for _ in range(20)} - {ending}
        if len(wrong) >= N_ENDINGS - 1:
            label = len(rows) % N_ENDINGS
            endings = sorted(wrong)[: N_ENDINGS - 1]
            endings.insert(label, ending)
            item = {"activity_label": path.stem, "ctx_a": context, "ctx_b": ""}
            rows.append(item | {"endings": endings, "label": str(label)})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "hellaswag_validation.jsonl").write_text(text)
    print(f"{folder}: {len(rows)} items")


if __name__ == "__main__":
    main()
