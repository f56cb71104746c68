"""Readers of images with labels: of a json, and of folders."""

import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ovdet2.data.datasets.coco_json import Split
from ovdet2.data.readers.image_labels import CocoImageLabels, FolderImageLabels, read_mapping
from ovdet2.data.readers.packed import PackedStrings
from ovdet2.data.samples import IMAGE_LABELS
from ovdet2.errors import DataError
from ovdet2.io.files import write_json
from tests.caption_cases import image_of

SPLIT = Split("fruit", base=((9, "pear"), (4, "apple")), novel=((2, "quince"),))
CATEGORIES = [{"id": 2, "name": "quince"}, {"id": 4, "name": "apple"}, {"id": 9, "name": "pear"}]


def labelled(count=3, **further):
    """A json of images 10, 11, ... whose labels are the apple, the pear, both, and so on."""
    labels = ([4], [9], [9, 4])
    return {
        "images": [
            {"id": 10 + index, "file_name": f"{index}.png", "pos_category_ids": labels[index % 3]}
            for index in range(count)
        ],
        "categories": CATEGORIES,
        **further,
    }


def of_json(folder, data, **options):
    write_json(folder / "labels.json", data)
    return CocoImageLabels(folder / "labels.json", folder, SPLIT, **options)


def test_labels_of_a_json(tmp_path):
    Image.fromarray(image_of(1)).save(tmp_path / "1.png")
    data = labelled()
    data["images"][2] |= {"height": 40, "width": 48}
    found = of_json(tmp_path, data)
    assert found.kind == IMAGE_LABELS and len(found) == 3
    assert [record["labels"] for record in found] == [(1,), (0,), (0, 1)]
    assert found[1] == {"file_name": str(tmp_path / "1.png"), "image_id": 11, "labels": (0,)}
    assert (found[2]["height"], found[2]["width"]) == (40, 48)
    assert np.array_equal(found.read(found[1]), image_of(1))
    assert found.image_counts().tolist() == [2, 2, 0]
    assert pickle.loads(pickle.dumps(found))[2] == found[2]


def test_labels_of_annotations_without_boxes(tmp_path):
    data = labelled(3, annotations=[{"image_id": 11, "category_id": 4}, {"image_id": 11, "category_id": 4}])
    for image in data["images"][1:]:
        del image["pos_category_ids"]
    data["annotations"].append({"image_id": 12, "category_id": 9})
    assert [record["labels"] for record in of_json(tmp_path, data)] == [(1,), (1,), (0,)]


@settings(deadline=None)
@given(data=st.data())
def test_labels_are_those_stated(data, tmp_path_factory):
    """Of any order of images, ids and forms: each image has the set of its labels, in contiguous ids."""
    ids = data.draw(st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=6, unique=True))
    stated = [data.draw(st.lists(st.sampled_from([2, 4, 9]), min_size=1, max_size=4)) for _ in ids]
    in_image = [data.draw(st.booleans()) for _ in ids]
    images, annotations = [], []
    for image_id, labels, inside in zip(ids, stated, in_image):
        images.append(
            {"id": image_id, "file_name": f"{image_id}.jpg"} | ({"pos_category_ids": labels} if inside else {})
        )
        annotations += [] if inside else [{"image_id": image_id, "category_id": label} for label in labels]
    content = {"images": images, "annotations": data.draw(st.permutations(annotations)), "categories": CATEGORIES}
    found = of_json(tmp_path_factory.mktemp("labels"), content, novel_labels=True)
    assert [record["image_id"] for record in found] == ids
    for record, labels in zip(found, stated):
        assert record["labels"] == tuple(sorted({SPLIT.id_to_contiguous[label] for label in labels}))
    assert found.image_counts().sum() == sum(len(record["labels"]) for record in found)


def test_images_without_a_label(tmp_path):
    data = labelled()
    data["images"][1]["pos_category_ids"] = []
    with pytest.raises(DataError, match="labels.json has 1 faulty.*image 11 has no label.*Give each image a label"):
        of_json(tmp_path, data)
    found = of_json(tmp_path, data, max_bad=1)
    assert [(record["image_id"], record["labels"]) for record in found] == [(10, (1,)), (12, (0, 1))]
    with pytest.raises(DataError, match="no image with a label"):
        of_json(tmp_path, {"images": [], "categories": CATEGORIES})


@pytest.mark.parametrize(
    "wrong, named",
    [
        ({"id": 11}, "1 images are listed twice, id 11"),
        ({"id": None}, "no integer id"),
        ({"id": 2**64}, "no integer id"),
        ({"file_name": None}, "no file_name or one outside.*10"),
        ({"file_name": "../0.png"}, "outside of the image folder.*10"),
        ({"pos_category_ids": [4, 5]}, "1 labels of classes outside of the split fruit, category id 5"),
        ({"pos_category_ids": 4}, "pos_category_ids of the image 10"),
        ({"pos_category_ids": [2]}, "1 labels of novel classes of fruit.*images 10.*novel_labels: True"),
    ],
)
def test_faulty_images(tmp_path, wrong, named):
    data = labelled()
    data["images"][0] |= wrong
    with pytest.raises(DataError, match=f"labels.json.*{named}"):
        of_json(tmp_path, data)


def test_novel_labels_that_are_meant(tmp_path):
    data = labelled()
    data["images"][0]["pos_category_ids"] = [2, 4]
    assert of_json(tmp_path, data, novel_labels=True)[0]["labels"] == (1, 2)


@pytest.mark.parametrize(
    "wrong, named",
    [
        ({"annotations": [{"image_id": 5, "category_id": 4}]}, "images that are not in its images, image id 5"),
        ({"annotations": [{"image_id": 10}]}, "outside of the split"),
        ({"annotations": [3]}, "no list 'annotations'"),
        ({"categories": [{"id": 4, "name": "plum"}]}, "1 categories are not named.*4 .'plum' for 'apple'"),
        ({"categories": 3}, "no list 'categories'"),
        ({"images": {}}, "no list 'images'"),
    ],
)
def test_faulty_jsons(tmp_path, wrong, named):
    with pytest.raises(DataError, match=f"labels.json.*{named}"):
        of_json(tmp_path, labelled() | wrong)


def test_lvis_names_its_images_by_their_address(tmp_path):
    data = labelled(1)
    data["images"][0] = {"id": 1, "coco_url": "http://a.b/val2017/0.jpg", "pos_category_ids": [4]}
    assert of_json(tmp_path, data)[0]["file_name"] == str(tmp_path / "val2017" / "0.jpg")


def tree(folder, **counts):
    for name, count in counts.items():
        (folder / name).mkdir()
        for index in range(count):
            Image.fromarray(image_of(index)).save(folder / name / f"{name}_{index}.png")
        (folder / name / "notes.txt").write_text("no image")
    return folder


def test_folders_named_as_classes_or_by_their_ids(tmp_path):
    found = FolderImageLabels(tree(tmp_path, pear=2, **{"4": 3}), SPLIT)
    assert [record["labels"] for record in found] == [(1,)] * 3 + [(0,)] * 2
    assert [record["image_id"] for record in found] == list(range(5))
    assert found[3]["file_name"] == str(tmp_path / "pear" / "pear_0.png")
    assert np.array_equal(found.read(found[4]), image_of(1))
    assert found.image_counts().tolist() == [2, 3, 0]
    assert pickle.loads(pickle.dumps(found))[4] == found[-1]


def test_folders_by_a_mapping(tmp_path):
    tree(tmp_path, n01=1, n02=2, n03=1)
    found = FolderImageLabels(tmp_path, SPLIT, {"n02": "pear", "n03": "pear"})
    assert [record["labels"] for record in found] == [(0,)] * 3 and found.image_counts().tolist() == [3, 0, 0]
    with pytest.raises(DataError, match="no folder n09, which folders.json names"):
        FolderImageLabels(tmp_path, SPLIT, {"n09": "pear"}, source="folders.json")
    with pytest.raises(DataError, match="folders.json has 1 folders that are no class of fruit: n02 .plum"):
        FolderImageLabels(tmp_path, SPLIT, {"n01": "pear", "n02": "plum"}, source="folders.json")


def test_faulty_folders(tmp_path):
    with pytest.raises(DataError, match="no folder of a class"):
        FolderImageLabels(tmp_path, SPLIT)
    with pytest.raises(DataError, match="gone cannot be read"):
        FolderImageLabels(tmp_path / "gone", SPLIT)
    tree(tmp_path, pear=1, apple=0)
    with pytest.raises(DataError, match="1 folders of classes hold no image .*apple. Unpack"):
        FolderImageLabels(tmp_path, SPLIT)
    os.rename(tmp_path / "apple", tmp_path / "plum")
    with pytest.raises(DataError, match="1 folders that are no class of fruit: plum.*mapping file"):
        FolderImageLabels(tmp_path, SPLIT)
    os.rename(tmp_path / "plum", tmp_path / "quince")
    with pytest.raises(DataError, match="1 folders of novel classes of fruit, first quince.*novel_labels: True"):
        FolderImageLabels(tmp_path, SPLIT)
    Image.fromarray(image_of(0)).save(tmp_path / "quince" / "0.JPG", format="JPEG")
    assert FolderImageLabels(tmp_path, SPLIT, novel_labels=True)[1]["labels"] == (2,)


def test_labels_stay_small_in_memory(tmp_path):
    """No Python object per image: what a reader holds are arrays, and some values per class."""
    (tmp_path / "tree").mkdir()
    folders = FolderImageLabels(tree(tmp_path / "tree", pear=2), SPLIT)
    for reader in (of_json(tmp_path, labelled(30)), folders):
        for value in vars(reader).values():
            assert isinstance(value, (np.ndarray, PackedStrings, Split)) or len(pickle.dumps(value)) < 300


def test_mapping_files(tmp_path):
    write_json(tmp_path / "a.json", {"n01": "pear"})
    assert read_mapping(tmp_path / "a.json") == {"n01": "pear"}
    write_json(tmp_path / "a.json", labelled())
    assert read_mapping(tmp_path / "a.json") is None
    with pytest.raises(DataError, match="b.json does not exist"):
        read_mapping(tmp_path / "b.json")
