"""Converts a model or run folder of llama_jax into a Meta folder.

    python convert/orbax_to_meta.py models/llama2-70b export/llama2-70b --shards 8

All options: `llama-jax convert --help`. From Python:
`lj.convert_checkpoint(source, folder, to="meta")`.
"""

import sys

from llama_jax.cli.main import main

sys.exit(main(["convert", "--to", "meta", *sys.argv[1:]]))
