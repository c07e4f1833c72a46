"""Converts a Hugging Face folder (safetensors or PyTorch files) into a model folder of llama_jax.

    python convert/huggingface_to_orbax.py Llama-3.1-8B models/llama3.1-8b

All options: `llama-jax convert --help`. From Python:
`lj.convert_checkpoint(source, folder, to="orbax")`.
"""

import sys

from llama_jax.cli.main import main

sys.exit(main(["convert", "--to", "orbax", *sys.argv[1:]]))
