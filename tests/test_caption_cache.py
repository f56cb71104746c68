"""The caption cache: round trip, other teachers and captions, damage; and the step that reads it."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from torch.nn import functional as F

from ovdet2.caches.caption_cache import CaptionCache, write_caption_cache
from ovdet2.config import get_cfg
from ovdet2.data.datasets.register_readers import register_captions
from ovdet2.data.readers.coco_captions import CocoCaptions
from ovdet2.data.samples import CAPTIONS, Sample
from ovdet2.data.source_spec import SourceSpec
from ovdet2.data.steps.texts import AttachTexts, ImageTexts, identity_of, open_captions
from ovdet2.errors import CacheError, UsageError
from ovdet2.programs import build_caption_cache
from ovdet2.vlm.fingerprint import Fingerprint
from ovdet2.vlm.teacher import Teacher
from ovdet2.vocabulary.tags import TagMatcher
from tests.caption_cases import COLOURS, write_coco

TEACHER = ("ovshapes-resnet", "embedded")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set of 5 images with 2 captions each, registered as test_cached_captions, and its cache."""
    folder = tmp_path_factory.mktemp("captions")
    write_coco(folder, 5)
    if "test_cached_captions" not in DatasetCatalog.list():
        register_captions("test_cached_captions", folder / "captions.json", folder / "images")
    build_caption_cache.main([
        "--dataset", "test_cached_captions", "--architecture", TEACHER[0], "--pretrained", TEACHER[1],
        "--batch-size", "3", "--output", str(folder / "cache.safetensors"),
    ])  # fmt: skip
    yield folder
    DatasetCatalog.remove("test_cached_captions")
    MetadataCatalog.remove("test_cached_captions")


@pytest.fixture
def cache(folder):
    return CaptionCache(folder / "cache.safetensors")


def reader(folder):
    return CocoCaptions(folder / "captions.json", folder / "images")


def source(*datasets):
    return SourceSpec("captions", datasets or ("test_cached_captions",), 2, CAPTIONS)


def cfg(path, architecture=TEACHER[0], pretrained=TEACHER[1]):
    result = get_cfg()
    result.DATASETS.CAPTION_CACHE = str(path)
    result.MODEL.TEACHER.ARCHITECTURE, result.MODEL.TEACHER.PRETRAINED = architecture, pretrained
    return result


def test_each_caption_has_the_embedding_of_its_text(folder, cache):
    teacher = Teacher.load(*TEACHER)
    for record in reader(folder):
        expected = teacher.encode_text(record["captions"])
        for number, row in enumerate(expected):
            assert torch.allclose(cache.embedding(record["image_id"], number, 2), row, atol=2e-3)
    assert len(cache) == 10 and cache.teacher == teacher.fingerprint


def test_it_goes_to_loading_processes(cache):
    again = pickle.loads(pickle.dumps(cache))
    assert torch.equal(again.embedding(102, 1, 2), cache.embedding(102, 1, 2))


def test_the_same_file_is_written_again(folder, tmp_path):
    write_caption_cache(tmp_path / "a", "test_cached_captions", reader(folder), Teacher.load(*TEACHER), 100)
    again, first = CaptionCache(tmp_path / "a"), CaptionCache(folder / "cache.safetensors")
    assert torch.allclose(again.embedding(104, 0, 2), first.embedding(104, 0, 2), atol=2e-3)
    assert again.manifest == first.manifest


def test_another_teacher_is_refused(cache):
    other = Fingerprint("ovshapes-vit", "embedded", "0" * 64)
    with pytest.raises(CacheError, match="Embeddings of two teachers cannot be compared"):
        cache.require_teacher(other, "the detector")
    with pytest.raises(CacheError, match="Embeddings of two teachers"):
        open_captions(cfg(cache.path, "ovshapes-vit"), source())
    with pytest.raises(CacheError, match="Embeddings of two teachers"):
        AttachTexts(cache, None).require_teacher(other, "the detector")


def test_other_captions_are_refused(folder, cache, tmp_path):
    write_coco(tmp_path, 5, captions_each=1)
    with pytest.raises(CacheError, match="holds captions of test_cached_captions from other files"):
        cache.require_source("other", reader(tmp_path).identity())
    cache.require_source("test_cached_captions", reader(folder).identity())
    with pytest.raises(CacheError, match="no caption of image 7"):
        cache.embedding(7, 0, 2)
    with pytest.raises(CacheError, match="2 captions of image 101, the data set 1"):
        cache.embedding(101, 0, 1)


@pytest.mark.parametrize("damage", ["cut", "text", "missing", "schema"])
def test_damage_is_one_sentence(folder, tmp_path, damage):
    path, content = tmp_path / "cache.safetensors", (folder / "cache.safetensors").read_bytes()
    if damage == "cut":
        path.write_bytes(content[:-10])
    elif damage == "text":
        path.write_text("captions")
    elif damage == "schema":
        path.write_bytes(content.replace(b"ovdet2/captions/1", b"ovdet2/captions/9"))
    with pytest.raises(CacheError, match="ovdet2 cache captions"):
        CaptionCache(path)


def test_keys_that_do_not_fit_are_refused(cache):
    assert open_captions(cfg(f"{cache.path}"), source()).shape == cache.shape
    with pytest.raises(UsageError, match=r"CAPTION_CACHE is empty.*ovdet2 cache captions --dataset test_cached"):
        open_captions(cfg(""), source())
    with pytest.raises(UsageError, match="a caption cache is of one data set"):
        open_captions(cfg(cache.path), source("a", "b"))
    with pytest.raises(
        CacheError, match=r"files of \['test_cached_captions'\], and the source captions needs one of other"
    ):
        open_captions(cfg(cache.path), source("other"))
    with pytest.raises(CacheError, match="needs one of test_cached_captions"):  # twice
        open_captions(cfg(f"{cache.path}, {cache.path}"), source())


def test_the_program_refuses_other_data_sets():
    with pytest.raises(UsageError, match=r"no data set of captions \(did you mean ov_shapes_captions"):
        build_caption_cache.main([
            "--dataset", "ov_shapes_caption", "--architecture", *TEACHER[:1], "--pretrained", "embedded", "--output", "x",
        ])  # fmt: skip


class TestStep:
    def sample(self, record):
        made = Sample.of(record)
        made.kind, made.source, made.image = CAPTIONS, "captions", torch.zeros(3, 40, 48, dtype=torch.uint8)
        return made

    def test_the_drawn_caption_the_tags_and_the_box(self, folder, cache):
        step, record = AttachTexts(cache, TagMatcher([(colour,) for colour in COLOURS])), reader(folder)[2]
        drawn = []
        for seed in range(8):
            np.random.seed(seed)
            made = self.sample(record)
            step(made)
            (cell,) = made.attached(ImageTexts).cells
            drawn.append([torch.equal(cell.captions[0], cache.embedding(102, n, 2)) for n in (0, 1)].index(True))
            assert cell.box_xyxy == (0, 0, 48, 40) and cell.tags == (2,)
            assert cell.image_id == identity_of("captions", 102)
        assert set(drawn) == {0, 1}

    def test_first_captions_and_labels(self, cache):
        step = AttachTexts(None, TagMatcher([("red",), ("blue",)]), all_captions=False)
        made = self.sample({"image_id": 1, "captions": ("a red square", "a blue square")})
        step(made)
        assert made.attached(ImageTexts).cells[0].tags == (0,) and not len(made.attached(ImageTexts).cells[0].captions)
        labelled = self.sample({"image_id": 1, "labels": (1,)})
        step(labelled)
        assert labelled.attached(ImageTexts).cells[0].tags == (1,)

    def test_rows_are_unit_vectors(self, cache):
        row = cache.embedding(100, 0, 2)
        assert torch.allclose(F.normalize(row, dim=0), row, atol=1e-6) and row.dtype == torch.float32


def test_a_reader_of_ids_in_any_order(tmp_path):
    """Rows are found by image id, not by position."""

    class Teacherlike:
        fingerprint, embed_dim, mean = Fingerprint("a", "b", "0" * 64), 2, torch.zeros(1)

        def tokenizer(self, texts):
            return torch.tensor([[float(text), 1.0] for text in texts])

        clip = SimpleNamespace(encode_text=lambda rows: rows)

    class Reader:
        num_texts = 3

        def __iter__(self):
            return iter([{"image_id": 9, "captions": ("1",)}, {"image_id": 4, "captions": ("2", "3")}])

        def texts(self):
            return iter(["1", "2", "3"])

        def identity(self):
            return {}

    write_caption_cache(tmp_path / "c", "x", Reader(), Teacherlike())
    cache = CaptionCache(tmp_path / "c")
    expected = F.normalize(torch.tensor([[1.0, 1.0], [2.0, 1.0], [3.0, 1.0]]), dim=1)
    found = [cache.embedding(9, 0, 1), cache.embedding(4, 0, 2), cache.embedding(4, 1, 2)]
    assert torch.allclose(torch.stack(found), expected, atol=1e-3)
