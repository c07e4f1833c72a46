import pytest

from llama_jax.runtime.chips import CHIPS, chip_of


@pytest.mark.parametrize(
    ("device_kind", "name"),
    [
        ("TPU v5", "v5p"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5 lite0", "v5e"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("cpu", None),
    ],
)
def test_the_longest_prefix_names_the_chip(device_kind, name):
    assert chip_of(device_kind) is (name and CHIPS[name])
