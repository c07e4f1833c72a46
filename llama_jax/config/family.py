"""The LLaMA family: `FAMILY[name]` is the configuration of a released model.

>>> lj.FAMILY["llama2-7b"].n_params
6738415616
>>> lj.FAMILY["llama3.1-8b"].rope_scaling.factor
8.0

Sources: LLaMA (arXiv 2302.13971, table 2), Llama 2 (2307.09288), Code Llama (2308.12950) and
The Llama 3 Herd of Models (2407.21783), with the `params.json` of each release.
"""

from typing import Any

from llama_jax.config.model import ModelConfig, RopeScaling


def _member(dim: int, n_layers: int, n_heads: int, hidden_dim: int, **other: Any) -> ModelConfig:
    shape: dict[str, Any] = {
        "n_kv_heads": n_heads,
        "head_dim": dim // n_heads,
        "vocab_size": 32_000,
    }
    return ModelConfig(
        dim=dim, n_layers=n_layers, n_heads=n_heads, hidden_dim=hidden_dim, **(shape | other)
    )


_LLAMA2: dict[str, Any] = {"context": 4096}
_CODE = {"context": 16_384, "rope_theta": 1e6}
_LLAMA3 = {"n_kv_heads": 8, "vocab_size": 128_256, "rope_theta": 5e5, "context": 8192}
_LLAMA31 = _LLAMA3 | {"context": 131_072, "rope_scaling": RopeScaling(factor=8.0)}
_LLAMA32 = _LLAMA31 | {"rope_scaling": RopeScaling(factor=32.0), "tied_head": True}
FAMILY: dict[str, ModelConfig] = {
    "llama-7b": _member(4096, 32, 32, 11_008, norm_eps=1e-6),
    "llama-13b": _member(5120, 40, 40, 13_824, norm_eps=1e-6),
    "llama-33b": _member(6656, 60, 52, 17_920, norm_eps=1e-6),
    "llama-65b": _member(8192, 80, 64, 22_016, norm_eps=1e-5),
    "llama2-7b": _member(4096, 32, 32, 11_008, **_LLAMA2),
    "llama2-13b": _member(5120, 40, 40, 13_824, **_LLAMA2),
    "llama2-70b": _member(8192, 80, 64, 28_672, n_kv_heads=8, **_LLAMA2),
    "codellama-7b": _member(4096, 32, 32, 11_008, vocab_size=32_016, **_CODE),
    "codellama-13b": _member(5120, 40, 40, 13_824, vocab_size=32_016, **_CODE),
    "codellama-34b": _member(8192, 48, 64, 22_016, n_kv_heads=8, **_CODE),
    "llama3-8b": _member(4096, 32, 32, 14_336, **_LLAMA3),
    "llama3-70b": _member(8192, 80, 64, 28_672, **_LLAMA3),
    "llama3.1-8b": _member(4096, 32, 32, 14_336, **_LLAMA31),
    "llama3.1-70b": _member(8192, 80, 64, 28_672, **_LLAMA31),
    "llama3.1-405b": _member(16_384, 126, 128, 53_248, **_LLAMA31),
    "llama3.2-1b": _member(2048, 16, 32, 8192, **_LLAMA32),
    "llama3.2-3b": _member(3072, 28, 24, 8192, **_LLAMA32),
    "llama3.3-70b": _member(8192, 80, 64, 28_672, **_LLAMA31),
}
