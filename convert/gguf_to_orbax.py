"""Converts a GGUF file into a model folder of llama_jax; quantized weights become float32.

    python convert/gguf_to_orbax.py model.Q8_0.gguf models/mine

All options: `llama-jax convert --help`. From Python:
`lj.convert_checkpoint(source, folder, to="orbax")`.
"""

import sys

from llama_jax.cli.main import main

sys.exit(main(["convert", "--to", "orbax", *sys.argv[1:]]))
