"""``ovdet2 predict`` apart from the detector: which images are read, and where their pictures are written."""

import time
from pathlib import Path

import pytest

from ovdet2.errors import UsageError
from ovdet2.programs.predict import find_images, main, picture_paths


@pytest.fixture
def folder(tmp_path):
    for name in ("b.png", "a.JPG", "notes.txt", "clip.gif", "sub/c.jpeg", "sub/deep/d.webp", "sub/readme"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_a_folder_with_its_subfolders(folder, capsys):
    found = find_images([str(folder)])
    assert [path.relative_to(folder).as_posix() for path in found] == [
        "a.JPG",
        "b.png",
        "sub/c.jpeg",
        "sub/deep/d.webp",
    ]
    assert capsys.readouterr().out == "not read, since they are no images: 1 .gif, 1 .txt, 1 no suffix\n"


def test_patterns_and_files(folder, capsys):
    assert [path.name for path in find_images([str(folder / "**" / "*.jpeg")])] == ["c.jpeg"]
    assert {path.name for path in find_images([str(folder / "**")])} == {"a.JPG", "b.png", "c.jpeg", "d.webp"}
    inputs = [str(folder / "b.png"), str(folder / "notes.txt"), str(folder / "*.png")]
    assert [path.name for path in find_images(inputs)] == ["b.png", "notes.txt"]  # a file that is named is tried
    capsys.readouterr()


@pytest.mark.parametrize("item, held", [("nowhere.png", ""), ("*.txt", "but 1 file of other types"), ("x*", "")])
def test_inputs_without_an_image(item, held, folder):
    with pytest.raises(UsageError, match=f"no such file, no image in that folder.*{held}.*Images are .bmp, .jpeg"):
        find_images([str(folder / item)])


def test_every_image_has_its_own_picture(tmp_path):
    images = [Path("a/1.jpg"), Path("b/1.png"), Path("b/2.png")]
    pictures = picture_paths(images, tmp_path)
    assert list(pictures) == images and len(set(pictures.values())) == 3
    assert pictures[images[0]] == tmp_path / "1.png" and pictures[images[2]] == tmp_path / "2.png"


def test_names_that_meet(tmp_path):
    images = [Path("b_1_2.jpg"), Path("a/1.jpg"), Path("b/1.jpg"), Path("b/1.png"), Path("a_1.png")]
    assert len(set(picture_paths(images, tmp_path).values())) == len(images)


def test_pictures_of_an_earlier_run_are_not_read(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    first = find_images(["."], Path("out"))
    (folder / "out").mkdir()
    for picture in picture_paths(first, Path("out")).values():
        picture.touch()
    assert find_images(["."], Path("out")) == first
    assert len(find_images(["out"], Path("out"))) == len(first)  # unless that folder is meant
    capsys.readouterr()


def test_many_images(tmp_path):
    for number in range(3000):
        (tmp_path / f"{number}.jpg").touch()
    start = time.process_time()
    assert len(picture_paths(find_images([str(tmp_path)], tmp_path / "out"), tmp_path / "out")) == 3000
    assert time.process_time() - start < 5  # linear: 0.4 s; a comparison of all pairs took longer than this


@pytest.mark.parametrize("output", (".", "../here", "link"))
def test_no_input_is_replaced(output, tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    (here / "mine.png").write_bytes(b"a photograph")
    (here / "link").symlink_to(here)
    monkeypatch.chdir(here)
    with pytest.raises(UsageError, match="mine.png would replace an input.*: give another name or folder"):
        main(["--config-file", "ovshapes/vild_text_r18.yaml", "--input", "mine.png", "--output", output])
    assert (here / "mine.png").read_bytes() == b"a photograph"
    assert picture_paths([Path("mine.jpg")], Path(output))  # its picture has another name
