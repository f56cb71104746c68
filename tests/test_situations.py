"""Things that people do with files of other programs, each of which ends with the right result or one sentence."""

import gzip
import json
import uuid
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from ovdet2.data.datasets import register_ov_dataset
from ovdet2.errors import DataError, UsageError
from ovdet2.io.images import read_image
from ovdet2.io.weights import read_weights
from ovdet2.programs.predict import find_images
from ovdet2.vlm.teacher import Teacher
from ovdet2.vocabulary import Vocabulary, read_words
from tests import micro

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 170498071\n"
CATEGORIES = [{"id": 1, "name": "plum"}]
IMAGE = {"id": 1, "file_name": "a.png", "width": 40, "height": 30}
BOX = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0}
TRUTH = {"images": [IMAGE], "annotations": [BOX], "categories": CATEGORIES}


@pytest.fixture
def load(tmp_path):
    """Loads a data set of the bytes of its json."""
    names = []

    def load(content):
        path = tmp_path / "train.json"
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
        names.append(f"situation_{uuid.uuid4().hex}")
        register_ov_dataset(names[-1], path, tmp_path, ["plum"])
        return DatasetCatalog.get(names[-1])

    yield load
    for name in names:
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)


class TestData:
    """Kind A."""

    def test_a_good_file_loads(self, load):
        assert len(load(TRUTH)) == 1

    @pytest.mark.parametrize(
        "content",
        [
            gzip.compress(json.dumps(TRUTH).encode()),
            POINTER.encode(),
            json.dumps(TRUTH).encode() * 2,
            json.dumps(TRUTH).encode("utf-16"),
            b"",
        ],
        ids=["compressed", "a pointer of git lfs", "two files in one", "UTF-16", "an empty download"],
    )
    def test_annotations_that_are_no_json(self, load, content):
        with pytest.raises(DataError, match=r"train\.json is not valid JSON"):
            load(content)

    def test_results_instead_of_annotations(self, load):
        with pytest.raises(DataError, match=r"train\.json"):
            load([{"image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], "score": 0.9}])

    def test_captions_instead_of_boxes(self, load):
        captions = [{"id": 1, "image_id": 1, "caption": "a plum on a table"}]
        with pytest.raises(DataError, match=r"train\.json"):
            load(TRUTH | {"annotations": captions})

    def test_lines_of_json(self, load):
        lines = "\n".join(json.dumps(row) for row in (IMAGE, BOX))
        with pytest.raises(DataError, match=r"train\.json is not valid JSON"):
            load(lines.encode())


class TestImages:
    """Kind B."""

    @pytest.mark.parametrize(
        "content",
        [POINTER.encode(), b"", b"<!DOCTYPE html><title>404</title>", b"\0" * 4096, b"%PDF-1.7\n"],
        ids=["a pointer of git lfs", "an empty download", "a web page", "zeros of a full disk", "a PDF"],
    )
    def test_files_with_the_name_of_an_image(self, content, tmp_path):
        (tmp_path / "photo.jpg").write_bytes(content)
        with pytest.raises(DataError, match=r"photo\.jpg"):
            read_image(tmp_path / "photo.jpg")

    def test_side_files_of_other_systems(self, tmp_path, capsys):
        for name in ("a.jpg", "._a.jpg", "__MACOSX/._a.jpg", ".thumbnails/a.jpg", "sub/b.png"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        assert [path.name for path in find_images([str(tmp_path)])] == ["a.jpg", "b.png"]
        assert capsys.readouterr().out == "not read, since they are no images: 3 hidden\n"
        assert [path.name for path in find_images([str(tmp_path / "._a.jpg")])] == ["._a.jpg"]  # named by the user

    def test_a_hidden_folder_that_is_given_is_read(self, tmp_path):
        (tmp_path / ".cache").mkdir()
        (tmp_path / ".cache" / "a.jpg").touch()
        assert [path.name for path in find_images([str(tmp_path / ".cache")])] == ["a.jpg"]

    def test_a_folder_with_the_name_of_an_image(self, tmp_path):
        (tmp_path / "photos.jpg").mkdir()
        (tmp_path / "photos.jpg" / "a.png").touch()
        assert [path.name for path in find_images([str(tmp_path)])] == ["a.png"]
        with pytest.raises(DataError, match=r"photos\.jpg"):
            read_image(tmp_path / "photos.jpg")


class TestVocabularyAndWeights:
    """Kind C."""

    @pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors", ".pkl"])
    def test_weights_that_are_a_pointer_of_git_lfs(self, suffix, tmp_path):
        path = tmp_path / f"weights{suffix}"
        path.write_text(POINTER)
        with pytest.raises(DataError, match=path.name):
            read_weights(path)
        with pytest.raises(DataError, match=path.name):
            Teacher.load("ViT-B-32", path)

    @pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
    def test_words_of_another_encoding(self, encoding, tmp_path):
        path = tmp_path / "words.txt"
        path.write_text("caf\u00e9\nplum\n", encoding=encoding)
        with pytest.raises(DataError, match=r"words\.txt.*UTF-8"):
            read_words(path)

    def test_weights_instead_of_a_vocabulary(self, tmp_path, micro_clip_weights):
        with pytest.raises(DataError, match="schema None"):
            Vocabulary.load(micro_clip_weights)
        torch.save({"model": {}}, tmp_path / "model.pth")
        with pytest.raises(DataError, match=r"model\.pth"):
            Vocabulary.load(tmp_path / "model.pth")

    def test_a_vocabulary_instead_of_a_teacher(self, tmp_path):
        micro.vocabulary().save(tmp_path / "v.safetensors")
        with pytest.raises((DataError, UsageError), match=r"v\.safetensors"):
            Teacher.load("ViT-B-32", tmp_path / "v.safetensors")

    def test_a_folder_instead_of_words(self, tmp_path):
        with pytest.raises((DataError, UsageError), match=Path(tmp_path).name):
            read_words(tmp_path)
