"""What `info` says of damaged folders: a sentence."""

import json
import shutil

import pytest

from llama_jax.cli.describe_folder import describe
from llama_jax.convert.convert import convert
from llama_jax.errors import InputError

STRANGE = ["-1", "1e400", "null", '"x"', "[]", "{}", '{"a": {}}', "[" * 100_000]


def changes(content, path=()):
    """Yields the places of all parts of a JSON value; of a list's, those of its first alone."""
    yield path
    inner = content.items() if isinstance(content, dict) else list(enumerate(content or ()))[:1]
    for key, value in inner:
        yield from changes(value if isinstance(value, dict | list) else (), (*path, key))


def changed(text, place, value):
    """Returns JSON in which the part at `place` is `value`, or is missing where that is None."""
    content = {"all": json.loads(text)}
    *before, last = ("all", *place)
    part = content
    for key in before:
        part = part[key]
    if value is None:
        del part[last]
    else:
        part[last] = "here"
    return json.dumps(content.get("all", "")).replace('"here"', value or "")


def survives(folder, path):
    """Tries every change of a JSON file in a folder; returns how many were refused."""
    text, refused = path.read_text(), []
    for place in changes(json.loads(text)):
        for value in [None, *STRANGE]:
            path.write_text(changed(text, place, value))
            try:
                describe(folder)
            except InputError as error:
                refused.append(str(error))
    path.write_text(text)
    assert all(str(folder) in told for told in refused)
    assert max(map(len, refused)) < 500 + 2 * len(str(path))
    return len(refused)


def test_a_receipt_without_a_key_is_damaged(model_folder, tmp_path):
    folder = convert(model_folder, tmp_path / "m", progress=False).folder
    path = folder / "receipt.json"
    receipt = json.loads(path.read_text())
    for name in ("verified", "source", "config"):
        path.write_text(json.dumps({k: v for k, v in receipt.items() if k != name}))
        with pytest.raises(InputError, match=r"receipt.json is damaged: convert the model again"):
            describe(folder)
    del receipt["weights"]  # which nothing here reads
    path.write_text(json.dumps(receipt))
    assert survives(folder, path) > 150


def test_a_damaged_configuration_or_list_of_shards_is_told(model_folder, token_folder, tmp_path):
    for source, name, least in (
        (model_folder, "config.json", 50),
        (token_folder, "meta.json", 150),
    ):
        folder = shutil.copytree(source, tmp_path / name)
        assert survives(folder, folder / name) > least
    for place, problem in (
        (("splits", "validation"), "splits.validation is missing"),
        (("splits", "train", "tokens"), "splits.train.tokens is missing"),
        (("sources",), "sources is missing"),
    ):
        path = tmp_path / "meta.json/meta.json"
        text = path.read_text()
        path.write_text(changed(text, place, None))
        with pytest.raises(InputError) as caught:
            describe(path.parent)
        assert f"has a damaged meta.json ({problem}): create a folder of" in str(caught.value)
        path.write_text(text)
