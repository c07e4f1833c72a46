"""`llama-jax serve`."""

import argparse
import contextlib
import os
import sys
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from llama_jax.cli.arguments import (
    add_folder,
    add_hosts,
    add_int8,
    add_lora,
    check_equal_on_hosts,
    exit_all_at_sigterm,
    read_pairs,
)
from llama_jax.errors import InputError, install_command, missing_extra
from llama_jax.runtime.storage import AnyPath, parse_path

if TYPE_CHECKING:
    from llama_jax.serving.server import ServerSettings

MANUAL = f"""\
Serve the model in a run folder or model folder over HTTP, with OpenAI's API.

OpenAI clients use http://HOST:PORT/v1 (completions, chat/completions, models). / is a page to try
the model, /metrics has metrics for Prometheus. Up to --rows texts are generated in one batch; up to
--queue more wait, and further requests get status 429. SIGTERM and Ctrl-C end the server: running
requests have 20 s to finish. docs/serve.md has the details. Install it:
  {install_command("serve")}

Without a key, everyone who can connect to HOST can use the model, by address, by localhost, by HOST
or by a name in --allow-host. Other names are refused, because any web site can let its name resolve
to this server. Put the key into the environment variable LLAMA_JAX_API_KEY: the list of processes
shows the value of --api-key.

A model that is too large for one host: on a TPU pod, under SLURM, Open MPI or a Kubernetes JobSet,
run the command on every host, as for `llama-jax train`. Host 0 answers the requests. A small one:
--replicas divides the devices among several copies of the model behind one queue.

example:
  llama-jax serve models/llama3.1-8b-instruct
  llama-jax serve models/llama3.1-8b-int8 --lora runs/lora
  llama-jax serve models/llama3.1-8b-instruct --replicas 4 --rows 64
  llama-jax serve runs/quickstart --port 9000 --rows 16 --context 1024
  LLAMA_JAX_API_KEY=$(cat key) llama-jax serve models/llama3.1-8b-instruct --host 0.0.0.0
"""

_MINIMA = {"rows": 1, "replicas": 1, "context": 2, "cache_tokens": 1, "queue": 0, "max_tokens": 1}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add_folder(parser)
    parser.add_argument("--host", default="127.0.0.1", metavar="HOST", help="(127.0.0.1)")
    parser.add_argument(
        "--port", type=int, default=8000, metavar="N", help="0: any free port (8000)"
    )
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME",
        help="name that clients may use for the server, in addition to localhost, addresses and"
        " HOST; repeatable; '*' allows all (none)",
    )  # fmt: skip
    parser.add_argument("--api-key", metavar="KEY", help="key that clients must send (none)")
    parser.add_argument(
        "--name", dest="model", metavar="NAME", help="model name for clients (the folder's name)"
    )
    add_int8(parser)
    add_lora(parser)
    add_hosts(parser)
    parser.add_argument(
        "--rows", type=int, default=8, metavar="N", help="texts generated at the same time (8)"
    )
    parser.add_argument(
        "--replicas", type=int, metavar="N",
        help="copies of the model, each on its share of the devices and of the rows (1)",
    )  # fmt: skip
    parser.add_argument(
        "--context", type=int, metavar="N",
        help="longest prompt and output together [tokens] (the model's, 8192 at most)",
    )  # fmt: skip
    parser.add_argument(
        "--cache-tokens", type=int, metavar="N",
        help="tokens for which the KV cache has room, in pages that all texts share (TPU: rows"
        " times context; elsewhere each row has a context of its own)",
    )  # fmt: skip
    parser.add_argument(
        "--queue", type=int, default=64, metavar="N", help="texts that may wait (64)"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=4096, metavar="N", help="longest output [tokens] (4096)"
    )
    parser.add_argument(
        "--max-body", default="2MiB", metavar="SIZE", help="longest request body (2MiB)"
    )
    parser.add_argument(
        "--timeout", type=float, default=600, metavar="S", help="time limit of a request [s] (600)"
    )


def run(args: argparse.Namespace) -> int:
    """Serves requests until SIGTERM or Ctrl-C; returns the exit code."""
    try:
        from llama_jax.serving import server
    except ModuleNotFoundError as error:
        raise missing_extra(f"the server needs {error.name}", "serve") from error
    from llama_jax.runtime.byte_size import parse_size

    for name, minimum in _MINIMA.items():
        value = getattr(args, name)
        if value is not None and value < minimum:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} must be at least {minimum}, not {value}")
    if not 0 < args.timeout < float("inf"):
        raise InputError(f"--timeout must be above 0, not {args.timeout}")
    folder = parse_path(args.folder)
    settings = server.ServerSettings(
        name=args.model or folder.resolve().name,
        api_key=_read_api_key(args.api_key),
        max_tokens=args.max_tokens,
        max_body=parse_size(args.max_body, "--max-body"),
        timeout=args.timeout,
    )
    from llama_jax.runtime import hosts

    with hosts.join(args.coordinator, args.processes, args.process), exit_all_at_sigterm():
        _serve(args, folder, settings)
    return 0


def _serve(args: argparse.Namespace, folder: AnyPath, settings: "ServerSettings") -> None:
    """Serves requests on host 0; the other hosts run the same programs."""
    import jax

    from llama_jax.checkpoint import folders
    from llama_jax.inference.bandwidth import stored_copy_bandwidth
    from llama_jax.inference.engine.device_batch import DeviceBatch, check_rows, follow
    from llama_jax.inference.engine.engine import Engine
    from llama_jax.inference.engine.page_pool import pool_pages
    from llama_jax.inference.engine.warm_up import n_programs
    from llama_jax.inference.load import choose_compute_dtype, load
    from llama_jax.parallel.mesh import serving_mesh
    from llama_jax.runtime import hosts
    from llama_jax.runtime.compile_cache import enable_compile_cache
    from llama_jax.runtime.program_store import stored_programs
    from llama_jax.serving import server, start_progress
    from llama_jax.serving.host_signals import share_sigterm
    from llama_jax.serving.middleware import allowed_hosts
    from llama_jax.tokenizer.tokenizer import load_tokenizer

    stored = folders.read_model_config(folder)
    context = args.context or min(stored.context, 8192)
    if context > stored.context:
        raise InputError(
            f"--context {context} is more than the model's {stored.context}: give {stored.context}"
            " or less"
        )
    if args.cache:
        stored = replace(stored, cache_dtype=args.cache)
    tokenizer, pairs = load_tokenizer(folder), read_pairs(args.lora, folder, stored)
    enable_compile_cache()
    config = choose_compute_dtype(stored)
    names = ("rows", "replicas", "quantize", "cache", "lora", "unmerged", "cache_tokens")
    values = {f"--{name}": getattr(args, name) for name in names} | {"--context": context}
    check_equal_on_hosts(folder, config, values)
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(serving_mesh(stored, args.replicas)))
        check_rows(args.rows)
        paged = pool_pages(config, args.rows, context, args.cache_tokens) is not None
        bound = None
        if hosts.is_host_zero():
            bound = stack.enter_context(server.bind_socket(args.host, args.port))
            allowed = allowed_hosts(args.host, args.allow_host, bound.getsockname()[0])
            settings = settings._replace(hosts=allowed)
        stack.enter_context(stored_programs("serve", args.folder, values))
        if bound:  # before the weights fill the memory
            settings = settings._replace(copy_bandwidth=stored_copy_bandwidth())
        itemsize = jax.numpy.dtype(stored.weight_dtype).itemsize
        with start_progress.loading_progress(stored.n_params * itemsize):
            config, model = load(folder, config, args.quantize, pairs=pairs, unmerged=args.unmerged)
        programs = f"{n_programs(context, paged)} programs"
        with start_progress.stage_progress(
            f"compiling {programs}", f"compiled {programs}"
        ) as progress:
            start = partial(Engine, queue=args.queue) if bound else DeviceBatch
            engine = start(
                config, model, rows=args.rows, context=context, progress=progress,
                cache_tokens=args.cache_tokens,
            )  # fmt: skip
        if isinstance(engine, DeviceBatch):
            with share_sigterm():
                follow(engine)
            return
        assert bound is not None
        try:
            app = server.build_app(engine, tokenizer, settings)
            bound.listen()
            print(server.startup_message(bound, settings), file=sys.stderr, flush=True)
            with share_sigterm():
                server.serve(app, bound)
        finally:
            engine.close()


def _read_api_key(flag: str | None) -> str | None:
    """Returns the key of the flag, or else of the environment; None for no key.

    Raises:
        InputError: no HTTP header can contain the key.
    """
    key = os.environ.get("LLAMA_JAX_API_KEY") if flag is None else flag
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key != ""):
        raise InputError(
            "the API key must be printable ASCII characters, without spaces at its ends: give"
            " another in LLAMA_JAX_API_KEY"
        )
    return key
