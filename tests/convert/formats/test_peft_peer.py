"""PEFT reads our folders, and we read PEFT's: the same logits and the same greedy tokens."""

import json

import jax
import numpy as np
import pytest
from conftest import peer
from lora_runs import write_base, write_lora_run
from sample_checkpoints import convert_to

import llama_jax as lj
from llama_jax.checkpoint.folders import read_model_config
from llama_jax.config.lora import LoraConfig
from llama_jax.convert.formats import peft as our_peft
from llama_jax.errors import InputError
from llama_jax.inference.load import load
from llama_jax.parallel.mesh import one_device_mesh

pytestmark = [
    pytest.mark.slow,
    # PEFT 0.21 reads an attribute that transformers 5.24 deprecates.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is:FutureWarning"),
]

TOKENS_BT = np.random.default_rng(1).integers(3, 320, (2, 16))
LORAS = [
    LoraConfig(rank=4, alpha=6.0),
    LoraConfig(rank=3, alpha=5.0, targets=("wv", "wo", "w2"), rank_stabilized=True),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("peft") / "base", context=64)


@pytest.fixture(scope="module")
def theirs(base):
    """Returns a function that loads the base into transformers."""
    transformers = peer("transformers")
    folder = convert_to(base, base.parent / "hf", to="hf")

    def load_base():
        return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()

    return load_base


def their_logits(model):
    torch = peer("torch")
    with torch.no_grad():
        return model(torch.tensor(TOKENS_BT)).logits.numpy()


def assert_as_close_as_peft(found, their_model):
    """Checks that our float32 logits are at most 4 times as far from PEFT's in float64 as its own.

    Both round the same number of operations, in another order; the distances are largest elements.
    """
    expected = their_logits(their_model)
    exact = their_logits(their_model.double())
    error = np.abs(expected - exact).max()
    assert error < 5e-5
    assert np.abs(found - exact).max() <= 4 * error


def our_logits(*args, **options):
    with jax.set_mesh(one_device_mesh()):
        config, model = load(*args, **options)
        return np.asarray(lj.forward(config, model, TOKENS_BT))


@pytest.mark.parametrize("lora", LORAS)
def test_peft_loads_our_folder_and_computes_our_logits(base, theirs, tmp_path, lora):
    peft = peer("peft")
    run = write_lora_run(tmp_path / "run", base, lora)
    adapter = convert_to(run, tmp_path / "adapter", to="peft")
    # Warns, and so fails, if a key is missing or unexpected.
    model = peft.PeftModel.from_pretrained(theirs(), adapter).eval()
    found = [our_logits(run, unmerged=unmerged) for unmerged in (False, True)]
    assert_as_close_as_peft(np.stack(found), model)
    assert np.abs(found - our_logits(base)).max() > 0.1


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "target_modules": ["q_proj", "v_proj"]},
        {"r": 8, "lora_alpha": 3, "target_modules": "all-linear", "use_rslora": True},
        {"r": 2, "target_modules": r".*\.mlp\.(up|down)_proj", "lora_dropout": 0.1},
    ],
)
def test_a_folder_that_peft_wrote_gives_the_logits_of_peft(base, theirs, tmp_path, options):
    peft, torch = peer("peft"), peer("torch")
    torch.manual_seed(0)
    model = peft.get_peft_model(theirs(), peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "adapter")
    pairs = our_peft.read(tmp_path / "adapter", read_model_config(base))
    assert pairs.lora.rank == options["r"]
    found = [our_logits(base, pairs=pairs, unmerged=unmerged) for unmerged in (False, True)]
    assert_as_close_as_peft(np.stack(found), model)
    assert np.abs(found - our_logits(base)).max() > 0.05


def test_dora_and_rank_patterns_of_peft_are_refused(base, theirs, tmp_path):
    peft = peer("peft")
    for i, options in enumerate([{"use_dora": True}, {"rank_pattern": {"q_proj": 2}}]):
        config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], **options)
        peft.get_peft_model(theirs(), config).save_pretrained(tmp_path / str(i))
        with pytest.raises(InputError, match="which is not supported: merge"):
            our_peft.read(tmp_path / str(i), read_model_config(base))


def test_transformers_continues_a_merged_export_with_the_tokens_of_our_unmerged_model(
    base, token_folder, tmp_path
):
    transformers, torch = peer("transformers"), peer("torch")
    run = write_lora_run(tmp_path / "run", base, tokenizer=token_folder)
    folder = convert_to(run, tmp_path / "merged", to="hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = torch.tensor(TOKENS_BT[:1, :6])
    theirs = model.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None)
    with jax.set_mesh(one_device_mesh()):
        ours = lj.generate(
            *load(run, unmerged=True), TOKENS_BT[:1, :6], [6], lj.Sampling(), [0],
            max_new_tokens=20,
        )  # fmt: skip
    np.testing.assert_array_equal(ours.tokens_Bn, theirs[:, 6:].numpy())
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2]
