"""Embedding tables made elsewhere, and words that are close to each other."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import ovdet2.vlm.neighbours as neighbours
from ovdet2.errors import DataError, UsageError
from ovdet2.io.files import write_json
from ovdet2.vlm.neighbours import close_pairs, nearest_words
from ovdet2.vlm.tables import read_table
from ovdet2.vocabulary.word_lists import named_words
from tests import micro
from tests.vocabulary_cases import CLIP_TEXT, DIM, SHARED, STATED, needs_shared, text_row, tool_runner


@pytest.fixture
def tool(monkeypatch, tmp_path, capsys):
    return tool_runner(monkeypatch, tmp_path, capsys)


def save_table(path, table):
    np.save(path, table) if path.suffix == ".npy" else torch.save(table, path)
    return path


def test_tables_of_every_kind(tmp_path):
    rows = micro.wave((3, 4))
    for name, content, key in (
        ("t.npy", rows.numpy(), None),
        ("t.npy", rows.double().numpy(), None),
        ("t.pt", rows, None),
        ("t.pth", torch.nn.Parameter(rows), None),
        ("t.pt", {"text": rows}, None),
        ("t.pt", {"text": rows, "epoch": 3}, None),
        ("t.pt", {"text": rows, "bias": rows[0]}, "text"),
    ):
        read = read_table(save_table(tmp_path / name, content), key)
        assert read.dtype == np.float32 and np.allclose(read, rows.numpy(), atol=1e-6)
    for half in (rows.half(), rows.bfloat16()):
        assert np.allclose(read_table(save_table(tmp_path / "t.pt", half)), rows.numpy(), atol=5e-3)


@pytest.mark.parametrize(
    "name, content, key, message",
    [
        ("t.pt", {"a": torch.ones(2, 3), "b": torch.ones(2)}, None, r"a \[2, 3\], b \[2\]: choose one with --key"),
        ("t.pt", {"a": torch.ones(2, 3)}, "text", r"no tensor 'text'; it has a \[2, 3\]"),
        ("t.pt", {"epoch": 3}, None, "has the tensors none"),
        ("t.pt", torch.ones(2, 3), "text", "remove --key"),
        ("t.npy", np.ones((2, 3)), "text", "remove --key"),
        ("t.pt", [torch.ones(2, 3)], None, "holds a list, not a tensor"),
        ("t.pt", torch.ones(3), None, r"has shape \[3\]"),
        ("t.npy", np.ones((0, 3)), None, r"has shape \[0, 3\]"),
        ("t.npy", np.ones((2, 3), dtype=int), None, "holds int64"),
        ("t.pt", torch.ones(2, 3, dtype=torch.complex64), None, "holds complex64"),
        ("t.npy", np.array([[{}]], dtype=object), None, "t.npy is not a complete .npy table"),
    ],
)
def test_tables_that_are_none(tmp_path, name, content, key, message):
    with pytest.raises(DataError, match=message):
        read_table(save_table(tmp_path / name, content), key)


def test_damaged_tables(tmp_path):
    for name, kind in (("t.npy", "a complete .npy table"), ("t.pt", "a complete torch file")):
        path = save_table(tmp_path / name, torch.ones(40, 40).numpy() if name == "t.npy" else torch.ones(40, 40))
        whole = path.read_bytes()
        for content in (whole[: len(whole) // 2], b"not a table", b""):
            path.write_bytes(content)
            with pytest.raises(DataError, match=f"{name} is not {kind}"):
                read_table(path)
        path.unlink()
        with pytest.raises(DataError, match=f"{name} is not {kind}.*No such file"):
            read_table(path)
    with pytest.raises(DataError, match="t.bin is neither .npy nor .pt nor .pth"):
        read_table(tmp_path / "t.bin")


class Malicious:
    """Unpickled by a careless reader, it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("form", ["torch", "pickle", "npy"])
def test_a_malicious_pickle_is_not_run(tmp_path, form):
    trap, path = tmp_path / "ran", tmp_path / ("t.npy" if form == "npy" else "t.pt")
    if form == "torch":
        torch.save({"text": torch.ones(2, 3), "x": Malicious(trap)}, path)
    elif form == "pickle":
        path.write_bytes(pickle.dumps(Malicious(trap), protocol=2))
    else:
        np.save(path, np.array([Malicious(trap)], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="is not a complete"):
        read_table(path)
    assert not trap.exists()


def test_import_of_a_table(tmp_path, tool):
    rows = micro.wave((3, 5))
    path = save_table(tmp_path / "t.pt", {"text": rows, "other": rows.T})
    command = ("--words", "sofa; couch, cat, dog", "--import-table", path, "--templates", "as ViLD's")
    words, printed = tool(*command, "--key", "text")
    assert torch.allclose(words.embeddings, F.normalize(rows, dim=1), atol=1e-6)
    assert words.templates == "as ViLD's" and words.templates_sha256 is None and words.synonyms is None
    assert words.teacher.weights_sha256 is None and "sofa -> as ViLD's -> " in printed
    turned, _ = tool(*command, "--key", "other", "--transpose")
    assert torch.equal(turned.embeddings, words.embeddings)
    with pytest.raises(
        DataError, match=r"t.pt is \[5, 3\], but a row is needed for each of the 3 words of --words: give --tr"
    ):
        tool(*command, "--key", "other")
    with pytest.raises(DataError, match=r"t.pt is \[5, 3\] transposed, .* --words: leave --transpose out"):
        tool(*command, "--key", "text", "--transpose")
    with pytest.raises(DataError, match=r"t.pt is \[3, 5\].* the 2 words of --words: give the words it was made for"):
        tool("--words", "sofa, cat", "--import-table", path, "--key", "text")
    for value, fault in ((0.0, "zero"), (float("nan"), "not finite"), (float("inf"), "not finite")):
        wrong = rows.clone()
        wrong[1] = value
        save_table(path, wrong)
        with pytest.raises(DataError, match=f"'cat' .row 1 of the table. is {fault}; such rows: 1"):
            tool(*command)


def test_the_first_of_duplicate_rows_is_kept(tmp_path, tool):
    rows = micro.wave((6, 4))
    path = save_table(tmp_path / "t.npy", rows.numpy())
    categories = [
        {"id": 10 - i, "name": n} for i, n in enumerate(("Crane", "red_mug", "CRANE", "cat", "crane.", "dog"))
    ]
    write_json(tmp_path / "c.json", {"categories": categories})
    command = ("--json", tmp_path / "c.json", "--import-table", path, "--templates", "stated")
    with pytest.raises(UsageError, match="and 'CRANE' .words 1 and 3., .* and 'Crane' .words 1 and 5.. Remove"):
        tool(*command)
    words, printed = tool(*command, "--first-of-duplicates")  # by ascending id: dog, crane., cat, CRANE, red_mug, Crane
    assert words.names == ("dog", "crane.", "cat", "red_mug") and words.category_ids == (5, 6, 7, 9)
    assert torch.allclose(words.embeddings, F.normalize(rows[[0, 1, 2, 4]], dim=1), atol=1e-6)
    assert printed.startswith("dropped 2 rows whose word an earlier row has: 'CRANE', 'Crane'\n")
    write_json(tmp_path / "w.json", ["a", "b", "c", "d", "e", "f"])
    unique, printed = tool("--words", tmp_path / "w.json", *command[2:], "--first-of-duplicates")
    assert len(unique) == 6 and printed.startswith("dropped 0 rows whose word an earlier row has: none\n")
    write_json(tmp_path / "w.json", ["a", "a", "_", "d", "e", "f"])
    with pytest.raises(UsageError, match="word 2 of the vocabulary is empty"):
        tool("--words", tmp_path / "w.json", *command[2:], "--first-of-duplicates")


@needs_shared
def test_import_of_the_real_coco_table(tool):
    table = CLIP_TEXT / "coco_clip_a+cname.npy"
    categories = SHARED / "coco_mini" / "annotations" / "instances_val2017.json"
    command = ("--dataset", "ov_coco_val_all", "--import-table", table, *STATED)
    words, _ = tool(*command, "--json", categories)
    assert len(words) == 65 and words.num_base == 48 and words.embeddings.shape == (65, 512)
    assert words.names[0] == "person" and words.teacher.weights_sha256 is None
    raw = np.load(table).astype(np.float64)
    airplane = raw[4] / np.linalg.norm(raw[4])  # fifth of COCO's 80, first novel one
    assert words.names[48] == "airplane" and np.allclose(words.embeddings[48], airplane, atol=1e-5)
    by_name, _ = tool(*command, "--names", "coco")
    assert torch.equal(by_name.embeddings, words.embeddings) and by_name.manifest() == words.manifest()
    with pytest.raises(DataError, match="a row is needed for each of the 20 words of voc"):
        tool(*command, "--names", "voc")
    with pytest.raises(DataError, match=r"objects365_v1 has no category .*\(64 in all\) of ov_coco_val_all"):
        tool(
            *command[:2], "--import-table", CLIP_TEXT / "o365_clip_a+cnamefix.npy", "--names", "objects365_v1", *STATED
        )


@needs_shared
@pytest.mark.parametrize(
    "table, names, near",
    [
        ("coco_clip_a+cname", ("coco",), {"fork": "knife", "cat": "dog", "skis": "snowboard"}),
        ("lvis_v1_clip_a+cname", ("lvis",), {"armchair": "chair", "almond": "coconut", "airplane": "jet_plane"}),
        ("o365_clip_a+cnamefix", ("objects365_v2", "--corrected"), {"Sneakers": "Other Shoes", "Car": "Sports Car"}),
    ],
)
def test_nearest_words_of_real_tables(tool, table, names, near):
    """A list of names in another order than the table's rows would give nonsense here."""
    words, printed = tool("--names", *names, "--import-table", CLIP_TEXT / f"{table}.npy", *STATED, "--show", "all")
    assert len(printed.splitlines()) >= len(words)
    for word, expected in near.items():
        assert f"{word} -> a {{name}} -> {expected} 0." in printed


@needs_shared
def test_close_words_of_a_real_table(tmp_path, tool):
    table = np.load(CLIP_TEXT / "coco_clip_a+cname.npy").astype(np.float32)
    names = list(named_words("coco").names)
    double = table[15] + 0.02 * np.linalg.norm(table[15]) * text_row("x").repeat(512 // DIM) / np.sqrt(512 // DIM)
    np.save(tmp_path / "t.npy", np.concatenate([table, double[None]]))
    write_json(tmp_path / "w.json", [*names, "tomcat"])
    words = ("--words", tmp_path / "w.json", "--import-table", tmp_path / "t.npy")
    _, printed = tool(*words, *STATED, "--show", "0")
    assert "warning: 1 near-duplicate pairs, which the teacher hardly distinguishes (cosine above 0.98)" in printed
    assert printed.splitlines()[2].endswith("cat | tomcat") and "... and 81 more words" in printed.splitlines()[0]


def brute_force(rows, threshold):
    cosines = rows.numpy() @ rows.numpy().T
    i, j = np.nonzero(np.triu(cosines > threshold, 1))
    return sorted(zip(cosines[i, j].tolist(), i.tolist(), j.tolist()), key=lambda pair: -pair[0])


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 40), cells=st.integers(1, 500), seed=st.integers(0, 99), limit=st.integers(1, 50))
def test_chunks_are_brute_force(count, cells, seed, limit):
    rows = torch.from_numpy(np.random.default_rng(seed).normal(size=(count, 4)))
    rows = F.normalize(rows, dim=1)
    expected = brute_force(rows, 0.6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "CELLS_AT_ONCE", cells)
        pairs, total = close_pairs(rows, 0.6, limit)
        cosines, nearest = nearest_words(rows, torch.arange(count), 3)
    assert total == len(expected) and [p[1:] for p in pairs] == [p[1:] for p in expected[:limit]]
    assert np.allclose([p[0] for p in pairs], [p[0] for p in expected[:limit]])
    full = (rows @ rows.T).fill_diagonal_(-np.inf)
    best, at = full.topk(min(3, count - 1), dim=1)
    assert torch.equal(nearest, at) and torch.allclose(cosines, best)


def test_equal_words_are_all_counted():
    rows = F.normalize(torch.ones(50, 8), dim=1)
    pairs, total = close_pairs(rows, 0.98, 20)
    assert total == 50 * 49 // 2 and len(pairs) == 20
    assert close_pairs(torch.eye(5), 0.98) == ([], 0)
