"""Captioned sources, the text table and the order of samples."""

import itertools
import json
import pickle

import clim_cases as cases
import numpy as np
import pytest
import torch
from clim import text_table
from clim.loading import CaptionMapper, build_loader
from clim.sources import build_source
from clim.text_table import TextTable, build_text_table

from ovdet2.data.readers.coco_captions import CocoCaptions
from ovdet2.data.readers.tar_shards import TarShards
from ovdet2.data.readers.tsv_captions import TsvCaptions
from ovdet2.errors import DataError, UsageError
from ovdet2.io.files import write_json
from ovdet2.ov_shapes.world.captions import caption_pair
from tests.caption_cases import make_shards, make_tsv, write_coco


class NoTable:
    """A text table that gives its row number."""

    def __getitem__(self, row):
        return torch.tensor([float(row)])


@pytest.fixture(params=["coco", "tsv", "tar"])
def source(request, tmp_path):
    if request.param == "coco":
        write_coco(tmp_path, 7)
        return CocoCaptions(tmp_path / "captions.json", tmp_path / "images")
    if request.param == "tsv":
        return TsvCaptions(*make_tsv(tmp_path, 7))
    return TarShards(*make_shards(tmp_path))


def test_a_random_caption_and_crop_by_the_global_generators(source):
    mapper = CaptionMapper(source, NoTable(), 16, "bicubic", (0.3, 1.0), 0.5)

    def pairs(seed):
        torch.manual_seed(seed)
        np.random.seed(seed)
        return [mapper(source[index]) for index in range(7)]

    for one, other in zip(pairs(0), pairs(0)):
        assert one["image"].shape == (3, 16, 16) and one["image"].dtype == np.uint8
        assert np.array_equal(one["image"], other["image"]) and one["text"] == other["text"]
    assert any(not np.array_equal(a["image"], b["image"]) for a, b in zip(pairs(0), pairs(1)))
    if isinstance(source, CocoCaptions):
        assert {pairs(seed)[3]["text"].item() for seed in range(20)} == {6.0, 7.0}


def test_text_table(source, tmp_path, models):
    teacher = cases.teacher_of("clim-vit")
    path = tmp_path / "captions.safetensors"
    build_text_table(path, source, teacher, batch_size=3)
    table = TextTable(path, source, teacher.fingerprint)
    texts = list(source.texts())
    expected = teacher.encode_text(texts)
    for again in (table, pickle.loads(pickle.dumps(table))):
        found = torch.stack([again[row] for row in range(len(texts))])
        assert (found - expected).abs().max() < 1e-3 and torch.allclose(found.norm(dim=1), torch.ones(len(texts)))


def test_text_table_of_something_else(tmp_path, captioned, models):
    teacher, source = cases.teacher_of("clim-vit"), CocoCaptions(captioned / "captions.json", captioned / "images")
    path = tmp_path / "captions.safetensors"
    with pytest.raises(DataError, match="no complete text table.*CLIM.TEXT_TABLE"):
        TextTable(path, source, teacher.fingerprint)
    build_text_table(path, source, teacher)
    with pytest.raises(DataError, match="text table.*clim-vit / test.*the model.*clim-vit-wide"):
        TextTable(path, source, cases.teacher_of("clim-vit-wide").fingerprint)
    write_coco(tmp_path / "other", 12, captions_each=1)
    other = CocoCaptions(tmp_path / "other" / "captions.json", tmp_path / "other" / "images")
    with pytest.raises(DataError, match="24 captions of another source.*its 12"):
        TextTable(path, other, teacher.fingerprint)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match="no complete text table"):
        TextTable(path, source, teacher.fingerprint)


def test_captions_are_cut_at_the_context(tmp_path, models):
    write_coco(tmp_path, 1, captions_each=1)
    data = json.loads((tmp_path / "captions.json").read_text())
    data["annotations"][0]["caption"] = "very " * 40
    write_json(tmp_path / "captions.json", data)
    source = CocoCaptions(tmp_path / "captions.json", tmp_path / "images")
    build_text_table(tmp_path / "t.safetensors", source, cases.teacher_of("clim-vit"))
    assert (
        text_table.TextTable(tmp_path / "t.safetensors", source, cases.teacher_of("clim-vit").fingerprint).shape[0] == 1
    )


def test_unreadable_images_are_replaced_and_counted(tmp_path, weights, models):
    write_coco(tmp_path, 8)
    (tmp_path / "images" / "2.png").write_bytes(b"no image")
    (tmp_path / "images" / "5.png").unlink()
    teacher = cases.teacher_of("clim-vit")

    def batches(max_bad):
        cfg = cases.config(tmp_path, weights, tmp_path, "DATALOADER.MAX_BAD_IMAGES", max_bad)
        loader = build_loader(cfg, build_source(cfg), NoTable(), teacher)
        return [record["image_id"] for batch in itertools.islice(loader, 3) for record in batch]

    found = batches(2)
    assert len(found) == 21 and not {102, 105} & set(found)
    with pytest.raises(DataError, match="(?s)2 of 8 training images.*MAX_BAD_IMAGES is 1"):
        batches(1)


def test_wrong_settings(tmp_path, weights):
    with pytest.raises(UsageError, match="'parquet': choose one of coco, tsv"):
        build_source(cases.config(tmp_path, weights, tmp_path, "CLIM.SOURCE", "parquet"))
    with pytest.raises(UsageError, match="CLIM.CAPTIONS is empty"):
        build_source(cases.config(tmp_path, weights, tmp_path, "CLIM.CAPTIONS", ""))
    with pytest.raises(DataError, match="captions.json does not exist: give a COCO-captions json"):
        build_source(cases.config(tmp_path, weights, tmp_path))


def test_captions_of_ov_shapes(tmp_path, weights, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))

    def source_of(pairs, each):
        return build_source(cases.config(tmp_path, weights, tmp_path, "CLIM.SOURCE", "ov_shapes", "CLIM.PAIRS", pairs,
                                         "CLIM.CAPTIONS_EACH", each))  # fmt: skip

    source, pairs = source_of(3, 1), [caption_pair(0, index) for index in range(3)]
    assert list(source.texts()) == [caption for _, caption, _ in pairs]
    for record, (image, _, _) in zip(source, pairs):
        assert np.abs(source.read(record).astype(int) - image).mean() < 6  # JPEG
    larger = source_of(4, 3)
    assert len(larger) == 4 and larger[2] == source[2] | {"first_text": 6, "captions": tuple(larger.texts())[6:9]}
    texts = list(larger.texts())
    assert texts[:9:3] == list(source.texts()) and len(set(texts)) > 8
    for record, (_, _, scene) in zip(larger, pairs):
        own = record["captions"]
        assert all(placed.shape in text for placed in scene.objects for text in own)
