"""Manifests of any content: a file is read, or refused with a DataError that names it."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ovdet2.caches.region_cache import RegionCache
from ovdet2.data.datasets import ov_shapes
from ovdet2.data.readers.tar_shards import TarShards
from ovdet2.errors import DataError
from ovdet2.io.files import read_safetensors, write_safetensors
from ovdet2.io.manifests import Optional, fault_of
from ovdet2.priors.concept_prior import ConceptPriors
from ovdet2.vocabulary import Vocabulary
from tests import micro
from tests.caption_cases import make_shards
from tests.priors_cases import write as write_prior
from tests.test_region_cache import build

ABSENT = object()
DEEP = json.loads("[" * 200 + "]" * 200)
ODD = [None, True, -1, 0, 10**30, 1.5, float("nan"), "", "\ud800", "../x", [], [None], [[]], {}, {"a": {"b": []}}, DEEP]


def places(value, path=()):
    """The path of every value inside of a manifest."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def changed(manifest, path, odd):
    """A copy with another value at one path."""
    if not path:
        return {} if odd is ABSENT else odd
    whole = copy.deepcopy(manifest)
    node = whole
    for key in path[:-1]:
        node = node[key]
    if odd is ABSENT:
        del node[path[-1]]
    else:
        node[path[-1]] = odd
    return whole


class InHeader:
    """A safetensors file with its manifest in the header."""

    def __init__(self, path):
        self.path = path
        schema = json.loads(self.metadata())["schema"]
        self.tensors, self.manifest = read_safetensors(path, schema)

    def metadata(self):
        from safetensors import safe_open

        with safe_open(str(self.path), framework="pt") as file:
            return file.metadata()["manifest"]

    def put(self, manifest):
        from safetensors.torch import save_file

        save_file(self.tensors, str(self.path), metadata={"manifest": json.dumps(manifest)})


class InFolder:
    """A folder with a manifest as a file."""

    def __init__(self, folder, name="manifest.json"):
        self.path = folder / name
        self.manifest = json.loads(self.path.read_text())

    def put(self, manifest):
        self.path.write_text(json.dumps(manifest))


def region_cache(folder):
    build(folder, range(1, 6))

    def read():
        cache = RegionCache(folder)
        assert len(list(cache.image_ids())) == 5 and str(cache.teacher) and isinstance(cache.unreadable, dict)
        assert len(cache.regions(3)) == 3

    return InFolder(folder), read


def vocabulary(folder):
    micro.vocabulary().save(folder / "v.safetensors")
    return InHeader(folder / "v.safetensors"), lambda: Vocabulary.load(folder / "v.safetensors").base().manifest()


def concept_prior(folder):
    write_prior(folder / "p", {1: {0: 0.9}, 2: {}}, missing=(3,))

    def read():
        priors = ConceptPriors(folder / "p")
        assert str(priors) and len(priors.select(1)) == 1

    return InHeader(folder / "p"), read


def shapes(folder):
    ov_shapes.ensure_generated(folder, counts={"train2017": 2, "val2017": 1}, workers=1)

    def read():
        ov_shapes.ensure_current(folder)
        ov_shapes.ensure_generated(folder, counts={"train2017": 2, "val2017": 1}, workers=1)

    return InFolder(folder / "ov_shapes"), read


def shapes_test(folder):
    ov_shapes.ensure_generated(folder, counts={"train2017": 2, "val2017": 1}, workers=1)
    ov_shapes.ensure_test(folder, count=2, workers=1)
    return InFolder(folder / "ov_shapes", "manifest_test.json"), lambda: ov_shapes.ensure_test(
        folder, count=2, workers=1
    )


def tar_index(folder):
    make_shards(folder)
    TarShards(folder / "*.tar", folder / "i.safetensors")
    return InHeader(folder / "i.safetensors"), lambda: len(TarShards(folder / "*.tar", folder / "i.safetensors"))


ARTEFACTS = {
    maker.__name__: maker for maker in (region_cache, vocabulary, concept_prior, shapes, shapes_test, tar_index)
}


@pytest.fixture(scope="module", params=ARTEFACTS)
def artefact(request, tmp_path_factory):
    return ARTEFACTS[request.param](tmp_path_factory.mktemp(request.param))


def outcome(artefact, manifest):
    """Whether the file is read with that manifest; otherwise the error must name it and say what to do."""
    file, read = artefact
    file.put(manifest)
    try:
        read()
    except DataError as error:
        text = str(error)
        assert str(file.path) in text or str(file.path.parent) in text, text
        assert ": " in text and len(text) < 2000
        return False
    finally:
        file.put(file.manifest)
    return True


def test_every_value_is_changed_in_turn(artefact):
    manifest = artefact[0].manifest
    assert outcome(artefact, manifest)
    read = [outcome(artefact, changed(manifest, path, odd)) for path in places(manifest) for odd in (ABSENT, *ODD)]
    assert read.count(False) > len(read) / 5


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=8,
    ),
    st.data(),
)
@settings(max_examples=60, deadline=None)
def test_any_json_at_any_place(artefact, value, data):
    path = data.draw(st.sampled_from(list(places(artefact[0].manifest))))
    outcome(artefact, changed(artefact[0].manifest, path, value))


@pytest.mark.parametrize("name", ["vocabulary", "concept_prior", "tar_index"])
@pytest.mark.parametrize("text", ["", "[", "\x00", "[" * 100_000, "9" * 5000, "nul", '"text"', "[1]", "null"])
def test_a_header_that_is_no_manifest(name, text, tmp_path):
    from safetensors.torch import save_file

    file, read = ARTEFACTS[name](tmp_path)
    save_file(file.tensors, str(file.path), metadata={"manifest": text})
    with pytest.raises(DataError, match=str(file.path)):
        read()


@pytest.mark.parametrize("name", ["vocabulary", "concept_prior", "tar_index"])
def test_tensors_of_another_kind(name, tmp_path):
    file, read = ARTEFACTS[name](tmp_path)
    for key, value in file.tensors.items():
        kinds = [value.to(kind) for kind in (torch.bool, torch.float8_e5m2) if kind != value.dtype]
        for other in (value[:0], value[None], value.new_zeros(()), *kinds, None):
            tensors = {**file.tensors, key: other}
            write_safetensors(file.path, {k: v for k, v in tensors.items() if v is not None}, file.manifest)
            with pytest.raises(DataError, match=str(file.path)):
                read()


@pytest.mark.parametrize(
    "value, form, fault",
    [
        ({"a": 1}, {"a": int}, None),
        ({"a": True}, {"a": int}, "a is True, not a whole number"),
        ({"a": -1}, {"a": int}, "a is -1, not a whole number of at least 0"),
        ({}, {"a": int, "b": str}, "it has no a, b"),
        ({}, {"a": Optional(int)}, None),
        ({"a": None}, {"a": Optional(int)}, "a is None, not a whole"),
        ({"a": [{"b": 1}, {"b": "x"}]}, {"a": [{"b": int}]}, r"a\[1\].b is 'x', not a whole"),
        ({"a": None}, {"a": (None, [str])}, None),
        ({"a": [1]}, {"a": (None, [str])}, r"a\[0\] is 1, not a text"),
        ({"a": "\ud800"}, {"a": str}, r"a is '\\ud800', not a text"),
        ([], {"a": str}, r"it is \[\], not an object"),
        ({"x": 1}, {str: str}, "'x' is 1, not a text"),
        ({"x": "y" * 99}, {"x": bool}, "x is 'y{59}..., not true or false"),
    ],
)
def test_the_fault_names_the_place(value, form, fault):
    import re

    found = fault_of(value, form)
    assert found is None if fault is None else re.match(fault, found)
