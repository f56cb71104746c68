"""Captioned sources, the text table and the order of samples."""

import itertools
import json
import pickle

import clim_cases as cases
import numpy as np
import pytest
import torch
from clim import tar_shards, text_table
from clim.loading import CaptionMapper, build_loader
from clim.sources import CocoCaptions, TsvCaptions, build_source
from clim.tar_shards import ShuffleBuffer, TarShards
from clim.text_table import TextTable, build_text_table

from ovdet2.errors import DataError, UsageError
from ovdet2.io.files import write_json
from ovdet2.ov_shapes.world.captions import caption_pair


class NoTable:
    """A text table that gives its row number."""

    def __getitem__(self, row):
        return torch.tensor([float(row)])


def make_tsv(folder, count=4, extra=()):
    cases.write_coco(folder, count)
    lines = [f"{cases.caption_of(i)}\t{i}.png\n".encode() for i in range(count)]
    (folder / "pairs.tsv").write_bytes(b"".join([*lines, *extra]))
    return folder / "pairs.tsv", folder / "images"


def make_shards(folder, per_shard=(3, 4), extra=()):
    number, paths = 0, []
    for shard, count in enumerate(per_shard):
        samples = []
        for _ in range(count):
            image = (f"d/{number:05d}.png", cases.png_of(number))
            text = cases.caption_of(number)
            as_json = (f"d/{number:05d}.json", json.dumps({"caption": text, "url": "x"}).encode())
            samples += [as_json, image] if number % 2 else [image, (f"d/{number:05d}.txt", f"{text}\n".encode())]
            number += 1
        paths.append(folder / f"{shard:03d}.tar")
        cases.write_shard(paths[-1], [*samples, *(extra if shard == 0 else ())])
    return folder / "*.tar", folder / "index.safetensors"


@pytest.fixture(params=["coco", "tsv", "tar"])
def source(request, tmp_path):
    if request.param == "coco":
        cases.write_coco(tmp_path, 7)
        return CocoCaptions(tmp_path / "captions.json", tmp_path / "images")
    if request.param == "tsv":
        return TsvCaptions(*make_tsv(tmp_path, 7))
    return TarShards(*make_shards(tmp_path))


def test_images_and_captions_belong_together(source):
    texts = list(source.texts())
    assert len(source) == 7 and source.num_texts == len(texts)
    rows = []
    for index in range(7):
        record = source[index]
        assert np.array_equal(source.read(record), cases.image_of(index))
        own = range(record["first"], record["first"] + record["captions"])
        assert all(texts[row].startswith(cases.caption_of(index)) for row in own)
        rows += own
    assert rows == list(range(len(texts)))
    again = pickle.loads(pickle.dumps(source))
    assert again[6] == source[6] and again.identity() == source.identity()


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


def test_faulty_captions_of_coco(tmp_path):
    data = cases.write_coco(tmp_path, 3, captions_each=1)
    data["annotations"][1]["caption"] = "  "
    write_json(tmp_path / "captions.json", data)
    with pytest.raises(DataError, match="2 faulty.*annotation 1 of image 101 has an empty.*image 101 .1.png. has no"):
        CocoCaptions(tmp_path / "captions.json", tmp_path / "images", max_bad=1)
    found = CocoCaptions(tmp_path / "captions.json", tmp_path / "images", max_bad=2)
    assert [record["image_id"] for record in found] == [100, 102] and found[1]["first"] == 1
    data["annotations"][0]["image_id"] = 5
    write_json(tmp_path / "captions.json", data)
    with pytest.raises(DataError, match="image 5, which it does not list"):
        CocoCaptions(tmp_path / "captions.json", tmp_path / "images", max_bad=9)
    write_json(tmp_path / "captions.json", {"images": []})
    with pytest.raises(DataError, match="no COCO-captions json"):
        CocoCaptions(tmp_path / "captions.json", tmp_path / "images")
    write_json(tmp_path / "captions.json", {"images": [], "annotations": []})
    with pytest.raises(DataError, match="no image with a caption"):
        CocoCaptions(tmp_path / "captions.json", tmp_path / "images")


@pytest.mark.parametrize(
    "line, reason",
    [
        (b"\t1.png\n", "empty caption"),
        (b"words\t \n", "empty path"),
        (b"words\n", "1 fields"),
        (b"\xff\t1.png\n", "no UTF-8"),
        (b"words\thttps://a.b/1.png\n", "URL instead of the path"),
        (b"\n", "1 fields"),
    ],
)
def test_faulty_lines_of_tsv(tmp_path, line, reason):
    path, folder = make_tsv(tmp_path, 2, [line, b"last\t0.png"])
    with pytest.raises(DataError, match=f"line 3.*{reason}"):
        TsvCaptions(path, folder)
    found = TsvCaptions(path, folder, max_bad=1)
    assert len(found) == 3 and list(found.texts())[2] == "last"


def test_faulty_samples_of_shards(tmp_path):
    extra = [("d/a.jpg", b"x"), ("d/b.txt", b"words"), ("d/c.png", b"x"), ("d/c.txt", b" "), ("d/d.png", b"x")]
    pattern, index = make_shards(tmp_path, extra=[*extra, ("d/d.json", b"[1")])
    with pytest.raises(DataError, match="4 faulty.*'d/a'.*no caption.*'d/b'.*no image.*'d/c'.*empty"):
        TarShards(pattern, index, max_bad=3)
    assert len(TarShards(pattern, index, max_bad=4)) == 7
    with pytest.raises(DataError, match="no file matches"):
        TarShards(tmp_path / "*.gz", index)
    whole = (tmp_path / "000.tar").read_bytes()
    (tmp_path / "000.tar").write_bytes(whole[:700])
    with pytest.raises(DataError, match="000.tar is (truncated|no whole)"):
        TarShards(pattern, index, max_bad=4)


def test_the_index_is_made_once(tmp_path, monkeypatch):
    pattern, index = make_shards(tmp_path)
    texts = list(TarShards(pattern, index).texts())
    monkeypatch.setattr(tar_shards, "_samples", lambda path: pytest.fail("the shards were read again"))
    assert list(TarShards(pattern, index).texts()) == texts
    monkeypatch.undo()
    make_shards(tmp_path, per_shard=(4, 4))
    assert len(TarShards(pattern, index)) == 8


def test_shuffle_buffer_splits_every_epoch_over_the_processes(monkeypatch):
    shard = np.repeat([0, 1, 2], [5, 9, 3])

    def draws(rank, world, size=4, epochs=2, seed=3):
        monkeypatch.setattr(tar_shards.comm, "get_rank", lambda: rank)
        monkeypatch.setattr(tar_shards.comm, "get_world_size", lambda: world)
        count = len(range(rank, 17 * epochs, world))
        return list(itertools.islice(iter(ShuffleBuffer(shard, size, seed)), count))

    whole = draws(0, 1)
    assert sorted(whole[:17]) == sorted(whole[17:]) == list(range(17)) and whole[:17] != whole[17:]
    assert draws(0, 2) == whole[::2] and draws(1, 2) == whole[1::2]
    assert draws(0, 1, seed=4) != whole
    unmixed = shard[draws(0, 1, size=1)[:17]]  # a buffer of one: shards in another order, each from front to back
    assert sorted(np.flatnonzero(np.diff(unmixed)) + 1) in ([3, 8], [3, 12], [5, 8], [5, 14], [9, 12], [9, 14])


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
    with pytest.raises(DataError, match="no whole text table.*CLIM.TEXT_TABLE"):
        TextTable(path, source, teacher.fingerprint)
    build_text_table(path, source, teacher)
    with pytest.raises(DataError, match="text table.*clim-vit / test.*the model.*clim-vit-wide"):
        TextTable(path, source, cases.teacher_of("clim-vit-wide").fingerprint)
    cases.write_coco(tmp_path / "other", 12, captions_each=1)
    other = CocoCaptions(tmp_path / "other" / "captions.json", tmp_path / "other" / "images")
    with pytest.raises(DataError, match="24 captions of another source.*its 12"):
        TextTable(path, other, teacher.fingerprint)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match="no whole text table"):
        TextTable(path, source, teacher.fingerprint)


def test_captions_are_cut_at_the_context(tmp_path, models):
    cases.write_coco(tmp_path, 1, captions_each=1)
    data = json.loads((tmp_path / "captions.json").read_text())
    data["annotations"][0]["caption"] = "very " * 40
    write_json(tmp_path / "captions.json", data)
    source = CocoCaptions(tmp_path / "captions.json", tmp_path / "images")
    build_text_table(tmp_path / "t.safetensors", source, cases.teacher_of("clim-vit"))
    assert (
        text_table.TextTable(tmp_path / "t.safetensors", source, cases.teacher_of("clim-vit").fingerprint).shape[0] == 1
    )


def test_unreadable_images_are_replaced_and_counted(tmp_path, weights, models):
    cases.write_coco(tmp_path, 8)
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
    with pytest.raises(DataError, match="set CLIM.CAPTIONS to a COCO-captions json"):
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
    assert len(larger) == 4 and larger[2] == source[2] | {"first": 6, "captions": 3}
    texts = list(larger.texts())
    assert texts[:9:3] == list(source.texts()) and len(set(texts)) > 8
    for record, (_, _, scene) in zip(larger, pairs):
        own = texts[record["first"] : record["first"] + 3]
        assert all(placed.shape in text for placed in scene.objects for text in own)
