"""Read the pickles of Detectron2 (model zoo weights, proposal files) without running code from them.

A pickle can call what it names, set the state of what it made, and state sizes that its bytes do not have. So no
object of numpy is handed to it: it gets stand-ins that accept only plain numeric types and compare each array's shape
with its bytes. Only then is an array built.
"""

import math
import pickle
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ovdet2.errors import DataError

_KINDS = "biuf"
_SIZES = {"b": (1,), "i": (1, 2, 4, 8), "u": (1, 2, 4, 8), "f": (2, 4, 8)}
_KEY_TYPES = (str, bytes, int, float, bool, type(None))
_REMEDY = "download or save it again"

# What the interpreter raises for bytes that are no complete pickle.
_FAULTS = (
    pickle.UnpicklingError,
    struct.error,
    ArithmeticError,
    AttributeError,
    AssertionError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RecursionError,
    TypeError,
    ValueError,
)


class DamagedPickle(DataError):
    """A pickle that is truncated, or holds something else than arrays, or arrays whose sizes contradict their bytes."""


def read_array_pickle(path: str | Path) -> Any:
    """The content of a pickle of numpy arrays, numbers and strings in lists, tuples and dicts.

    Arrays are of booleans, integers or floats. Python 2's strings are decoded as latin-1.

    Raises:
        DataError: the file imports something else, so it could run code.
        DamagedPickle: the file is missing, truncated or malformed.
    """
    try:
        with open(path, "rb") as handle:
            return ArraysOnly(handle, encoding="latin1").load()
    except DataError as error:
        raise type(error)(f"{path}: {error}") from None
    except _FAULTS as error:
        reason = str(error) or "no reason given"
        raise DamagedPickle(f"{path} is no complete pickle ({type(error).__name__}: {reason}): {_REMEDY}.") from None


# The C version reserves memory for any number of a memo that a pickle states.
_PythonUnpickler: Any = pickle._Unpickler


class ArraysOnly(_PythonUnpickler):
    """An Unpickler of numpy arrays and builtin containers that refuses every other name before importing it."""

    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(_PythonUnpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in of an allowed name.

        Raises:
            DataError: the name is not allowed; the message states it.
        """
        if (module, name) not in _ALLOWED:
            raise DataError(
                f"the pickle imports {module}.{name} and was not opened, since it could run code: only numpy arrays "
                "in builtin containers are read from a .pkl file; convert it to .safetensors."
            )
        return _ALLOWED[module, name]

    # Python hashes nested tuples recursively: as a key, a deep one ends the process.
    def load_setitem(self) -> None:
        """One entry of a dict."""
        _require_plain_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        """Several entries of a dict."""
        _require_plain_keys(self.stack[::2])
        super().load_setitems()

    def load_dict(self) -> None:
        """A dict of protocol 0."""
        _require_plain_keys(self.stack[::2])
        super().load_dict()

    def load_bytearray8(self) -> None:
        """A bytearray; its stated length is not reserved before the bytes are there."""
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(length)))

    def load_set(self) -> None:
        """Sets are in no such file."""
        raise DamagedPickle(f"the pickle holds a set: {_REMEDY}.")

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8
    dispatch[pickle.EMPTY_SET[0]] = dispatch[pickle.FROZENSET[0]] = load_set


class _StandIn:
    """What a pickle may call in place of a name. It is no type and takes no state, so a pickle cannot change it."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def __setstate__(self, state: object) -> None:
        raise DamagedPickle(f"the pickle changes a constructor: {_REMEDY}.")


class _Dtype:
    """A numeric type as a pickle describes it; :meth:`numpy` makes a new object for every array."""

    __slots__ = ("code", "order")
    order: Any

    def __init__(self, code: object, *_: object) -> None:
        code = code.decode("ascii") if isinstance(code, bytes) else code
        if not isinstance(code, str) or code[:1] not in _KINDS or code[1:] not in map(str, _SIZES[code[:1]]):
            raise DamagedPickle(
                f"the pickle holds an array of type {str(code)[:20]!r}; only booleans, integers and floats are read: "
                "convert it."
            )
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        """The state of numpy's dtype: (version, byte order, no subtype, no names, no fields, ...)."""
        plain = isinstance(state, tuple) and len(state) >= 5 and state[2] is state[3] is state[4] is None
        order = state[1] if plain else None
        order = order.decode("ascii") if isinstance(order, bytes) else order
        if not isinstance(order, str) or order not in ("<", ">", "=", "|"):
            raise DamagedPickle(f"the pickle holds an array of a type with fields or an unknown byte order: {_REMEDY}.")
        self.order = order

    def numpy(self) -> np.dtype:
        """The type."""
        return np.dtype(self.code).newbyteorder(self.order)


class _Array(np.ndarray):
    """An array that is empty until a pickle sets its state, which is checked first."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:  # pyrefly: ignore[bad-override]
        if not isinstance(state, tuple) or len(state) != 5:
            raise DamagedPickle(f"the pickle holds an array without type and bytes: {_REMEDY}.")
        _, shape, dtype, fortran, data = state
        data = _require_bytes(data, dtype, shape)
        checked: Any = (1, shape, dtype.numpy(), bool(fortran), data)
        super().__setstate__(checked)


def _require_bytes(data: object, dtype: object, shape: object) -> bytes:
    """The bytes of an array, whose number must be that of its shape and type."""
    data = data.encode("latin1") if isinstance(data, str) else data  # Python 2
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes | bytearray):
        raise DamagedPickle(f"the pickle holds an array that is not of numbers: {_REMEDY}.")
    if not isinstance(shape, tuple) or not all(type(side) is int and side >= 0 for side in shape):
        raise DamagedPickle(f"the pickle holds an array of shape {str(shape)[:80]}: {_REMEDY}.")
    needed = math.prod(shape) * dtype.numpy().itemsize
    if needed != len(data):
        raise DamagedPickle(
            f"the pickle holds an array of shape {str(shape)[:80]} that needs {needed:,} bytes and has "
            f"{len(data):,}: {_REMEDY}."
        )
    return bytes(data)


def _require_plain_keys(keys: Iterable[object]) -> None:
    for key in keys:
        if type(key) not in _KEY_TYPES:
            raise DamagedPickle(f"the pickle holds a dict with a key of type {type(key).__name__}: {_REMEDY}.")


def _new_array(*_: object) -> np.ndarray:
    """``numpy._reconstruct(ndarray, (0,), b"b")``: an array whose state follows."""
    return _Array((0,), np.int8)


def _array_of(data: object, dtype: object, shape: object, order: object = "C") -> np.ndarray:
    """``numpy._frombuffer``, which pickle protocol 5 writes."""
    data = _require_bytes(data, dtype, shape)
    assert isinstance(dtype, _Dtype) and isinstance(shape, tuple)  # checked
    return np.frombuffer(bytearray(data), dtype.numpy()).reshape(shape, order="F" if order == "F" else "C")


def _scalar(dtype: object, data: object) -> Any:
    """``numpy.scalar``: a number."""
    data = _require_bytes(data, dtype, ())
    assert isinstance(dtype, _Dtype)  # checked
    return np.frombuffer(data, dtype.numpy())[0]


def _number(value: object) -> int:
    """``BoxMode(value)``, an IntEnum; its value is enough."""
    if type(value) is not int:
        raise DamagedPickle(f"the pickle holds a BoxMode of type {type(value).__name__}: {_REMEDY}.")
    return value


def _bytes_of_latin1(text: object, encoding: object = "latin1") -> bytes:
    """``_codecs.encode(text, "latin1")``, which pickle protocol 2 writes for bytes; other codecs are refused."""
    if encoding != "latin1" or not isinstance(text, str):
        raise DataError(f"the pickle uses the codec {encoding!r} and was not opened: convert it to .safetensors.")
    return text.encode("latin1")


def _empty_bytes(*content: object) -> bytes:
    """``bytes()``, which pickle protocol 2 writes for an array without values."""
    if content:
        raise DamagedPickle(f"the pickle makes bytes of {type(content[0]).__name__}: {_REMEDY}.")
    return b""


class _Dict(dict):
    """In place of an OrderedDict. Its attributes, such as the versions in torch's state dicts, are not read."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None: ...


def _new_dict(items: Any = ()) -> _Dict:
    items = list(items)
    _require_plain_keys(key for key, _ in items)
    return _Dict(items)


def _type_only(*_: object) -> None:
    raise DamagedPickle(f"the pickle makes an array without its bytes: {_REMEDY}.")


# numpy's functions are in numpy.core before numpy 2 and in numpy._core since.
_ALLOWED = {
    ("numpy", "dtype"): _StandIn(_Dtype),
    ("numpy", "ndarray"): _StandIn(_type_only),  # only named, as an argument of _reconstruct
    ("collections", "OrderedDict"): _StandIn(_new_dict),
    ("__builtin__", "bytes"): _StandIn(_empty_bytes),
    ("_codecs", "encode"): _StandIn(_bytes_of_latin1),
    ("detectron2.structures.boxes", "BoxMode"): _StandIn(_number),
}
for _core in ("numpy.core", "numpy._core"):
    _ALLOWED[f"{_core}.multiarray", "_reconstruct"] = _StandIn(_new_array)
    _ALLOWED[f"{_core}.multiarray", "scalar"] = _StandIn(_scalar)
    _ALLOWED[f"{_core}.numeric", "_frombuffer"] = _StandIn(_array_of)
