import jax
import pytest

from llama_jax.checkpoint.tree import abstract_model
from llama_jax.config.family import FAMILY
from llama_jax.config.model import ffn_dim
from llama_jax.parallel.mesh import one_device_mesh

# Parameter counts published with the weights.
COUNTS = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "codellama-7b": 6_738_546_688,
    "codellama-13b": 13_016_028_160,
    "codellama-34b": 33_743_970_304,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "llama3.3-70b": 70_553_706_496,
}


def test_every_member_has_its_published_parameter_count():
    assert {name: config.n_params for name, config in FAMILY.items()} == COUNTS


@pytest.mark.parametrize("name", ["llama-33b", "llama2-70b", "llama3.2-1b", "llama3.1-405b"])
def test_n_params_counts_the_weights_of_the_model(name):
    with jax.set_mesh(one_device_mesh()):
        model = abstract_model(FAMILY[name])
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == COUNTS[name]


@pytest.mark.parametrize(
    ("name", "multiple_of", "multiplier"),
    [
        ("llama-7b", 256, None),
        ("llama-13b", 256, None),
        ("llama-33b", 256, None),
        ("llama-65b", 256, None),
        ("llama2-70b", 4096, 1.3),
        ("llama3-8b", 1024, 1.3),
        ("llama3-70b", 4096, 1.3),
        ("llama3.1-405b", 4096, 1.2),
        ("llama3.2-1b", 256, 1.5),
        ("llama3.2-3b", 256, 1.0),
    ],
)
def test_ffn_dim_follows_from_params_json(name, multiple_of, multiplier):
    config = FAMILY[name]
    assert ffn_dim(config.dim, multiple_of, multiplier) == config.hidden_dim


def test_flops_of_65b_reproduce_the_mfu_of_the_paper():
    # 380 tokens/s on an A100 with 312 TFLOP/s are an MFU of 48.6 % if the embedding look-up counts
    # as a matrix product (a difference of 0.15 %).
    mfu = 380 * FAMILY["llama-65b"].flops_per_token(2048) / 312e12
    assert abs(mfu - 0.486) < 0.002
