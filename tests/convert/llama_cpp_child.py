"""llama.cpp's side of these tests: does one order, given as JSON in argv[1], and prints JSON.

Runs under the other environment's Python, without potluck.
"""

import ctypes
import json
import sys
from typing import Any

import llama_cpp
import numpy as np


def logits(order: dict[str, Any]) -> None:
    """Of all positions of a list of tokens, [n, vocab] f32, into a file of numpy's."""
    model = _model(order["model"], vocab_only=False)
    tokens = order["tokens"]
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = max(len(tokens), 32)
    params.n_threads = params.n_threads_batch = 1
    params.flash_attn_type = 0
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise SystemExit("llama.cpp makes no context")
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
    batch.n_tokens = len(tokens)
    if llama_cpp.llama_decode(context, batch):
        raise SystemExit("llama_decode failed")
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    rows = [
        np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), (vocab,))
        for i in range(len(tokens))
    ]
    np.save(order["out"], np.stack(rows))
    print(json.dumps({"vocab": vocab}))


def tokenize(order: dict[str, Any]) -> None:
    """Ids of each text, none of them special, without a start token."""
    vocab = llama_cpp.llama_model_get_vocab(_model(order["model"], vocab_only=True))
    found = []
    for text in order["texts"]:
        data = text.encode()
        room = (llama_cpp.llama_token * (2 * len(data) + 8))()
        n = llama_cpp.llama_tokenize(vocab, data, len(data), room, len(room), False, False)
        if n < 0:
            raise SystemExit(f"llama_tokenize: {n}")
        found.append(list(room[:n]))
    print(json.dumps(found))


def quantize(order: dict[str, Any]) -> None:
    """A file into another of llama.cpp's file type `ftype`."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = order["ftype"], 1
    done = llama_cpp.llama_model_quantize(
        order["model"].encode(), order["out"].encode(), ctypes.byref(params)
    )
    if done:
        raise SystemExit(f"llama_model_quantize: {done}")
    print("{}")


def _model(path: str, *, vocab_only: bool) -> Any:
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = vocab_only
    model = llama_cpp.llama_model_load_from_file(path.encode(), params)
    if not model:
        raise SystemExit(f"llama.cpp does not load {path}")
    return model


if __name__ == "__main__":
    llama_cpp.llama_backend_init()
    # Its log would drown the answer; what it refuses is told by the exit code.
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    wanted = json.loads(sys.argv[1])
    {"logits": logits, "tokenize": tokenize, "quantize": quantize}[wanted["do"]](wanted)
