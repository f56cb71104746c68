"""Readers of captioned images, and the order of samples in shards."""

import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ovdet2.data.readers import shuffle_buffer, tar_shards
from ovdet2.data.readers.coco_captions import CocoCaptions
from ovdet2.data.readers.packed import PackedStrings
from ovdet2.data.readers.shuffle_buffer import ShuffleBuffer
from ovdet2.data.readers.tar_shards import TarShards, default_index
from ovdet2.data.readers.tsv_captions import TsvCaptions
from ovdet2.data.samples import CAPTIONS
from ovdet2.errors import DataError, SetupError
from ovdet2.io.files import write_json
from ovdet2.io.images import read_image
from ovdet2.io.members import member_address, open_member
from tests.caption_cases import caption_of, image_of, make_shards, make_tsv, write_coco


@pytest.fixture(params=["coco", "tsv", "tar"])
def source(request, tmp_path):
    if request.param == "coco":
        write_coco(tmp_path, 7)
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
        assert np.array_equal(source.read(record), image_of(index))
        own = range(record["first_text"], record["first_text"] + len(record["captions"]))
        assert tuple(texts[row] for row in own) == record["captions"]
        assert all(text.startswith(caption_of(index)) for text in record["captions"])
        rows += own
    assert rows == list(range(len(texts)))
    again = pickle.loads(pickle.dumps(source))
    assert again[6] == source[6] and again.identity() == source.identity()


def test_faulty_captions_of_coco(tmp_path):
    data = write_coco(tmp_path, 3, captions_each=1)
    data["annotations"][1]["caption"] = "  "
    write_json(tmp_path / "captions.json", data)
    with pytest.raises(DataError, match="2 faulty.*annotation 1 of image 101 has an empty.*image 101 .1.png. has no"):
        CocoCaptions(tmp_path / "captions.json", tmp_path / "images", max_bad=1)
    found = CocoCaptions(tmp_path / "captions.json", tmp_path / "images", max_bad=2)
    assert [record["image_id"] for record in found] == [100, 102] and found[1]["first_text"] == 1
    data["annotations"][0]["image_id"] = 5
    write_json(tmp_path / "captions.json", data)
    with pytest.raises(DataError, match="image 5, which is not in its images"):
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
    with pytest.raises(DataError, match="000.tar is (truncated|no complete)"):
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
        monkeypatch.setattr(shuffle_buffer.comm, "get_rank", lambda: rank)
        monkeypatch.setattr(shuffle_buffer.comm, "get_world_size", lambda: world)
        count = len(range(rank, 17 * epochs, world))
        return list(itertools.islice(iter(ShuffleBuffer(shard, size, seed)), count))

    whole = draws(0, 1)
    assert sorted(whole[:17]) == sorted(whole[17:]) == list(range(17)) and whole[:17] != whole[17:]
    assert draws(0, 2) == whole[::2] and draws(1, 2) == whole[1::2]
    assert draws(0, 1, seed=4) != whole
    unmixed = shard[draws(0, 1, size=1)[:17]]  # a buffer of one: shards in another order, each from front to back
    assert sorted(np.flatnonzero(np.diff(unmixed)) + 1) in ([3, 8], [3, 12], [5, 8], [5, 14], [9, 12], [9, 14])


@settings(deadline=None)
@given(st.lists(st.text(st.characters(codec=None))))
def test_packed_strings_are_the_strings(strings):
    packed = PackedStrings(iter(strings))
    assert list(packed) == strings and [packed[index] for index in range(-len(strings), 0)] == strings
    assert list(pickle.loads(pickle.dumps(packed))) == strings
    with pytest.raises(IndexError):
        packed[len(strings)]


def test_a_reader_is_a_sequence_of_records(source):
    assert source.kind == CAPTIONS and len(list(source)) == 7
    assert source[-1] == source[6] and source[np.int64(2)] == source[2]
    assert [record["image_id"] for record in source] == [source[index]["image_id"] for index in range(7)]
    with pytest.raises(IndexError):
        source[7]


def test_a_file_name_is_enough_to_read_an_image(source):
    for index, record in enumerate(source):
        assert np.array_equal(read_image(record["file_name"]), image_of(index))
        assert np.array_equal(read_image(record["file_name"], "BGR"), source.read(record, "BGR"))


def test_records_stay_small_in_memory(tmp_path):
    """No Python object per image: what a reader holds are arrays."""
    write_coco(tmp_path, 3)
    readers = [CocoCaptions(tmp_path / "captions.json", tmp_path / "images"), TsvCaptions(*make_tsv(tmp_path, 3))]
    for reader in (*readers, TarShards(*make_shards(tmp_path))):
        for value in vars(reader).values():
            assert isinstance(value, (np.ndarray, PackedStrings)) or len(pickle.dumps(value)) < 1000


def test_sizes_that_a_json_states(tmp_path):
    data = write_coco(tmp_path, 3)
    data["images"][0] |= {"height": 40, "width": 48}
    data["images"][1] |= {"height": 40}
    write_json(tmp_path / "captions.json", data)
    found = CocoCaptions(tmp_path / "captions.json", tmp_path / "images")
    assert (found[0]["height"], found[0]["width"]) == (40, 48)
    assert not {"height", "width"} & {*found[1], *found[2]}


@pytest.mark.parametrize("wrong, named", [({"id": 101}, "twice, id 101"), ({"id": "7"}, "no integer"), ({"id": 2**70}, "no integer"), ({"file_name": 3}, "no text")])  # fmt: skip
def test_images_of_a_captions_json_that_cannot_be_told_apart(tmp_path, wrong, named):
    data = write_coco(tmp_path, 3)
    data["images"][0] |= wrong
    write_json(tmp_path / "captions.json", data)
    with pytest.raises(DataError, match=f"captions.json.*{named}"):
        CocoCaptions(tmp_path / "captions.json", tmp_path / "images")


@pytest.mark.parametrize("reader", [CocoCaptions, TsvCaptions])
def test_missing_captions(tmp_path, reader):
    with pytest.raises(DataError, match="gone.* give a"):
        reader(tmp_path / "gone", tmp_path)


def test_the_index_lies_beside_the_shards(tmp_path, monkeypatch):
    pattern, _ = make_shards(tmp_path)
    assert len(TarShards(pattern)) == 7 and default_index(pattern).parent == tmp_path
    assert default_index(pattern).is_file() and default_index(tmp_path / "a*" / "*.tar").parent == tmp_path
    assert len({default_index(tmp_path / part) for part in ("*.tar", "a*.tar", "a*/*.tar")}) == 3
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match="the folder .*file cannot be made .*: choose another one"):
        TarShards(pattern, tmp_path / "file" / "index.safetensors")


def test_an_index_that_clim_wrote_is_read(tmp_path):
    pattern, index = make_shards(tmp_path)
    TarShards(pattern, index)
    assert tar_shards.read_safetensors(index, "ovdet2/clim-shards/1")[1]["identity"]["kind"] == "tar"


def test_members_of_tar_files(tmp_path):
    pattern, index = make_shards(tmp_path, per_shard=(2,))
    record = TarShards(pattern, index)[1]
    assert record["file_name"].startswith(f"{tmp_path / '000.tar'}#1@")
    (tmp_path / "000.tar").write_bytes((tmp_path / "000.tar").read_bytes()[:600])
    with pytest.raises(DataError, match="000.tar#1@.*ends before"):
        read_image(record["file_name"])
    (tmp_path / "000.tar").unlink()
    with pytest.raises(DataError, match="shard of .*000.tar#1@.*cannot be read"):
        read_image(record["file_name"])
    image = tmp_path / "a.tar#1@2+3"  # a file of that name is a file
    Image.fromarray(image_of(1)).save(image, format="PNG")
    assert np.array_equal(read_image(image), image_of(1))


def test_only_addresses_are_members(tmp_path):
    assert member_address("x/0.tar", 3, 512, 20) == "x/0.tar#3@512+20"
    for name in ("0.tar", "a#1.jpg", "a#1@2.jpg", "a#1@2+3.jpg", tmp_path):
        assert open_member(name) is None


def test_unreadable_members_are_named(tmp_path):
    pattern, index = make_shards(tmp_path, extra=[("d/x.png", b"nothing"), ("d/x.txt", b"words")])
    found = TarShards(pattern, index)
    with pytest.raises(DataError, match="000.tar#3@.* is not an image"):
        read_image(found[3]["file_name"])
