"""Reading the pickles of Detectron2's world (zoo weights, proposal files) without running code from them."""

import collections
import pickle
from typing import Any

import numpy as np

from ovdet2.errors import DataError

# numpy's array constructors under the names they had before and have since numpy 2. Their import path differs, too.
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
    """Builds numpy arrays and builtin containers, and refuses every other name before it is imported."""

    def find_class(self, module: str, name: str) -> Any:
        """The constructor of an allowed name.

        Raises:
            DataError: names what the pickle asks for.
        """
        if (module, name) == ("_codecs", "encode"):
            return _bytes_of_latin1
        if (module, name) == ("detectron2.structures.boxes", "BoxMode"):
            return int  # an IntEnum, whose value says it all
        if (module, name) not in _ALLOWED:
            raise DataError(
                f"the pickle asks for {module}.{name} and was not opened, since it could run code: only numpy arrays "
                "in builtin containers are read from a .pkl file; convert it to .safetensors."
            )
        return _ALLOWED[module, name]


def _bytes_of_latin1(text, encoding="latin1"):
    """What protocol 2 writes for bytes: ``_codecs.encode(text, "latin1")``, with no other codec."""
    if encoding != "latin1":
        raise DataError(f"the pickle asks for the codec {encoding!r} and was not opened.")
    return text.encode("latin1")
