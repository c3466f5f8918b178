"""The other side of bench/compare.py: llama.cpp through llama-cpp-python's C functions.

Runs under the other environment's Python, without potluck. Reads orders as JSON lines and answers
each with one. The model is loaded once; each number of sessions at once gets a context a setting.
Each session has a KV stream of its own: on the 7B shape with four sessions that was as fast as one
shared KV at depth 0 and 4 % faster after 512 positions.

With --rpc all layers lie on servers of llama.cpp's RPC, and this process only says what to do.
llama-cpp-python's own library has no RPC: LLAMA_CPP_LIB_PATH must name the folder of one that has.
"""

import argparse
import ctypes
import json
import os
import sys
import time
from pathlib import Path

import llama_cpp
import numpy as np

CHUNK_ROWS = 512  # n_ubatch of llama-bench, and potluck's chunk
# Flash attention, type of the KV, rows that go through the layers at once. Smaller pieces of a
# batch let several RPC servers work at the same time.
SETTINGS = [
    (0, llama_cpp.GGML_TYPE_F16, CHUNK_ROWS),
    (1, llama_cpp.GGML_TYPE_F16, CHUNK_ROWS),
    (1, llama_cpp.GGML_TYPE_Q8_0, CHUNK_ROWS),
    (1, llama_cpp.GGML_TYPE_F16, 128),
    (1, llama_cpp.GGML_TYPE_F16, 64),
]


class Context:
    """KV of some sessions and the way through the model."""

    def __init__(self, model, threads: int, setting: int, n_sessions: int, room: int) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = n_sessions
        params.n_ctx = n_sessions * -(-room // 256) * 256
        params.kv_unified = False
        params.n_batch = CHUNK_ROWS
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type, kv_type, params.n_ubatch = SETTINGS[setting]
        params.type_k = params.type_v = kv_type
        self._context = llama_cpp.llama_init_from_model(model, params)
        if not self._context:
            raise SystemExit(f"llama.cpp makes no context of {params.n_ctx} positions")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._lengths = [0] * n_sessions
        self._batch = llama_cpp.llama_batch_init(CHUNK_ROWS, 0, 1)
        self._tokens = np.ctypeslib.as_array(self._batch.token, (CHUNK_ROWS,))
        self._positions = np.ctypeslib.as_array(self._batch.pos, (CHUNK_ROWS,))
        self._wanted = np.ctypeslib.as_array(self._batch.logits, (CHUNK_ROWS,))
        self._owner = [-1] * CHUNK_ROWS  # session of each row, to set only what changed
        np.ctypeslib.as_array(self._batch.n_seq_id, (CHUNK_ROWS,))[:] = 1
        vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        ids = np.random.default_rng(1).integers(0, vocab, (n_sessions, room), dtype=np.int32)
        self._ids = ids

    def close(self) -> None:
        """Frees the KV."""
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)

    def prepare(self, depth: int, n_sessions: int) -> None:
        """Bring sessions to a depth; what an earlier test left behind serves."""
        for i in range(n_sessions):
            if self._lengths[i] > depth:
                llama_cpp.llama_memory_seq_rm(self._memory, i, depth, -1)
                self._lengths[i] = depth
            self._read(i, depth)
        llama_cpp.llama_synchronize(self._context)

    def run(self, test: dict) -> float:
        """Seconds of a test."""
        self.prepare(test["n_depth"], test["n_sessions"])
        start = time.perf_counter()
        for i in range(test["n_sessions"]):
            self._read(i, test["n_depth"] + test["n_prompt"])
        for _ in range(test["n_gen"]):
            self._make(test["n_sessions"])
        llama_cpp.llama_synchronize(self._context)
        return time.perf_counter() - start

    def _read(self, i: int, stop: int) -> None:
        """Session i up to position `stop`; the last token wants logits."""
        while (at := self._lengths[i]) < stop:
            n = min(CHUNK_ROWS, stop - at)
            self._tokens[:n] = self._ids[i, at : at + n]
            self._positions[:n] = np.arange(at, at + n)
            self._wanted[:n] = 0
            self._wanted[n - 1] = at + n == stop
            self._decode([i] * n)

    def _make(self, n_sessions: int) -> None:
        """One more token of each session, all in one step."""
        for i in range(n_sessions):
            self._tokens[i] = self._ids[i, self._lengths[i]]
            self._positions[i] = self._lengths[i]
        self._wanted[:n_sessions] = 1
        self._decode(range(n_sessions))

    def _decode(self, sessions) -> None:
        for row, i in enumerate(sessions):
            if self._owner[row] != i:
                self._batch.seq_id[row][0] = i
                self._owner[row] = i
            self._lengths[i] += 1
        self._batch.n_tokens = len(sessions)
        if llama_cpp.llama_decode(self._context, self._batch):
            raise SystemExit("llama_decode failed")


def serve(model, threads: int) -> None:
    """Answers until the input ends."""
    contexts, made_for, test = {}, None, {}
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "open":
            test = order
            if made_for != (order["n_sessions"], order["room"]) or set(contexts) != set(
                order["settings"]
            ):
                for context in contexts.values():
                    context.close()
                made_for = (order["n_sessions"], order["room"])
                contexts = {s: Context(model, threads, s, *made_for) for s in order["settings"]}
            short = {**test, "n_gen": min(test["n_gen"], 8)}
            answer(seconds=[context.run(short) for context in contexts.values()])  # warm-up
        else:
            answer(seconds=contexts[order["setting"]].run(test))


def add_servers(endpoints: list[str]) -> None:
    """Makes each HOST:PORT a device that layers can lie on."""
    library = ctypes.CDLL(str(Path(os.environ["LLAMA_CPP_LIB_PATH"]) / "libggml.so"))
    library.ggml_backend_reg_by_name.restype = ctypes.c_void_p
    found = library.ggml_backend_reg_by_name(b"RPC")
    if not found:
        raise SystemExit("this llama.cpp was built without GGML_RPC")
    address_of = library.ggml_backend_reg_get_proc_address
    address_of.argtypes, address_of.restype = [ctypes.c_void_p, ctypes.c_char_p], ctypes.c_void_p
    connect = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(
        address_of(found, b"ggml_backend_rpc_add_server")
    )
    library.ggml_backend_register.argtypes = [ctypes.c_void_p]
    for endpoint in endpoints:
        library.ggml_backend_register(connect(endpoint.encode()))


def answer(**fields: object) -> None:
    """One line."""
    print(json.dumps(fields), flush=True)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--rpc", nargs="+", metavar="HOST:PORT", help="servers for all layers")
    args = parser.parse_args()

    @llama_cpp.llama_log_callback
    def quiet(level: int, text: bytes, data: ctypes.c_void_p) -> None:
        pass

    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    if args.rpc:
        add_servers(args.rpc)
        params.n_gpu_layers = 999
    model = llama_cpp.llama_model_load_from_file(args.model.encode(), params)
    if not model:
        print(f"llama.cpp does not load {args.model}", file=sys.stderr)
        return 1
    answer(version=llama_cpp.__version__)
    serve(model, args.threads)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
