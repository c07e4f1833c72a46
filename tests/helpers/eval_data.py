"""Rows and task data from the samples of real evaluation sets."""

import json
import shutil

# The files of the samples, by the name that the tasks read.
FILES = {
    "arc_easy_test": "arc_easy_validation_sample",
    "arc_easy_train": "arc_challenge_validation_sample",
    "gsm8k_test": "gsm8k_train_sample",
    "gsm8k_train": "gsm8k_train_sample",
    "nq_open_validation": "nq_open_validation_sample",
}


def rows(shared_data, name):
    """Returns the rows of a sample."""
    path = shared_data / "eval_samples" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_task_data(shared_data, folder):
    """Fills a folder for --data; returns it."""
    folder.mkdir(exist_ok=True)
    for name, sample in FILES.items():
        shutil.copy(shared_data / "eval_samples" / f"{sample}.jsonl", folder / f"{name}.jsonl")
    return folder
