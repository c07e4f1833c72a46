"""The bounds of each sampling setting."""

import numpy as np
import pytest
from pydantic import ValidationError

from llama_jax.inference.sampling import Sampling


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        *(("temperature", -0.1), ("temperature", np.inf), ("temperature", np.nan)),
        *(("temperature", 1e7), ("top_k", -1), ("top_k", 2**31), ("top_k", 1.5)),
        *(("top_p", 0.0), ("top_p", 1.01), ("top_p", np.nan), ("min_p", -0.1), ("min_p", 1.1)),
        *(("repetition_penalty", 0.0), ("repetition_penalty", np.inf)),
        *(("presence_penalty", 2.1), ("presence_penalty", np.nan), ("frequency_penalty", -2.1)),
        ("best_of", 2),
    ],
)
def test_settings_out_of_bounds_are_refused(name, wrong):
    with pytest.raises(ValidationError, match=name):
        Sampling(**{name: wrong})
