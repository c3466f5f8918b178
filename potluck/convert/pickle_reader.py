"""What `data.pkl` of a torch file says about tensors, read without running anything.

An interpreter of our own over the opcodes that torch.save writes, disassembled by pickletools. It
is not `pickle.Unpickler` with a filter, because that one calls what a filter lets through, and
torch's own such filter was by-passed twice (CVE-2025-32434, CVE-2026-24747): here no callable is
ever looked up. A name of a class or function becomes a mark, if it is in a short list; REDUCE
compares marks and builds plain values. All else is refused: "refusing posix.system in x.pth".

Pure: bytes in, tensors' places out. Whether those places exist is for potluck/convert/pth_file.py.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Never

from potluck.cursor import shown
from potluck.errors import ModelError

# 65,536 tensors of about 50 operations each; a 70B model of 723 tensors takes 33,000.
OPERATIONS_LIMIT = 4_000_000
DIMENSIONS_LIMIT = 8

# By torch's names: type of the values and bytes of one. The last ones occur in masks and counters.
STORAGE_TYPES = {
    "FloatStorage": ("f32", 4),
    "HalfStorage": ("f16", 2),
    "BFloat16Storage": ("bf16", 2),
    "DoubleStorage": ("f64", 8),
    "LongStorage": ("i64", 8),
    "IntStorage": ("i32", 4),
    "ShortStorage": ("i16", 2),
    "CharStorage": ("i8", 1),
    "ByteStorage": ("u8", 1),
    "BoolStorage": ("bool", 1),
}


@dataclass(frozen=True, slots=True)
class Storage:
    """An entry `data/KEY` of the file, as the pickle describes it."""

    key: str
    type_name: str
    value_bytes: int
    n_values: int


@dataclass(frozen=True, slots=True)
class TensorView:
    """A tensor as a window on a storage. `shape` and `strides`: slowest first, in values."""

    storage: Storage
    first_value: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Mark:
    """A class or function by its name: compared, never called."""

    module: str
    name: str


_ORDERED_DICT = _Mark("collections", "OrderedDict")
_TENSOR = _Mark("torch._utils", "_rebuild_tensor_v2")
_PARAMETER = _Mark("torch._utils", "_rebuild_parameter")
_KNOWN = {
    _ORDERED_DICT,
    _TENSOR,
    _PARAMETER,
    *(_Mark("torch", name) for name in STORAGE_TYPES),
}
# Opcodes whose argument is a number or a text. Of torch's own, half; the others are old, and as
# harmless: with them a refusal names what was to be called, and not the text before it.
_PLAIN_VALUES = (
    *("INT", "LONG", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE"),
)
_UNTRUSTED = "weights need nothing of the kind: get the file from where you trust"


def read_tensors(data: bytes, file_name: str) -> dict[str, TensorView]:
    """The tensors by their names, in the file's order. Raises ModelError.

    data: a pickle of a dict (or OrderedDict) of tensors; file_name: for messages.
    """
    machine = _Machine(file_name)
    try:
        for n, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if n == OPERATIONS_LIMIT:
                raise ModelError(f"{file_name}: its pickle has more than {n:,} operations")
            machine.step(opcode.name, argument)
    except (ValueError, struct.error, IndexError, OverflowError) as e:
        # genops met an unknown opcode or the end; or the stack was empty.
        raise ModelError(f"{file_name}: its pickle is damaged ({shown(str(e))})") from e
    result = machine.result
    if not isinstance(result, dict):
        raise ModelError(f"{file_name}: its pickle holds {_kind(result)}, expected a dict")
    tensors: dict[str, TensorView] = {}
    for name, value in result.items():
        if not isinstance(value, TensorView):
            raise ModelError(f"{file_name}: {shown(name)} is {_kind(value)}, expected a tensor")
        tensors[name] = value
    return tensors


class _Machine:
    """A stack, a memo, and what each opcode does with them. One pickle, one thread."""

    def __init__(self, file_name: str) -> None:
        self._file_name = file_name
        self._stack: list[object] = []
        self._starts: list[int] = []  # where on the stack each open MARK is
        self._memo: dict[int, object] = {}
        self.result: object = None
        self._do: dict[str, Callable[[object], None]] = {
            "PROTO": self._nothing,
            "FRAME": self._nothing,
            "MARK": lambda _: self._starts.append(len(self._stack)),
            "NONE": lambda _: self._stack.append(None),
            "NEWTRUE": lambda _: self._stack.append(True),
            "NEWFALSE": lambda _: self._stack.append(False),
            **dict.fromkeys(_PLAIN_VALUES, self._stack.append),
            "EMPTY_DICT": lambda _: self._stack.append({}),
            "EMPTY_LIST": lambda _: self._stack.append([]),
            "EMPTY_TUPLE": lambda _: self._stack.append(()),
            "TUPLE": lambda _: self._stack.append(tuple(self._marked())),
            "TUPLE1": lambda _: self._tuple(1),
            "TUPLE2": lambda _: self._tuple(2),
            "TUPLE3": lambda _: self._tuple(3),
            **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), self._put),
            "MEMOIZE": lambda _: self._put(len(self._memo)),
            **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), self._get),
            "GLOBAL": self._global,
            "STACK_GLOBAL": self._stack_global,
            "BINPERSID": self._storage,
            "REDUCE": self._reduce,
            "BUILD": self._attributes,
            "APPEND": lambda _: self._append([self._pop()]),
            "APPENDS": lambda _: self._append(self._marked()),
            "SETITEM": lambda _: self._set(self._popped(2)),
            "SETITEMS": lambda _: self._set(self._marked()),
            "STOP": self._stop,
        }

    def step(self, opcode: str, argument: object) -> None:
        """Carries out one opcode. Raises ModelError: unknown here; IndexError: nothing to take."""
        do = self._do.get(opcode)
        if do is None:
            inst = f"{argument}".replace(" ", ".", 1)  # "os system": it calls by that name
            self._refuse(inst if opcode == "INST" else f"the pickle operation {opcode}")
        do(argument)

    def _refuse(self, what: str) -> Never:
        raise ModelError(f"refusing {shown(what)} in {self._file_name}", remedy=_UNTRUSTED)

    def _damaged(self, what: str) -> Never:
        raise ModelError(f"{self._file_name}: its pickle is damaged ({what})")

    def _nothing(self, _: object) -> None:
        pass

    def _stop(self, _: object) -> None:
        self.result = self._pop()

    def _pop(self) -> object:
        if len(self._stack) <= (self._starts[-1] if self._starts else 0):
            self._damaged("nothing is left to take")
        return self._stack.pop()

    def _popped(self, n: int) -> list[object]:
        """The last n values, in the order in which they were pushed."""
        return [self._pop() for _ in range(n)][::-1]

    def _marked(self) -> list[object]:
        """What was pushed since the last MARK."""
        start = self._starts.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def _tuple(self, n: int) -> None:
        self._stack.append(tuple(self._popped(n)))

    def _put(self, place: object) -> None:
        assert isinstance(place, int)  # genops gives integers to these opcodes
        self._memo[place] = self._stack[-1]

    def _get(self, place: object) -> None:
        assert isinstance(place, int)  # genops gives integers to these opcodes
        if place not in self._memo:
            self._damaged(f"memo {place} was never put")
        self._stack.append(self._memo[place])

    def _global(self, argument: object) -> None:
        module, _, name = f"{argument}".partition(" ")
        self._push_mark(module, name)

    def _stack_global(self, _: object) -> None:
        module, name = self._popped(2)
        if not isinstance(module, str) or not isinstance(name, str):
            self._damaged("a name that is no string")
        self._push_mark(module, name)

    def _push_mark(self, module: str, name: str) -> None:
        mark = _Mark(module, name)
        if mark not in _KNOWN:
            self._refuse(f"{module}.{name}")
        self._stack.append(mark)

    def _storage(self, _: object) -> None:
        """A persistent id: ("storage", type, key, where it was, number of values)."""
        match self._pop():
            case ("storage", _Mark(module="torch", name=name), str(key), str(), int(n_values)) if (
                name in STORAGE_TYPES and 0 <= n_values < 2**48
            ):
                self._stack.append(Storage(key, *STORAGE_TYPES[name], n_values))
            case _:
                self._damaged("a persistent id that is no storage")

    def _reduce(self, _: object) -> None:
        """A function's name and its arguments: one of three values is built, nothing is called."""
        function, arguments = self._popped(2)
        match function, arguments:
            case (_Mark() as mark, ()) if mark == _ORDERED_DICT:
                self._stack.append({})
            case (
                _Mark() as mark,
                (Storage() as storage, int(first), tuple(shape), tuple(strides), *_),
            ) if mark == _TENSOR:
                self._stack.append(self._tensor(storage, first, shape, strides))
            case (_Mark() as mark, (TensorView() as tensor, *_)) if mark == _PARAMETER:
                self._stack.append(tensor)
            case (_Mark() as mark, _):
                self._damaged(f"arguments of {mark.name} that torch does not write")
            case _:
                self._refuse(f"a call of {_kind(function)}")

    def _tensor(
        self, storage: Storage, first: int, shape: tuple[object, ...], strides: tuple[object, ...]
    ) -> TensorView:
        numbers = [n for n in (first, *shape, *strides) if isinstance(n, int) and 0 <= n < 2**48]
        n_dimensions = len(shape)
        if len(numbers) != 1 + 2 * n_dimensions or len(strides) != n_dimensions:
            self._damaged("a tensor whose shape and strides are not whole numbers")
        if n_dimensions > DIMENSIONS_LIMIT:
            self._damaged(f"a tensor of {n_dimensions} dimensions, at most {DIMENSIONS_LIMIT}")
        rest = tuple(numbers[1:])
        return TensorView(storage, first, rest[:n_dimensions], rest[n_dimensions:])

    def _attributes(self, _: object) -> None:
        """BUILD: attributes of a state_dict (versions of its modules), which say nothing to us."""
        target, state = self._popped(2)
        if not isinstance(target, dict) or not isinstance(state, dict):
            self._refuse(f"a state set on {_kind(target)}")
        self._stack.append(target)

    def _append(self, values: list[object]) -> None:
        target = self._stack[-1]
        if not isinstance(target, list):
            self._damaged(f"an item appended to {_kind(target)}")
        target += values

    def _set(self, pairs: list[object]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict) or len(pairs) % 2:
            self._damaged(f"an item set in {_kind(target)}")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            # Only strings: the hash of a deep tuple could take for ever.
            if not isinstance(key, str):
                self._damaged(f"{_kind(key)} as the name of a tensor")
            if key in target:
                raise ModelError(f"{self._file_name}: {shown(key)} stands twice")
            target[key] = value


def _kind(value: object) -> str:
    """A value's type, never the value: it may be without end."""
    if isinstance(value, _Mark):
        return f"the name {value.module}.{value.name}"
    if isinstance(value, TensorView):
        return "a tensor"
    return f"a value of type {type(value).__name__}"
