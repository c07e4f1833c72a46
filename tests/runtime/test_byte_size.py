import pytest

from llama_jax.errors import InputError
from llama_jax.runtime.byte_size import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GiB", 4 << 30), ("800MB", 800_000_000), ("1.5 GB", 1_500_000_000), ("512", 512)],
)
def test_a_size_is_a_number_with_a_unit(text, size):
    assert parse_size(text, "--max-ram") == size


@pytest.mark.parametrize("text", ["", "4 G iB", "-1GB", "much"])
def test_a_text_that_is_not_a_size_is_refused(text):
    with pytest.raises(InputError) as caught:
        parse_size(text, "--max-ram")
    assert str(caught.value) == f"--max-ram must be a size such as 4GiB or 800MB, not {text!r}"
