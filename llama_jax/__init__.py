"""LLaMA in JAX and Flax for TPU pods and GPUs: train it, run it, bring weights in and out."""

__version__ = "0.1.0"
