"""Converts a model or run folder of llama_jax into a Hugging Face folder (safetensors).

    python convert/orbax_to_huggingface.py runs/quickstart export/quickstart

All options: `llama-jax convert --help`. From Python:
`lj.convert_checkpoint(source, folder, to="hf")`.
"""

import sys

from llama_jax.cli.main import main

sys.exit(main(["convert", "--to", "hf", *sys.argv[1:]]))
