"""The other side of bench/compare.py: llama.cpp through llama-cpp-python's C functions.

Runs under the other environment's Python, without potluck. Reads commands as JSON lines
({"test": "pp", "n": 512}) and answers each with {"seconds": s} once it has computed.
"""

import argparse
import ctypes
import json
import sys
import time

import llama_cpp


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--flash", type=int, default=0)
    parser.add_argument("--context", type=int, default=2048)
    args = parser.parse_args()

    @llama_cpp.llama_log_callback
    def quiet(level: int, text: bytes, data: ctypes.c_void_p) -> None:
        pass

    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        args.model.encode(), llama_cpp.llama_model_default_params()
    )
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = args.context
    params.n_batch = params.n_ubatch = 512
    params.n_threads = params.n_threads_batch = args.threads
    params.flash_attn_type = args.flash
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        print("no context", file=sys.stderr)
        return 1
    memory = llama_cpp.llama_get_memory(context)

    def decode(tokens: list[int]) -> None:
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError("llama_decode failed")

    print(json.dumps({"ready": llama_cpp.__version__}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        llama_cpp.llama_memory_clear(memory, True)  # noqa: FBT003 - a C function
        n = order["n"]
        if order["test"] == "pp":
            start = time.perf_counter()
            decode([(i * 7) % 1000 + 300 for i in range(n)])
            llama_cpp.llama_synchronize(context)
        else:
            decode([1])
            start = time.perf_counter()
            for i in range(n):
                decode([(i * 7) % 1000 + 300])
            llama_cpp.llama_synchronize(context)
        print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
