"""Activations to bytes and back: the only place where arrays become bytes.

f32 is exact and is read without a copy. f16 and q8 lose bits, which a plan must ask for. Frames
come from a network: what does not fit its claims is a FrameError, before anything is allocated.
NaN and infinity pass as they are; the engine refuses them and names the layer.

q8: each row in blocks of 32 values, 34 bytes a block: the scale as f16, then 32 int8 codes; a value
is code * scale. Widths that are no multiple of 32 are refused: no supported model has one.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from potluck.engine import crc32c
from potluck.errors import FrameError
from potluck.plan import WIRE_Q8_BLOCK, WIRES
from potluck.rpc.v1 import types_pb2

Hidden = npt.NDArray[np.float32]  # [rows, dim]

F32 = types_pb2.ACTIVATION_TYPE_F32
F16 = types_pb2.ACTIVATION_TYPE_F16
Q8 = types_pb2.ACTIVATION_TYPE_Q8
TYPE_NAMES = dict(zip((F32, F16, Q8), WIRES, strict=True))

_Q8_LAYOUT = np.dtype([("scale", "<f2"), ("codes", "i1", (WIRE_Q8_BLOCK,))])
_F16_MAX = 65504.0


def row_bytes(kind: types_pb2.ActivationType.ValueType, dim: int) -> int:
    """Bytes of one row of `dim` values. LLaMA-65B in f32: 32,768. Raises FrameError."""
    if kind == F32:
        return 4 * dim
    if kind == F16:
        return 2 * dim
    if kind == Q8:
        if dim % WIRE_Q8_BLOCK:
            raise FrameError(
                f"q8 writes blocks of {WIRE_Q8_BLOCK} values; {dim} a row are no multiple"
            )
        return dim // WIRE_Q8_BLOCK * _Q8_LAYOUT.itemsize
    raise FrameError(f"activation type {kind} is not known (f32, f16, q8)")


def write(
    array: Hidden, kind: types_pb2.ActivationType.ValueType, to: types_pb2.Activation
) -> None:
    """Writes f32 [rows, dim] into a message. Raises FrameError: a value beyond f16's range."""
    rows, dim = array.shape
    row_bytes(kind, dim)
    if kind == F32:
        values = array.astype("<f4", copy=False).tobytes()
    elif kind == F16:
        values = _to_f16(array).tobytes()
    else:
        values = _to_q8(array).tobytes()
    to.type, to.rows, to.dim = kind, rows, dim
    to.values = values
    to.crc32c = crc32c(values)


def to_message(array: Hidden, kind: types_pb2.ActivationType.ValueType) -> types_pb2.Activation:
    """A new message with f32 [rows, dim]; see `write`."""
    message = types_pb2.Activation()
    write(array, kind, message)
    return message


def from_message(message: types_pb2.Activation, rows: int, dim: int) -> Hidden:
    """The f32 [rows, dim] that the receiver expects; read-only and uncopied if the wire has f32.

    Raises FrameError: another type, shape, length or checksum.
    """
    if (message.rows, message.dim) != (rows, dim):
        claim = f"[{message.rows}, {message.dim}]"
        raise FrameError(f"an activation of {claim}, expected [{rows}, {dim}]")
    expected = rows * row_bytes(message.type, dim)
    values = message.values
    if len(values) != expected:
        name = TYPE_NAMES[message.type]
        raise FrameError(f"{len(values)} bytes for [{rows}, {dim}] in {name}, expected {expected}")
    if (found := crc32c(values)) != message.crc32c:
        raise FrameError(f"crc32c of the activation is {found:#010x}, sent {message.crc32c:#010x}")
    if message.type == F32:
        return np.frombuffer(values, "<f4").reshape(rows, dim).astype(np.float32, copy=False)
    if message.type == F16:
        return np.frombuffer(values, "<f2").reshape(rows, dim).astype(np.float32)
    blocks = np.frombuffer(values, _Q8_LAYOUT)
    scales = blocks["scale"].astype(np.float32)[:, None]
    return (blocks["codes"] * scales).reshape(rows, dim)


def _to_f16(array: Hidden) -> npt.NDArray[np.float16]:
    """Rounded to nearest; what rounds to infinity is refused, infinity itself passes."""
    with np.errstate(over="ignore"):
        half = array.astype("<f2")
    if np.isinf(half).any() and np.isfinite(array[np.isinf(half)]).any():
        largest = float(np.abs(array[np.isfinite(array)]).max())
        raise FrameError(f"{largest:g} does not fit f16 (at most {_F16_MAX:g}); use f32 links")
    return half


def _to_q8(array: Hidden) -> npt.NDArray[np.void]:
    """Blocks with the smallest f16 scale at which every code fits -127 to 127."""
    if not np.isfinite(array).all():
        raise FrameError("q8 has no code for NaN and infinity")
    values = array.reshape(-1, WIRE_Q8_BLOCK)
    exact = np.abs(values).max(axis=1) / np.float32(127)
    if exact.size and (largest := float(exact.max())) > _F16_MAX:
        raise FrameError(f"{largest * 127:g} does not fit q8 (scales are f16); use f32 links")
    scales = exact.astype(np.float16)
    # Rounded down it would push the block's largest value beyond code 127.
    low = scales.astype(np.float32) < exact
    scales[low] = np.nextafter(scales[low], np.float16(np.inf))
    blocks = np.empty(len(values), _Q8_LAYOUT)
    blocks["scale"] = scales
    divisors = np.where(scales > 0, scales, 1).astype(np.float32)[:, None]
    blocks["codes"] = np.rint(values / divisors)
    return blocks
