"""The export of a fine-tune has the chat template and every end token of its training."""

import json
import shutil

import pytest
import tokenizers
from conftest import peer, tiny_config
from lora_runs import write_base, write_lora_run
from sample_checkpoints import convert_to
from tokenizers import decoders, models, pre_tokenizers

from llama_jax.checkpoint.folders import read_model_config
from llama_jax.config import yaml_file
from llama_jax.runtime.manifest import read_manifest, write_manifest
from llama_jax.tokenizer.tokenizer import load_tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n'"
    " + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = "{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}"
CHATML_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA3_TOKENS = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eom_id|>", "<|eot_id|>",
]  # fmt: skip


def write_tokenizer(folder, special, template=None, **generation):
    """Writes a tokenizer of bytes, 256 ids, followed by special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if template:
        config = {"chat_template": template, "eos_token": special[0]}
        config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def tokenizer_of(folder):
    """Returns the tokenizer of a folder, and the content of its generation_config.json."""
    return load_tokenizer(folder), json.loads((folder / "generation_config.json").read_text())


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model with a chat template, whose answers end with <|im_end|>."""
    folder = tmp_path_factory.mktemp("tokenizers")
    tokens = write_tokenizer(
        folder / "tokens", CHATML_TOKENS, CHATML, eos_token_id=[258, 256], temperature=0.6
    )
    return write_base(folder / "base", tokens)


@pytest.mark.parametrize("to", ["hf", "orbax", "peft"])
@pytest.mark.parametrize("complete", [True, False])
def test_every_end_token_and_the_template_are_exported(base, tmp_path, to, complete):
    # An incomplete tokenizer is a bare tokenizer.json, from which text is tokenized as well.
    bare = write_tokenizer(tmp_path / "bare", CHATML_TOKENS)
    run = write_lora_run(tmp_path / "run", base, tokenizer=base if complete else bare)
    assert load_tokenizer(run).end_ids == ({256, 258} if complete else {256})
    tokenizer, generation = tokenizer_of(convert_to(run, tmp_path / "out", to=to))
    assert tokenizer.template == CHATML
    assert tokenizer.end_ids == {256, 258}
    assert generation["eos_token_id"] == [256, 258]
    assert generation["temperature"] == 0.6
    if to == "hf":
        config = json.loads((tmp_path / "out/config.json").read_text())
        assert config["eos_token_id"] == [256, 258]
    messages = [{"role": "user", "content": "Is it?"}]
    ours = load_tokenizer(base).encode_chat(messages)
    assert tokenizer.encode_chat(messages) == ours
    if to != "orbax":
        theirs = peer("transformers").AutoTokenizer.from_pretrained(tmp_path / "out")
        rendered = theirs.apply_chat_template(messages, add_generation_prompt=True)
        assert rendered["input_ids"] == ours


def test_the_template_of_the_training_wins_over_that_of_the_base(base, tmp_path):
    tokens = write_tokenizer(tmp_path / "tokens", CHATML_TOKENS, PLAIN)
    run = write_lora_run(tmp_path / "run", base, tokenizer=tokens)
    tokenizer, generation = tokenizer_of(convert_to(run, tmp_path / "out", to="hf"))
    assert tokenizer.template == PLAIN
    assert generation["eos_token_id"] == [256, 258]


def test_a_base_of_llama_3_that_was_tuned_on_chats_stops_at_the_end_of_a_turn(tmp_path):
    tokens = write_tokenizer(tmp_path / "tokens", LLAMA3_TOKENS, eos_token_id=257)
    base = write_base(tmp_path / "base", tokens)
    run = write_lora_run(tmp_path / "run", base, tokenizer=base)
    for to in ("hf", "orbax", "peft"):
        tokenizer, generation = tokenizer_of(convert_to(run, tmp_path / to, to=to))
        assert generation["eos_token_id"] == [257, 260, 261]
        assert tokenizer.end_ids == {257, 260, 261}


def test_a_fine_tune_of_all_weights_is_exported_in_the_same_way(base, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(base / "weights", run / "checkpoints/1")
    files = read_manifest(base)["files"]
    weights = {n.removeprefix("weights/"): h for n, h in files.items() if n.startswith("weights/")}
    content = {"format": 1, "step": 1, "data": [], "files": weights, "fingerprints": {}}
    write_manifest(run / "checkpoints/1", content)
    config = tiny_config(read_model_config(base), init_from=str(base))
    (run / "config.yaml").write_text(yaml_file.dump(config))
    for path in base.glob("*tok*.json"):
        shutil.copy(path, run)
    tokenizer, generation = tokenizer_of(convert_to(run, tmp_path / "out", to="hf"))
    assert (tokenizer.template, generation["eos_token_id"]) == (CHATML, [256, 258])


def test_a_foreign_checkpoint_keeps_its_files_unchanged(base, tmp_path):
    exported = convert_to(base, tmp_path / "out", to="hf")
    for name in ("generation_config.json", "tokenizer_config.json"):
        assert (exported / name).read_bytes() == (base / name).read_bytes()
