"""The other side of bench/quality.py: perplexity by llama.cpp, by llama-cpp-python's C functions.

Runs under the other environment's Python, without potluck. Cuts the text into tokens and windows
by itself, by the rules of llama.cpp's perplexity tool, and prints one line of JSON.
"""

import argparse
import ctypes
import hashlib
import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np

KV_TYPES = {"f16": llama_cpp.GGML_TYPE_F16, "q8": llama_cpp.GGML_TYPE_Q8_0}


def tokens_of(vocab, path: Path) -> np.ndarray:
    """int32 [n], as the tool reads a file: without a newline at its end, special tokens plain."""
    data = path.read_bytes().removesuffix(b"\n")
    ids = (ctypes.c_int32 * (len(data) + 8))()
    adds_start, parses_special = True, False
    n = llama_cpp.llama_tokenize(vocab, data, len(data), ids, len(ids), adds_start, parses_special)
    if n < 0:
        raise SystemExit("llama.cpp does not cut the text into tokens")
    return np.array(ids[:n], np.int32)


class Context:
    """The KV of one window and the way through the model."""

    def __init__(self, model, size: int, threads: int, kv_type: str) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = size
        params.n_ubatch = min(size, 512)
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = KV_TYPES[kv_type]
        self._context = llama_cpp.llama_init_from_model(model, params)
        if not self._context:
            raise SystemExit(f"llama.cpp makes no context of {size} positions")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._batch = llama_cpp.llama_batch_init(size, 0, 1)
        for i in range(size):
            self._batch.pos[i] = i
            self._batch.n_seq_id[i] = 1
            self._batch.seq_id[i][0] = 0
            self._batch.logits[i] = i >= size // 2
        self._batch.n_tokens = size

    def surprises(self, read: np.ndarray, window: np.ndarray) -> np.ndarray:
        """-ln(probability) of the second half's tokens but the first, in f64."""
        with_data = True
        llama_cpp.llama_memory_clear(self._memory, with_data)
        np.ctypeslib.as_array(self._batch.token, read.shape)[:] = read
        if llama_cpp.llama_decode(self._context, self._batch):
            raise SystemExit("llama_decode failed")
        found = []
        for i in range(len(read) // 2, len(read) - 1):
            row = llama_cpp.llama_get_logits_ith(self._context, i)
            logits = np.ctypeslib.as_array(row, (self._vocab,)).astype(np.float64)
            above = logits - logits.max()
            found.append(np.log(np.exp(above).sum()) - above[window[i + 1]])
        return np.array(found)


def options() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--chunks", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--kv-type", choices=list(KV_TYPES), default="f16")
    return parser.parse_args()


def loaded(path: str):
    """The model; None if llama.cpp does not load it."""

    @llama_cpp.llama_log_callback
    def quiet(level: int, text: bytes, data: ctypes.c_void_p) -> None:
        pass

    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    loaded.quiet = quiet  # as long as llama.cpp may call it
    llama_cpp.llama_backend_init()
    return llama_cpp.llama_model_load_from_file(
        path.encode(), llama_cpp.llama_model_default_params()
    )


def main() -> int:
    """Command line."""
    args = options()
    model = loaded(args.model)
    if not model:
        print(f"llama.cpp does not load {args.model}", file=sys.stderr)
        return 1
    vocab = llama_cpp.llama_model_get_vocab(model)
    ids, size = tokens_of(vocab, args.file), args.context
    windows = ids[: min(args.chunks, len(ids) // size) * size].reshape(-1, size)
    context = Context(model, size, args.threads, args.kv_type)
    found = []
    for window in windows:
        read = window.copy()
        if llama_cpp.llama_vocab_get_add_bos(vocab):
            read[0] = llama_cpp.llama_vocab_bos(vocab)
        found.append(context.surprises(read, window))
    surprises = np.concatenate(found)
    perplexity = float(np.exp(surprises.mean()))
    error = float(np.sqrt(surprises.var() / (len(surprises) - 1)))
    answer = {
        "perplexity": perplexity,
        "standard_error": perplexity * error,
        "n_tokens": len(surprises),
        "tokens_sha256": hashlib.sha256(windows.astype("<i4").tobytes()).hexdigest(),
        "version": llama_cpp.__version__,
    }
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
