"""Read the pickles of Detectron2 (model zoo weights, proposal files) without running code from them."""

import collections
import pickle
from typing import Any

import numpy as np

from ovdet2.errors import DataError

# numpy's array constructors under their names before and since numpy 2; their import paths differ too.
_RECONSTRUCT, _SCALAR = np.zeros(1).__reduce__()[0], np.float32(0).__reduce__()[0]
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy.core.multiarray", "scalar"): _SCALAR,
    ("numpy._core.multiarray", "scalar"): _SCALAR,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("collections", "OrderedDict"): collections.OrderedDict,
}


class ArraysOnly(pickle.Unpickler):
    """An Unpickler of numpy arrays and builtin containers that refuses every other name before importing it."""

    def find_class(self, module: str, name: str) -> Any:
        """The constructor of an allowed name.

        Raises:
            DataError: the name is not allowed; the message states it.
        """
        if (module, name) == ("_codecs", "encode"):
            return _bytes_of_latin1
        if (module, name) == ("detectron2.structures.boxes", "BoxMode"):
            return int  # an IntEnum; its value is enough
        if (module, name) not in _ALLOWED:
            raise DataError(
                f"the pickle imports {module}.{name} and was not opened, since it could run code: only numpy arrays "
                "in builtin containers are read from a .pkl file; convert it to .safetensors."
            )
        return _ALLOWED[module, name]


def _bytes_of_latin1(text, encoding="latin1"):
    """``_codecs.encode(text, "latin1")``, which pickle protocol 2 writes for bytes; other codecs are refused."""
    if encoding != "latin1":
        raise DataError(f"the pickle uses the codec {encoding!r} and was not opened: convert it to .safetensors.")
    return text.encode("latin1")
