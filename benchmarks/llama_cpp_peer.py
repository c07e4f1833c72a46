"""llama.cpp as a peer of `decode.py`: a GGUF file with the same weights, and decoding with it."""

import time
from collections.abc import Callable
from ctypes import c_bool
from pathlib import Path
from typing import Any

import gguf
import numpy as np


def write_gguf(source: Path, target: str, kind: str) -> None:
    """Writes a GGUF file with the weights and the metadata of another.

    Args:
        source: the other file.
        target: path of the new file.
        kind: of all matrices: "F32", "BF16" or "Q8_0". Vectors are F32.
    """
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    written = {"general.architecture", "general.file_type", "general.quantization_version"}
    for name, field in reader.fields.items():
        if name not in written and not name.startswith("GGUF."):
            types = field.types if len(field.types) > 1 else [*field.types, None]
            writer.add_key_value(name, field.contents(), types[0], sub_type=types[-1])
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        to = gguf.GGMLQuantizationType[kind if values.ndim > 1 else "F32"]
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, to), raw_dtype=to)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def decode_with_llama_cpp(
    path: str, n_threads: int, prompts: np.ndarray, new: int
) -> Callable[[], Any]:
    """Returns a function that continues prompts greedily with llama.cpp and returns (seconds, 0).

    Args:
        path: GGUF file.
        n_threads: of llama.cpp.
        prompts: [B, T] ids; the rows are sequences of one batch.
        new: tokens to generate for each row; the time of the first one is not included.
    """
    import llama_cpp  # pyright: ignore[reportMissingImports] (the peer is not a dependency)

    lib: Any = llama_cpp  # its types are those of ctypes
    log = lib.llama_log_callback(lambda level, text, data: None)
    lib.llama_log_set(log, None)
    B, T = prompts.shape
    model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
    n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_seq_max = B * 2 * (T + new), B * T, B
    params.n_threads = params.n_threads_batch = n_threads
    context = lib.llama_init_from_model(model, params)
    batch = lib.llama_batch_init(B * T, 0, 1)

    def step(tokens_BT: np.ndarray, start: int) -> np.ndarray:
        """Runs the next tokens of all rows; returns the most probable token after each row."""
        batch.n_tokens = tokens_BT.size
        for i, (row, t) in enumerate(np.ndindex(*tokens_BT.shape)):
            batch.token[i], batch.pos[i] = int(tokens_BT[row, t]), start + t
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
            batch.logits[i] = t == tokens_BT.shape[1] - 1
        if lib.llama_decode(context, batch):
            raise RuntimeError("llama.cpp can't decode the batch")
        last = range(tokens_BT.shape[1] - 1, tokens_BT.size, tokens_BT.shape[1])
        logits = (lib.llama_get_logits_ith(context, i) for i in last)
        return np.array([np.ctypeslib.as_array(row, (n_vocab,)).argmax() for row in logits])

    def run_round() -> tuple[float, int]:
        lib.llama_log_set(log, None)  # also keeps the function alive
        lib.llama_memory_clear(lib.llama_get_memory(context), c_bool(True))
        tokens = step(prompts, 0)
        begin = time.perf_counter()
        for t in range(T, T + new):
            tokens = step(tokens[:, None], t)
        return time.perf_counter() - begin, 0

    return run_round
