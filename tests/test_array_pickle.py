"""Pickles of arrays: what Detectron2 and numpy write is read; a hostile or damaged file ends in an error, never the process."""

import pickle
import random
import resource
import struct
from collections import OrderedDict

import numpy as np
import pytest
from detectron2.structures import BoxMode
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from ovdet2.caches.region_boxes import FileBoxes
from ovdet2.errors import DataError
from ovdet2.io.array_pickle import DamagedPickle, read_array_pickle
from ovdet2.io.weights import read_weights
from tests.processes import SERVER

TYPES = ["?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", ">f4", ">i8", "<u2"]
LIMIT = 2 * 2**30  # bytes of address space beyond those that a process has at its start
RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"


def dtype_of(code, order="<", fields="N"):
    """Opcodes of a dtype of protocol 0, with its state."""
    return f"cnumpy\ndtype\n(S'{code}'\nI0\nI1\ntR(I3\nS'{order}'\nN{fields}NI-1\nI-1\nI0\ntb".encode()


def array_of(shape, dtype, data=b"S'aaaa'\n"):
    return (
        RECONSTRUCT + b"(I1\n(" + b"".join(b"I%d\n" % side for side in shape) + b"t" + dtype + b"I00\n" + data + b"tb"
    )


# Files of a few bytes to a few hundred. In the first, a dtype that an array uses already gets another state.
HOSTILE = {
    "dtype changed after use": (
        b"(" + RECONSTRUCT + b"(I1\n(I1\nt" + dtype_of("f4") + b"p1\nI00\nS'aaaa'\ntb"
        b"g1\n(I3\nS'<'\nN(S'a'\nt(dp2\nS'a'\n(g1\nI0\ntsI9999999\nI-1\nI0\ntbt."
    ),
    "claims 400 MB": array_of([100_000_000], dtype_of("f4")) + b".",
    "claims more than an integer": array_of([2**62, 2**62], dtype_of("f4")) + b".",
    "negative side": array_of([-1], dtype_of("f4")) + b".",
    "objects": array_of([1], dtype_of("O8"), b"(lp9\nI1\na") + b".",
    "type of text": array_of([1], dtype_of("U1")) + b".",
    "type of 16 bytes": array_of([1], dtype_of("f16")) + b".",
    "state is a number": RECONSTRUCT + b"I1\nb.",
    "state of the constructor": b"cnumpy.core.multiarray\n_reconstruct\n(NN}S'__call__'\nI1\nstb.",
    "attributes of the constructor": b"cnumpy\ndtype\n}S'numpy'\nI1\nsb.",
    "ndarray is called": b"cnumpy\nndarray\n((I100000000\ntS'f4'\ntR.",
    "scalar of objects": b"cnumpy.core.multiarray\nscalar\n(" + dtype_of("O8") + b"S'aaaaaaaa'\ntR.",
    "scalar of no type": b"cnumpy.core.multiarray\nscalar\n(I1\nS'aaaa'\ntR.",
    "frombuffer too short": b"cnumpy.core.numeric\n_frombuffer\n(S'aaaa'\n" + dtype_of("f4") + b"(I9\ntS'C'\ntR.",
    "memo of 2 billion": b"\x80\x02Nr" + struct.pack("<I", 2**31 - 1) + b".",
    "bytearray of 60 GB": b"\x80\x05\x96" + struct.pack("<Q", 60 * 2**30) + b".",
    "bytes of 60 GB": b"\x80\x04\x8e" + struct.pack("<Q", 60 * 2**30) + b".",
    "text of 3 GB": b"X" + struct.pack("<I", 3 * 2**30) + b".",
    "frame of 60 GB": b"\x80\x04\x95" + struct.pack("<Q", 60 * 2**30) + b"N.",
    "integer of 4,000 MB": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b".",
    "deep key": b"\x80\x04})" + b"\x85" * 500_000 + b"Ns.",
    "deep keys": b"\x80\x04}()" + b"\x85" * 500_000 + b"Nu.",
    "deep key of protocol 0": b"()" + b"\x85" * 500_000 + b"Nd.",
    "deep key of an OrderedDict": b"ccollections\nOrderedDict\n(((" + b")" + b"\x85" * 500_000 + b"NtttR.",
    "deep member of a set": b"\x80\x04\x8f()" + b"\x85" * 500_000 + b"\x90.",
    "deep member of a frozenset": b"\x80\x04()" + b"\x85" * 500_000 + b"\x91.",
    "class of a class": b"ccollections\nOrderedDict\n(N}S'__init__'\nI1\nstb.",
    "persistent id": b"Pnothing\n.",
    "extension": b"\x80\x02\x82\x01.",
    "empty stack": b"\x80\x02R.",
    "nothing": b"",
    "HTML": b"<!doctype html><html>not found</html>",
}  # fmt: skip


def read_all(folder, connection):
    """In a process of small memory: what each reader makes of each file below a folder."""
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + LIMIT,) * 2)
    for path in sorted(folder.iterdir()):
        for reader in (read_array_pickle, read_weights, FileBoxes):
            try:
                reader(path)
            except DataError as error:
                connection.send((path.stem, reader.__name__, str(error)))
            else:
                connection.send((path.stem, reader.__name__, None))
    connection.send(None)


def outcomes(folder):
    """{(file, reader): message} of :func:`read_all`; the process must survive."""
    receiver, sender = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=read_all, args=(folder, sender))
    process.start()
    sender.close()
    found = {}
    try:
        while (row := receiver.recv()) is not None:
            found[row[:2]] = row[2]
    except EOFError:
        process.join()
        pytest.fail(f"the process ended with {process.exitcode} after {list(found)[-1:]}")
    process.join()
    return found


def test_hostile_files_are_refused_in_a_living_process_of_small_memory(tmp_path):
    for name, content in HOSTILE.items():
        (tmp_path / f"{name}.pkl").write_bytes(content)
    found = outcomes(tmp_path)
    assert len(found) == 3 * len(HOSTILE)
    accepted = [key for key, message in found.items() if message is None]
    assert accepted == [("memo of 2 billion", "read_array_pickle")]  # valid: None, without a memo of 34 GB
    unnamed = [key for key, message in found.items() if message and f"{key[0]}.pkl" not in message]
    assert not unnamed


def test_changed_bytes_never_end_the_process(tmp_path):
    """Each byte of small files replaced at random: read or refused."""
    rng = random.Random(0)
    weights = {"model": OrderedDict(a=np.ones((2, 3), np.float32), b=np.float32(1)), "__author__": "zoo"}
    for protocol in range(6):
        good = pickle.dumps(weights, protocol=protocol)
        for number in range(60):
            bad = bytearray(good)
            for _ in range(rng.choice((1, 1, 2, 5))):
                bad[rng.randrange(len(bad))] = rng.choice((rng.randrange(256), *b"bRtg0."))
            (tmp_path / f"{protocol}_{number:03d}.pkl").write_bytes(bad)
    assert len(outcomes(tmp_path)) == 3 * 6 * 60


@given(
    array=st.sampled_from(TYPES).flatmap(lambda kind: arrays.arrays(kind, arrays.array_shapes(min_dims=0, min_side=0))),
    protocol=st.integers(0, 5),
    fortran=st.booleans(),
)
@settings(deadline=None)
def test_arrays_are_read_back(tmp_path_factory, array, protocol, fortran):
    path = tmp_path_factory.getbasetemp() / "any.pkl"
    array = np.asarray(array, order="F" if fortran else "C")
    path.write_bytes(pickle.dumps({"a": [array, array], "b": array.reshape(-1)[:1].tolist()}, protocol=protocol))
    read = read_array_pickle(path)
    for again in read["a"]:
        assert again.dtype.newbyteorder("=") == array.dtype.newbyteorder("=") and again.shape == array.shape
        assert again.astype(array.dtype).tobytes() == array.tobytes() and again.flags.writeable
    assert str(read["b"]) == str(array.reshape(-1)[:1].tolist())


@pytest.mark.parametrize("protocol", range(6))
def test_what_detectron2_and_torch_write_is_read(tmp_path, protocol):
    versions = OrderedDict(a=1)
    versions._metadata = {"": {"version": 1}}
    value = {"modes": [BoxMode.XYWH_ABS], "n": np.int64(7), "f": np.float32(0.5), "raw": b"\xff", "t": ("a", None, 2.5),
             "state": versions}  # fmt: skip
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    read = read_array_pickle(path)
    assert read["modes"] == [1] and read["n"] == 7 and read["n"].dtype == np.int64 and read["f"] == np.float32(0.5)
    assert read["raw"] == b"\xff" and read["t"] == ("a", None, 2.5) and read["state"] == {"a": 1}


def test_messages_state_the_size(tmp_path):
    path = tmp_path / "a.pkl"
    path.write_bytes(HOSTILE["claims 400 MB"])
    with pytest.raises(
        DamagedPickle, match=r"a.pkl: .*\(100000000,\) that needs 400,000,000 bytes and has 4: download"
    ):
        read_array_pickle(path)
