"""The other side of bench/quantizers.py: a GGUF file written as another type by llama.cpp.

Runs under the other environment's Python, without potluck. No importance matrix.
"""

import argparse
import ctypes
import json

import llama_cpp

# llama_ftype of include/llama.h, by our names of the mixes.
FILE_TYPES = {
    "q4_0": 2,
    "q4_1": 3,
    "q8_0": 7,
    "q5_0": 8,
    "q5_1": 9,
    "q4_k_m": 15,
    "q5_k_m": 17,
    "q6_k": 18,
}


@llama_cpp.llama_log_callback
def quiet(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """Drops what llama.cpp tells of each tensor."""


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--type", choices=list(FILE_TYPES), required=True)
    args = parser.parse_args()
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[args.type]
    error = llama_cpp.llama_model_quantize(
        args.model.encode(), args.out.encode(), ctypes.byref(params)
    )
    if error:
        raise SystemExit(f"llama_model_quantize: {error}")
    print(json.dumps({"version": llama_cpp.__version__}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
