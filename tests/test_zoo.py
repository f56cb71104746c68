"""The zoo: records, downloads from a host on this machine, imports, trust, licences."""

import hashlib
import io
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pin_zoo
import pytest
import torch

from ovdet2.config import load_config
from ovdet2.errors import DataError, SetupError, UsageError
from ovdet2.io.download import Patience
from ovdet2.io.weights import read_weights
from ovdet2.programs import zoo as program
from ovdet2.zoo import records, store
from tests.file_host import Host, serving
from tests.zoo_cases import SHAPES, source, tiny_weights, write_records

QUICK = Patience(seconds=0.5, bytes_per_second=1000, attempts=2)


def saved(value, **wrappers):
    """The bytes of a torch file."""
    buffer = io.BytesIO()
    torch.save(value, buffer, **wrappers)
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty OVDET2_HOME."""
    monkeypatch.setenv("OVDET2_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "home"


@pytest.fixture
def host():
    host = Host(saved({"model": tiny_weights(), "epoch": 49}))
    with serving(host) as address:
        host.url = f"{address}/files/tiny.pth"
        yield host


@pytest.fixture
def record_with(tmp_path, monkeypatch):
    """Makes the record "tiny", with changes, the only one of the zoo."""
    monkeypatch.setattr(records, "ASSETS", tmp_path / "assets")

    def make(**changes):
        made = records.read_records(write_records(tmp_path / "assets", **changes))
        for module in (records, program):
            monkeypatch.setattr(module, "RECORDS", made)
        return made["tiny"]

    return make


@pytest.fixture
def tiny(record_with, host):
    """The record, whose file the host has."""
    return record_with(sources=[source(host.url)])


def files(home):
    """Names in the folder of the record, but for the lock."""
    return sorted(path.name for path in (home / "zoo" / "tiny").iterdir() if path.name != ".lock")


COMPLETE = ["manifest.json", "tiny.safetensors"]


# --- records ---------------------------------------------------------------------------------------------------------


def test_records_are_complete():
    assert len(records.RECORDS) >= 7
    for name, record in records.RECORDS.items():
        assert record.name == name and re.fullmatch(r"[a-z0-9-]+", name)
        assert record.figures and all(figure.source for figure in record.figures)
        assert all(source.url.startswith("https://") for source in record.sources)
        assert all(source.by_hand == ("drive.google.com" in source.url) for source in record.sources)
        assert all((source.sha256 is None) == (source.bytes is None) for source in record.sources)
        cfg = load_config(record.config, record.overrides)
        closed = cfg.MODEL.OVD.CLASSIFIER == "closed_set"
        teacher = f"{cfg.MODEL.TEACHER.ARCHITECTURE} ({cfg.MODEL.TEACHER.PRETRAINED})"
        assert record.teacher == (None if closed else teacher)
        assert record.templates == (None if closed else cfg.MODEL.VOCABULARY.TEMPLATES)
        used = {records.weights_path(name).with_name(source.file_name) for source in record.sources}  # must differ
        assert not used & {records.weights_path(name)} and len(records.read_structure(record.structure)) > 100


@pytest.mark.parametrize(
    "change, message",
    [
        ({"colour": "red"}, "tiny must have exactly the entries .*unknown: colour"),
        ({"licence": {"code": "MIT"}}, "tiny.licence must have .*missing: data, non_commercial, weights"),
        ({"sources": [{"url": "x"}]}, "tiny.sources must have"),
        ({"sources": []}, "tiny has no source"),
    ],
)
def test_incomplete_records_are_refused(change, message, tmp_path):
    with pytest.raises(DataError, match=message):
        records.read_records(write_records(tmp_path, **change))


def test_other_files_are_no_records(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(DataError, match="has not the schema 'ovdet2/zoo/1'"):
        records.read_records(tmp_path / "a.json")


def test_names_that_do_not_exist():
    with pytest.raises(UsageError, match=r"no 'deformable-detr-r5' .did you mean deformable-detr-r50"):
        records.record_of("deformable-detr-r5")


# --- fetch -----------------------------------------------------------------------------------------------------------


def test_fetch_then_use_without_network(tiny, host, home, capsys):
    path = store.fetch(tiny)
    out = capsys.readouterr().out
    sha256 = hashlib.sha256(host.content).hexdigest()
    assert out.count("tiny: licences: MIT (code), MIT (weights), own (training data)") == 1
    assert f"Trust: first use (names and shapes equal the committed list; SHA-256 {sha256} is kept" in out
    assert path == home / "zoo" / "tiny" / "tiny.safetensors" and files(home) == COMPLETE
    weights = read_weights(path)["model"]
    assert {name: tuple(value.shape) for name, value in weights.items() if name in SHAPES} == SHAPES
    assert torch.equal(weights["network.a"], tiny_weights()["a"])
    manifest = json.loads((home / "zoo" / "tiny" / "manifest.json").read_text())
    assert manifest["source_sha256"] == sha256 and manifest["origin"] == host.url and manifest["tensors"] == 3
    assert len(host.requests) == 1
    host.status = 404
    assert store.fetch(tiny) == path and len(host.requests) == 1 and not capsys.readouterr().out
    assert store.verify(tiny) == store.FIRST_USE


def test_a_pinned_file(record_with, host, home, capsys):
    good = hashlib.sha256(host.content).hexdigest()
    record = record_with(sources=[source(host.url, sha256=good, bytes=len(host.content))])
    assert store.trust_of(record) == store.PINNED
    store.fetch(record)
    assert f"Trust: pinned (names and shapes equal the committed list, and SHA-256 {good}" in capsys.readouterr().out
    assert store.verify(record) == store.PINNED
    with pytest.raises(DataError, match=f"made from a file of SHA-256 {good}, which is not the pinned one"):
        store.verify(record_with(sources=[source(host.url, sha256="0" * 64, bytes=5)]))
    with pytest.raises(DataError, match="which is not the pinned one: delete .*tiny and run ovdet2 zoo fetch tiny"):
        store.fetch(record_with(sources=[source(host.url, sha256="0" * 64, bytes=5)]))


def test_a_file_that_is_not_the_pinned_one_is_not_opened(record_with, host, home, monkeypatch):
    record = record_with(sources=[source(host.url, sha256="0" * 64, bytes=len(host.content))])
    monkeypatch.setattr(store, "read_weights", lambda _: pytest.fail("the file was opened"))
    with pytest.raises(
        DataError, match=f"but the record of tiny has {'0' * 64}: it is another file, and was not opened"
    ):
        store.fetch(record)
    assert files(home) == []


def test_a_file_that_changed_since_its_first_use_is_refused(tiny, host, home):
    store.fetch(tiny)
    (home / "zoo" / "tiny" / "tiny.safetensors").unlink()
    assert not store.is_here(tiny)
    host.content = saved({"model": tiny_weights(2.0)})
    with pytest.raises(
        DataError, match="tiny was first used with .*has changed, and was not opened.*delete .*manifest.json"
    ):
        store.fetch(tiny)
    assert files(home) == ["manifest.json"]
    (home / "zoo" / "tiny" / "manifest.json").unlink()
    store.fetch(tiny)
    assert files(home) == COMPLETE


def test_offline_the_message_has_address_path_and_command(tiny, host, home, capsys):
    host.status = 404
    with pytest.raises(SystemExit) as exit:
        run("fetch", "tiny")
    assert exit.value.code == 4
    error = capsys.readouterr().err
    target = home / "zoo" / "tiny" / "tiny.pth"
    assert (
        f"{host.url}: the host answers 404" in error
        and f"download {host.url} elsewhere, then put it to {target}" in error
    )
    assert "ovdet2 zoo import tiny FILE" in error
    assert files(home) == []
    target.write_bytes(host.content)  # what the message recommends
    run("fetch", "tiny")
    assert files(home) == sorted([*COMPLETE, "tiny.pth"]) and len(host.requests) == 1


def run(*words):
    """``ovdet2 zoo ...`` with its exit code."""
    from ovdet2.errors import exit_on_error

    with exit_on_error():
        return getattr(program, f"{words[0]}_main")(list(words[1:]))


def test_a_download_that_is_cut_leaves_a_part_and_goes_on(tiny, host, home):
    host.cut_after, host.cuts, host.ranges = 500, 99, False
    with pytest.raises(SetupError, match="ended after 500 bytes"):
        store.fetch(tiny, patience=QUICK)
    assert files(home) == ["tiny.pth.part", "tiny.pth.part.json"] and not store.is_here(tiny)
    host.cuts, host.ranges = 0, True
    store.fetch(tiny)
    assert files(home) == COMPLETE and host.requests[-1]["Range"] == "bytes=500-"


def test_a_wrong_length_is_refused(record_with, host, home):
    with pytest.raises(DataError, match="but 7 are expected"):
        store.fetch(record_with(sources=[source(host.url, bytes=7, sha256="0" * 64)]))
    assert files(home) == []


def test_two_processes_download_once(tiny, host, home):
    """The second waits for the first (here two threads, with a lock each)."""
    host.content = saved({"model": tiny_weights(), "padding": torch.zeros(200_000)})
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: store.fetch(tiny), range(2))
    assert first == second and len(host.requests) == 1 and files(home) == COMPLETE


def test_an_interruption_before_the_manifest_leaves_no_entry(tiny, host, home, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(store, "write_json", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store.fetch(tiny)
    assert not store.is_here(tiny) and store.trust_of(tiny) == store.STRUCTURE
    store.fetch(tiny)
    assert files(home) == sorted([*COMPLETE, "tiny.pth"]) and store.verify(tiny) == store.FIRST_USE
    assert len(host.requests) == 1  # the file of the first call was converted


def test_a_disk_that_is_full_while_the_file_is_converted(tiny, host, home, monkeypatch):
    """The download is kept."""
    with monkeypatch.context() as patch:
        patch.setattr(store, "write_safetensors", lambda *_: (_ for _ in ()).throw(SetupError("full")))
        with pytest.raises(SetupError, match="full"):
            store.fetch(tiny)
    assert files(home) == ["tiny.pth"] and not store.is_here(tiny)
    store.fetch(tiny)
    assert len(host.requests) == 1 and store.is_here(tiny)


@pytest.mark.parametrize("case", ["html", "truncated", "pickled"])
def test_files_that_are_no_weights_are_refused(case, tiny, host, home, tmp_path):
    marker = tmp_path / "ran"
    host.content = {
        "html": b"\n<!DOCTYPE html><html><body>Virus scan warning</body></html>",
        "truncated": host.content[: len(host.content) // 2],
        "pickled": saved({"model": Touch(marker)}),
    }[case]
    expected = {
        "html": "is an HTML page, not weights: open the address in a browser",
        "truncated": "is no torch file or is truncated|is damaged or truncated",
        "pickled": "was not opened, since it could run code",
    }[case]
    with pytest.raises(DataError, match=expected) as error:
        store.fetch(tiny)
    assert files(home) == [] and not marker.exists()
    assert "weights_only" not in str(error.value) and "unsafe" not in str(error.value)


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"b": None}, "1 missing .network.b."),
        ({"c": torch.zeros(1)}, "1 unknown .network.c."),
        ({"b": torch.zeros(5)}, r"1 of another shape .network.b \[5\], expected \[4\]."),
        ({"b": torch.zeros(5), "c": torch.zeros(1), "a": None}, "1 missing .*; 1 unknown .*; 1 of another shape"),
        ({"b": "text"}, "has entries that are no tensors"),
    ],
)
def test_one_wrong_tensor_is_refused_by_name(change, message, tiny, host, home):
    weights = {name: value for name, value in {**tiny_weights(), **change}.items() if value is not None}
    host.content = saved({"model": weights})
    with pytest.raises(DataError, match=message):
        store.fetch(tiny)
    assert files(home) == []


def test_tensors_that_share_memory_are_written(tiny, host, home):
    shared = torch.arange(6.0)
    host.content = saved({"a": shared.view(2, 3), "b": shared[:4]})  # no wrapper
    weights = read_weights(store.fetch(tiny))["model"]
    assert torch.equal(weights["network.b"], torch.arange(4.0)) and torch.equal(weights["network.a"].flatten(), shared)


# --- licences, import, by hand ----------------------------------------------------------------------------------------


def test_weights_that_forbid_commercial_use(record_with, host, home, capsys):
    licence = {"code": "MIT", "weights": "CC BY-NC 4.0", "data": "own", "non_commercial": True}
    record = record_with(sources=[source(host.url)], licence=licence)
    with pytest.raises(
        UsageError, match=r"must not be used commercially \(CC BY-NC 4.0\).*--accept-license.*accept_license=True"
    ):
        store.fetch(record)
    assert files(home) == [] and host.requests == []
    run("fetch", "tiny", "--accept-license")
    assert "licences: MIT (code), CC BY-NC 4.0 (weights)" in capsys.readouterr().out
    assert store.fetch(record).is_file()  # accepted once


def test_a_file_that_must_be_downloaded_by_hand(record_with, home, tmp_path, capsys):
    page = "https://drive.google.com/file/d/1/view"
    record = record_with(sources=[source(page, by_hand=True)])
    with pytest.raises(
        SetupError, match=f"download {page} by hand.*the file of: Two tensors.*then run: ovdet2 zoo import tiny FILE"
    ) as error:
        store.fetch(record)
    assert error.value.exit_code == 4
    file = tmp_path / "any name.pth"
    file.write_bytes(saved({"model": tiny_weights()}))
    run("import", "tiny", str(file))
    assert "Trust: first use" in capsys.readouterr().out and file.is_file()
    assert files(home) == COMPLETE and store.fetch(record).is_file()
    other = tmp_path / "other.pth"
    other.write_bytes(saved({"model": tiny_weights(3.0)}))
    with pytest.raises(DataError, match="tiny was first used with .*any name.pth"):
        store.import_file(record, other)
    with pytest.raises(DataError, match="nowhere.pth does not exist"):
        store.import_file(record, tmp_path / "nowhere.pth")


def test_an_imported_file_must_be_a_pinned_one(record_with, home, tmp_path):
    file = tmp_path / "file.pth"
    file.write_bytes(saved({"model": tiny_weights()}))
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    pinned = [source("https://a.org/a.pth", sha256="1" * 64, bytes=1)]
    with pytest.raises(DataError, match="it is another file"):
        store.import_file(record_with(sources=pinned), file)
    pinned.append(source("https://a.org/b.pth", sha256=sha256, bytes=2))
    record = record_with(sources=pinned)
    store.import_file(record, file)
    assert store.verify(record) == store.PINNED


# --- list and verify --------------------------------------------------------------------------------------------------


def test_list_and_verify(tiny, host, home, capsys):
    run("verify")
    assert "No published detector is on this machine" in capsys.readouterr().out
    run("list")
    out = capsys.readouterr().out
    assert re.search(r"^tiny +no +structure +MIT +AP 1.0$", out, re.M)
    assert re.search(r"^ovshapes-vild +no +trained here +- +none: train it with `ovdet2 demo`", out, re.M)
    run("fetch", "tiny")
    capsys.readouterr()
    run("fetch", "tiny")
    assert "tiny is here already; trust: first use" in capsys.readouterr().out
    run("list")
    assert re.search(r"^tiny +yes +first use", capsys.readouterr().out, re.M)
    run("verify")
    assert capsys.readouterr().out == "tiny: first use\n"
    path = home / "zoo" / "tiny" / "tiny.safetensors"
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1
    path.write_bytes(changed)
    with pytest.raises(SystemExit) as exit:
        run("verify")
    out, err = capsys.readouterr()
    assert (
        exit.value.code == 3
        and "has changed since it was converted" in out
        and "1 detector cannot be used (tiny)" in err
    )
    (home / "zoo" / "tiny" / "manifest.json").write_text('{"schema": "ovdet2/zoo-entry/1"}')
    with pytest.raises(DataError, match="is no manifest of the schema"):
        store.verify(tiny)


def test_verify_compares_the_structure(tiny, home, tmp_path):
    store.fetch(tiny)
    (tmp_path / "assets" / "structures" / "tiny.txt").write_text("network.a 2 3\n")
    with pytest.raises(DataError, match="1 unknown .network.b."):
        store.verify(tiny)
    (tmp_path / "assets" / "structures" / "tiny.txt").write_text("network.a two\n")
    with pytest.raises(DataError, match="tiny.txt is no list of names and shapes"):
        store.verify(tiny)


def test_a_folder_that_cannot_be_written(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("OVDET2_HOME", str(tmp_path / "file"))
    with pytest.raises(SetupError, match="cannot be written .*set OVDET2_HOME"):
        store.fetch(tiny)


def test_weights_in_a_folder_that_is_read_only(tiny, host, monkeypatch):
    """As in an image of a container: nothing is written on the second use, not even a lock."""
    path = store.fetch(tiny)
    monkeypatch.setattr(store, "_only_process", lambda _: pytest.fail("the folder was locked"))
    assert store.fetch(tiny) == path and len(host.requests) == 1


def test_a_damaged_manifest_does_not_hide_the_list(tiny, home, capsys):
    store.fetch(tiny)
    (home / "zoo" / "tiny" / "manifest.json").write_text("{")
    run("list")
    out = capsys.readouterr().out
    assert re.search(r"^tiny +damaged +- +MIT", out, re.M) and "ovshapes-vild" in out
    with pytest.raises(DataError, match="manifest.json is not valid JSON .*delete .*tiny and fetch tiny again"):
        store.fetch(tiny)


# --- the tool of the maintainer ---------------------------------------------------------------------------------------


def test_the_maintainer_pins_a_record(record_with, host, home, tmp_path, capsys):
    page = source("https://drive.google.com/file/d/1/view", by_hand=True)
    record = record_with(sources=[source(host.url), page])
    pin_zoo.main(["tiny"])
    assert "download it by hand, then give --file" in capsys.readouterr().out
    place = tmp_path / "assets" / "tiny.json"
    (first, second) = records.read_records(place)["tiny"].sources
    expected = hashlib.sha256(host.content).hexdigest()
    assert (first.sha256, first.bytes) == (expected, len(host.content)) and second.sha256 is None
    # Everything else of the file stays.
    data = json.loads(place.read_text())
    assert records.read_records(place)["tiny"] == replace(record, sources=(first, second)) and data["schema"]
    by_hand = tmp_path / "by_hand.pth"
    by_hand.write_bytes(saved(tiny_weights(4.0)))
    records.RECORDS["tiny"] = records.read_records(place)["tiny"]
    pin_zoo.main(["tiny", "--file", str(by_hand)])
    assert records.read_records(place)["tiny"].pinned
    assert "pinned already" in capsys.readouterr().out


def test_the_maintainer_does_not_pin_another_file(record_with, host, home, tmp_path):
    record_with(sources=[source(host.url)])
    host.content = saved({"a": torch.zeros(1)})
    before = (tmp_path / "assets" / "tiny.json").read_text()
    with pytest.raises(DataError, match="1 missing .network.b."):
        pin_zoo.main(["tiny"])
    assert (tmp_path / "assets" / "tiny.json").read_text() == before


def test_the_maintainer_writes_a_structure(record_with, home, tmp_path, monkeypatch):
    record_with()
    monkeypatch.setattr(pin_zoo, "configured_structure", lambda record: {"b": (), "a": (2, 3)})
    pin_zoo.main(["--structure", "tiny"])
    assert (tmp_path / "assets" / "structures" / "tiny.txt").read_text() == "a 2 3\nb\n"
    assert records.read_structure("tiny") == {"a": (2, 3), "b": ()}


def test_the_page_is_that_of_the_records(tmp_path, monkeypatch):
    """docs/ZOO.md is current; python tools/pin_zoo.py --page writes it."""
    committed = pin_zoo.PAGE.read_text(encoding="utf-8")
    monkeypatch.setattr(pin_zoo, "PAGE", tmp_path / "ZOO.md")
    pin_zoo.main(["--page"])
    assert (tmp_path / "ZOO.md").read_text(encoding="utf-8") == committed
    assert all(f"### {name}\n" in committed for name in records.RECORDS)
    with pytest.raises(UsageError, match="name at least one record"):
        pin_zoo.main([])


def test_the_page_has_every_entry_of_a_record(record_with):
    licence = {"code": "MIT", "weights": "CC BY-NC 4.0", "data": "own", "non_commercial": True}
    hand = source("https://drive.google.com/file/d/1/view", by_hand=True)
    pinned = source("https://a.org/a.pth", sha256="1" * 64, bytes=1234)
    record = record_with(
        licence=licence, sources=[pinned, hand], teacher="ViT-B-32 (openai)", templates="vild63", overrides=["A.B", 3]
    )
    page = pin_zoo.zoo_page({"tiny": record})
    for text in (
        "| [`tiny`](#tiny) | Two tensors | AP 1.0 | CC BY-NC 4.0, non-commercial | structure, first use |",
        "| configuration | `coco/deformable_detr_r50.yaml`, with `A.B 3` |",
        "| words | ViT-B-32 (openai), templates `vild63` |",
        f"| file | <https://a.org/a.pth>, 1,234 bytes, SHA-256 `{'1' * 64}` |",
        "| download by hand, then import | <https://drive.google.com/file/d/1/view> |",
        "| licences | MIT (code), CC BY-NC 4.0 (weights), own (training data) |",
        "| boxes in training | some |",
        "| published, not run here | AP 1.0 (a page) |",
    ):
        assert text in page
