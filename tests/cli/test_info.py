"""`llama-jax info` reports a damaged folder in one sentence."""

import json
import shutil

import pytest

from llama_jax.cli.describe_folder import describe
from llama_jax.convert.convert import convert
from llama_jax.errors import InputError
from llama_jax.runtime.manifest import hash_bytes, read_manifest, write_manifest

STRANGE_VALUES = ["-1", "1e400", "null", '"x"', "[]", "{}", '{"a": {}}', "[" * 100_000]


def list_keys(content, key=()):
    """Yields the keys of all parts of a JSON value; of a list, only those of its first item."""
    yield key
    parts = content.items() if isinstance(content, dict) else list(enumerate(content or ()))[:1]
    for name, part in parts:
        yield from list_keys(part if isinstance(part, dict | list) else (), (*key, name))


def replace_part(text, key, value):
    """Returns the JSON with `value` at `key`; without that part if `value` is None."""
    content = {"all": json.loads(text)}
    *parents, last = ("all", *key)
    part = content
    for name in parents:
        part = part[name]
    if value is None:
        del part[last]
    else:
        part[last] = "here"
    return json.dumps(content.get("all", "")).replace('"here"', value or "")


def count_refused_changes(folder, path):
    """Damages each part of a JSON file of the folder; returns how many changes were refused."""
    text, messages = path.read_text(), []
    for key in list_keys(json.loads(text)):
        for value in [None, *STRANGE_VALUES]:
            path.write_text(replace_part(text, key, value))
            reseal(path)
            try:
                describe(folder)
            except InputError as error:
                messages.append(str(error))
    path.write_text(text)
    reseal(path)
    assert all(str(folder) in message for message in messages)
    assert max(map(len, messages)) < 500 + 2 * len(str(path))
    return len(messages)


def reseal(path):
    """Writes the checksum of a changed file, as somebody who changes it on purpose can."""
    if path.name == "meta.json":
        try:
            content = json.loads(path.read_text())
        except (ValueError, RecursionError):
            return  # refused by its checksum
        if isinstance(content, dict):
            content.pop("sha256", None)
            write_manifest(path.parent, content, "meta.json")
    elif path.name == "receipt.json":
        content = read_manifest(path.parent)
        content.pop("sha256")
        content["files"][path.name] = hash_bytes(path.read_bytes())
        write_manifest(path.parent, content)


def test_a_receipt_without_a_key_is_damaged(model_folder, tmp_path):
    folder = convert(model_folder, tmp_path / "m", progress=False).folder
    path = folder / "receipt.json"
    receipt = json.loads(path.read_text())
    for name in ("verified", "source"):
        path.write_text(json.dumps({k: v for k, v in receipt.items() if k != name}))
        reseal(path)
        with pytest.raises(InputError, match=r"receipt.json is damaged: convert the model again"):
            describe(folder)
    del receipt["weights"]  # `info` doesn't read them
    path.write_text(json.dumps(receipt))
    assert count_refused_changes(folder, path) > 100


def test_a_damaged_configuration_or_list_of_shards_is_reported(
    model_folder, token_folder, chat_folder, tmp_path
):
    for source, name, minimum in (
        (model_folder, "config.json", 50),
        (chat_folder, "meta.json", 200),
        (token_folder, "meta.json", 150),
    ):
        folder = shutil.copytree(source, tmp_path / source.name)
        assert count_refused_changes(folder, folder / name) > minimum
    for key, problem in (
        (("splits", "validation"), "splits.validation is missing"),
        (("splits", "train", "tokens"), "splits.train.tokens is missing"),
        (("sources",), "sources is missing"),
    ):
        path = tmp_path / token_folder.name / "meta.json"
        text = path.read_text()
        path.write_text(replace_part(text, key, None))
        reseal(path)
        with pytest.raises(InputError) as caught:
            describe(path.parent)
        assert f"has a damaged meta.json ({problem}): create a folder of" in str(caught.value)
        path.write_text(text)
