"""Tasks of lm-evaluation-harness, from local data sets or from the hub.

A task file in `task_files/` includes lm-eval's own file and says where its rows come from
(`task_data.py`). A file with SUBJECT or SHOTS in it stands for several tasks. For a command:

    names = expand_names(["boolq", "paper:mmlu"], shots)
    tasks = load_tasks(names, data, shots, run_code=False)
    lm_eval.evaluator.evaluate(model, tasks, confirm_run_unsafe_code=True, …)

`load_tasks` has already refused tasks that run generated programs, unless `run_code` is set.
"""

import difflib
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_jax.errors import InputError, missing_extra
from llama_jax.evaluation.drawn_answers import TEMPERATURE, aggregate_draws, draw_answers
from llama_jax.evaluation.paper_tables import CLOSED_BOOK_SHOTS, TABLES
from llama_jax.evaluation.relative_choice import score_relative_to
from llama_jax.evaluation.run_program import passes
from llama_jax.evaluation.task_data import find_file
from llama_jax.runtime.storage import AnyPath

_FILES = Path(__file__).with_name("task_files")
_PAPER = "paper:"
FEWSHOT_SEED = 1234  # lm-eval's default: it draws the examples of few-shot prompts
_MATH = {
    "algebra": ("algebra", "Algebra"),
    "counting_and_prob": ("counting_and_probability", "Counting & Probability"),
    "geometry": ("geometry", "Geometry"),
    "intermediate_algebra": ("intermediate_algebra", "Intermediate Algebra"),
    "num_theory": ("number_theory", "Number Theory"),
    "prealgebra": ("prealgebra", "Prealgebra"),
    "precalc": ("precalculus", "Precalculus"),
}


def task_names() -> list[str]:
    """Returns the tasks that can read local data, groups of tasks, and the paper's tables."""
    files = {path.stem for path in _FILES.glob("*.yaml")}
    single = {name for name in files if not name.startswith("paper_") and "_group" not in name}
    return sorted(single) + [_PAPER + name for name in (*TABLES, "all")]


def expand_names(names: Sequence[str], shots: int | None = None) -> list[str]:
    """Returns `names` with the tasks of the paper's tables in place of `paper:TABLE`.

    Args:
        names: tasks, groups, `paper:TABLE` or `paper:all`.
        shots: as given by the user. Of the closed-book tables it selects a column.

    Raises:
        InputError: there is no such table, or it has other shots.
    """
    expanded: list[str] = []
    for name in names:
        if not name.startswith(_PAPER):
            expanded.append(name)
            continue
        table = name.removeprefix(_PAPER)
        if table != "all" and table not in TABLES:
            options = ", ".join(_PAPER + option for option in (*TABLES, "all"))
            raise InputError(f"there is no table {name}: choose one of {options}")
        tables = list(TABLES.values()) if table == "all" else [TABLES[table]]
        tasks = [task for t in tables for task in t.tasks]
        if shots is not None:
            if table != "closed-book" or shots not in CLOSED_BOOK_SHOTS:
                allowed = ", ".join(map(str, CLOSED_BOOK_SHOTS))
                raise InputError(
                    f"--shots {shots}: the numbers of examples in {name} are the paper's; leave out"
                    f" --shots (only paper:closed-book takes one of {allowed})"
                )
            tasks = [task for task in tasks if task.endswith(f"_{shots}shot")]
        expanded += tasks
    return list(dict.fromkeys(expanded))


def load_tasks(
    names: Sequence[str],
    data: AnyPath | None = None,
    shots: int | None = None,
    *,
    run_code: bool = False,
    samples: int | None = None,
    temperature: float = TEMPERATURE,
) -> dict[str, Any]:
    """Returns tasks as `lm_eval.evaluator.evaluate` takes them: `tasks`, `groups`, `group_map`.

    Args:
        names: tasks, groups, `paper:TABLE`.
        data: the folder with the files of the data sets; None: lm-eval loads them from the hub,
            and any task of lm-eval is allowed.
        shots: the number of examples before each question; None: the task's own.
        run_code: whether tasks may run generated programs.
        samples: how many answers to draw to each item, for pass@k and maj1@k; None: one answer, as
            the task generates it.
        temperature: of the draws.

    Raises:
        InputError: lm-eval is missing, a name is unknown, a file is missing or has other fields, a
            task has no answers to draw, or a task runs programs and `run_code` is not set or this
            machine can't isolate them.
    """
    names = expand_names(names, shots)
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when lm-eval is imported: a bar for each task
    try:
        import lm_eval.tasks
    except ImportError as error:
        raise missing_extra("evaluating tasks needs lm-eval", "eval") from error
    if data is not None and not data.is_dir():
        raise InputError(f"--data {data}: there is no such folder: create it with the data sets")
    with tempfile.TemporaryDirectory(prefix="llama_jax-tasks-") as folder:
        files = _write_task_files(Path(folder), Path(lm_eval.tasks.__file__).parent)
        metadata: dict[str, Any] = {} if data is None else {"data": str(data)}
        manager = lm_eval.tasks.TaskManager(
            include_path=str(files), include_defaults=False, metadata=metadata
        )
        mapped = [name for name in names if name in manager.all_tasks]
        others = [name for name in names if name not in manager.all_tasks]
        if data is not None and others:
            raise InputError(
                f"task {others[0]} can't read local data{_suggestion(others[0])}: use one of"
                f" {', '.join(task_names())}; or leave out --data to load it from the hub"
            )
        loaded = _load(manager, mapped)
    if others:
        manager = lm_eval.tasks.TaskManager()  # indexing 14,000 files takes half a minute
        for name in others:
            if name not in manager.all_tasks:
                raise InputError(f"there is no task {name}{_suggestion(name, manager.all_tasks)}")
        more = _load(manager, others)
        loaded = {kind: {**loaded[kind], **more[kind]} for kind in loaded}
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) and not (run_code and passes("")):
            raise InputError(
                f"task {name} runs the programs that the model writes: add --run-code to allow it"
                " (in processes without network and with limits; docs/evaluate.md)"
            )
        _configure(name, task, data, shots)
    if samples is not None:
        drawn = [draw_answers(*task, samples, temperature) for task in loaded["tasks"].items()]
        for group in loaded["groups"].values():
            aggregate_draws(group, drawn[0])
    return loaded


def _load(manager: Any, names: list[str]) -> dict[str, dict[str, Any]]:
    """Returns the tasks with these names and their groups."""
    if not names:
        return {"tasks": {}, "groups": {}, "group_map": {}}
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of each file that has its own reader
    try:
        loaded = manager.load(names)
    except (ImportError, AssertionError) as error:  # of lm-eval[math]: missing, or its version
        raise missing_extra(
            f"{', '.join(names)}: lm-eval lacks a package ({error})", "eval"
        ) from error
    finally:
        logger.setLevel(level)
    return {kind: dict(loaded.get(kind, {})) for kind in ("tasks", "groups", "group_map")}


def _configure(name: str, task: Any, data: AnyPath | None, shots: int | None) -> None:
    """Sets the number of examples, their seed, the processed rows, and our own metric.

    Raises:
        InputError: the task needs more examples than its data set has.
    """
    own = task.config.num_fewshot
    if shots is not None and own != 0:  # a task that sets 0 has its examples in the prompt
        task.set_config("num_fewshot", shots)
    elif own is None:
        task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(FEWSHOT_SEED)
    needed, found = task.config.num_fewshot, len(getattr(getattr(task, "sampler", None), "df", []))
    if needed > found:
        kwargs = task.config.dataset_kwargs or {}
        split = task.config.fewshot_split or task.config.training_split
        file = (kwargs.get("files") or {}).get(split)
        if data is not None and file and find_file(data, file) is None:
            raise InputError(
                f"task {name} shows {needed} examples, and {data} has no {file}.jsonl: save there"
                f" the split '{split}' of huggingface.co/datasets/{kwargs['hub']}"
            )
        raise InputError(f"task {name} has only {found} examples to show: give a smaller --shots")
    if data is not None and task.config.process_docs is not None:
        # lm-eval processes all rows again each time that it reads them, some twice per evaluation.
        split = task.config.test_split or task.config.validation_split
        task.dataset[split], task.config.process_docs = task.eval_docs, None
    metadata = task.config.metadata or {}
    metadata.pop("config_source", None)  # a path in a temporary folder
    if context := metadata.get("relative_to"):
        score_relative_to(task, context)


def _suggestion(name: str, names: Sequence[str] | None = None) -> str:
    close = difflib.get_close_matches(name, task_names() if names is None else names, 3)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def _write_task_files(folder: Path, lm_eval_tasks: Path) -> Path:
    """Writes all task files into a new folder in `folder`, beside a link to lm-eval's.

    lm-eval finds an included file relative to the file that includes it.
    """
    (folder / "lm_eval").symlink_to(lm_eval_tasks, target_is_directory=True)
    target = folder / "tasks"
    target.mkdir()
    subjects = lm_eval_tasks.glob("mmlu/default/mmlu_*.yaml")
    by_shots = [{"SHOTS": str(shots)} for shots in CLOSED_BOOK_SHOTS]
    families: dict[str, list[dict[str, str]]] = {
        "mmlu": [{"SUBJECT": path.stem.removeprefix("mmlu_")} for path in subjects],
        "minerva_math": [
            {"SUBJECT": name, "CONFIG": config, "TYPE": kind}
            for name, (config, kind) in _MATH.items()
        ],
        "paper_nq_open": by_shots,
        "paper_triviaqa": by_shots,
    }
    for path in _FILES.glob("*.yaml"):
        for values in families.get(path.stem, [{}]):
            text = path.read_text()
            for word, value in values.items():
                text = text.replace(word, value)
            name = "_".join([path.stem, *list(values.values())[:1]])
            (target / f"{name}.yaml").write_text(text)
    return target
