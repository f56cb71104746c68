"""report.html and the comparison of two reports: content, escaping, self-containedness, size, refusals."""

import html.parser
import json
import re
import uuid
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from ovdet2.data.datasets.coco_json import Split
from ovdet2.data.datasets.register import register_dataset
from ovdet2.errors import DataError, UsageError
from ovdet2.evaluation.columns import Detections, Truth
from ovdet2.io.files import sha256_file
from ovdet2.programs import compare_reports, make_report
from ovdet2.report.compare import as_html, as_text, compare
from ovdet2.report.html_report import write_html

NASTY = '</title><script>alert("1")</script>&amp; \u202e $x$ \ud800\x00 ☃'
SPLIT = Split("a & b <2/1>", base=((7, "cat"), (3, NASTY)), novel=((5, "<b>dog</b>"),), groups={"odd <row>": (3, 5)})
VOID = {"meta", "br", "img", "path", "circle"}


def make_case(folder, split=SPLIT, images=4, boxes=3, seed=0, missing=()):
    """(report, truth, detections) of random boxes, half of them detected, with image files in ``folder``."""
    random = np.random.default_rng(seed)
    records = {}
    for image_id in range(1, images + 1):
        path = folder / f"{image_id} <i>.png"
        if image_id not in missing:
            Image.fromarray(random.integers(0, 255, (64, 96, 3), dtype=np.uint8)).save(path)
        records[image_id] = {"image_id": image_id, "file_name": str(path), "height": 64, "width": 96}
    count = images * boxes
    corners = random.uniform(0, 40, (count, 2))
    xyxy = np.concatenate([corners, corners + random.uniform(10, 24, (count, 2))], axis=1)
    image_ids = np.repeat(np.arange(1, images + 1), boxes)
    category_ids = random.choice(split.category_ids, count)
    truth = Truth(records, np.arange(count), image_ids, category_ids, xyxy, np.ones(count), np.zeros(count, dtype=bool))
    said = np.where(random.random(count) < 0.5, category_ids, random.choice(split.category_ids, count))
    scores = -np.sort(-random.random(count).astype(np.float32).reshape(images, boxes), axis=1).ravel()
    detections = Detections(image_ids, said.astype(np.int32), scores, xyxy.astype(np.float32))
    report = {"schema": "ovdet2/report/2", "dataset": "set <1>", "split": split.name, "protocol": "generalized"}
    report |= {"evaluator_type": "ov_coco"}
    report |= {"metric": "COCO", "json_sha256": "0" * 64, "images": images, "detections": count, "seconds": 1.5}
    report |= {"detections_per_image": 100, "command": "python '<train>'", "versions": {"torch": "2"}}
    subsets = {"novel": split.novel, "base": split.base, "all": split.category_ids, **split.groups}
    report["classes"] = {
        name: {"classes": len(ids), "with_ground_truth": len(ids), "boxes": 4} for name, ids in subsets.items() if ids
    }
    report["bbox"] = {f"{metric}-{name}": 60.0 for metric in ("AP50", "AP") for name in report["classes"]}
    report["segm"] = {}
    report["proposals"] = {f"AR@{limit}-{name}": 50.0 for limit in (100, 300) for name in ("novel", "base", "all")}
    figures = {"boxes": 4, "AP50": 60.0, "AP": 40.0}
    report["per_class"] = [
        {"category_id": i, "name": name, "subset": "base" if is_base else "novel", **figures}
        for i, name, is_base in zip(split.category_ids, split.names, split.base_mask)
    ]
    report["per_class"][-1] |= {"AP50": None, "AP": None} if len(split.names) > 3 else {}
    return report, truth, detections


def written(tmp_path, case, split=SPLIT, **options):
    path = tmp_path / "report.html"
    write_html(path, *case, split, **options)
    return path.read_text(encoding="utf-8")


class Tags(html.parser.HTMLParser):
    """Collects the tags and the text of a page, and checks that every tag is closed in order."""

    def __init__(self, page):
        super().__init__()
        self.open, self.seen, self.attributes, self.words = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_is_well_formed_and_says_what_was_measured(tmp_path):
    page = Tags(written(tmp_path, make_case(tmp_path)))
    said = " ".join(page.words)
    for expected in (
        "set <1>",
        SPLIT.name,
        "generalized",
        "0" * 64,
        "python '<train>'",
        "torch: 2",
        "odd <row>",
        "60.00",
        "AR@300",
        "localisation",
        "<b>dog</b>",
        "1 <i>.png",
    ):
        assert expected in said
    assert page.seen.count("img") == 2 * 4  # two of the worst, two of the best, each with ground truth and detections


def test_names_are_escaped_and_nothing_is_loaded_from_elsewhere(tmp_path):
    page = written(tmp_path, make_case(tmp_path))
    tags = Tags(page)
    assert not {"script", "link", "iframe", "object", "b>dog"} & set(tags.seen)
    assert tags.seen.count("title") == 1
    for name, value in tags.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href", "data", "action"):
            assert value.startswith("data:image/jpeg;base64,")
    assert not re.search(r"(src|href|url\(|@import)\s*=?\s*[\"'(]?\s*(https?:)?//", page)
    assert "\x00" not in page and "\ud800" not in page


def test_missing_and_damaged_images_are_said_not_fatal(tmp_path):
    case = make_case(tmp_path, missing=(1,))
    (tmp_path / "2 <i>.png").write_bytes(b"no image")
    page = Tags(written(tmp_path, case))
    assert " ".join(page.words).count("Not drawn") == 2
    assert page.seen.count("img") == 2 * 2


def test_a_large_vocabulary_stays_small_and_lists_every_class(tmp_path):
    split = Split("large", base=tuple((i, f"class {i}") for i in range(866)), novel=((2000, "x"),))
    split = Split("large", split.base, tuple((i, f"class {i}") for i in range(866, 1203)))
    page = written(tmp_path, make_case(tmp_path, split, images=12, boxes=5), split)
    assert len(page) < 3_000_000
    said = set(Tags(page).words)
    assert all(name in said for name in split.names)
    assert "base, then novel, each best first" in page


def test_without_pictures_proposals_novel_classes_detections_or_boxes(tmp_path):
    split = Split("base only", base=((7, "cat"),))
    report, truth, detections = make_case(tmp_path, split)
    report["proposals"] = {}
    empty = Detections(*(column[:0] for column in (detections.image_ids, detections.category_ids)), *([None] * 2))
    empty = Detections(empty.image_ids, empty.category_ids, detections.scores[:0], detections.boxes_xyxy[:0])
    page = Tags(written(tmp_path, (report, truth, empty), split, pictures=0))
    assert "img" not in page.seen and "Proposals" not in page.words
    nothing = Truth(truth.images, *(column[:0] for column in (truth.ann_ids, truth.image_ids, truth.category_ids)),
                    truth.boxes_xyxy[:0], truth.areas[:0], truth.crowd[:0])  # fmt: skip
    Tags(written(tmp_path, (report, nothing, detections), split))


def test_masks_have_their_own_columns_and_other_predictions_are_noticed(tmp_path):
    report, truth, detections = make_case(tmp_path)
    report["segm"] = {"AP-novel": 12.34, "AP-base": None, "APr": 98.76}
    for row in report["per_class"]:
        row["segm"] = {"AP50": 1.5, "AP": None}
    page = " ".join(Tags(written(tmp_path, (report, truth, detections))).words)
    assert "Masks" in page and "12.34" in page and "mask AP50" in page and "1.5" in page
    assert "98.76" not in page  # AP-r under another name
    assert "not that of the summary" in page  # the figures of make_case are made up


def test_distractors_are_named(tmp_path):
    report, truth, detections = make_case(tmp_path)
    assert "no distractor words" in written(tmp_path, (report, truth, detections), pictures=0)
    report |= {"distractors": ["hair drier", "<tie>"], "distractor_detections": 1234}
    page = " ".join(Tags(written(tmp_path, (report, truth, detections), pictures=0)).words)
    assert "2 distractor words" in page and "1,234 detections" in page and "hair drier, <tie>" in page


# --- comparison ---------------------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path):
    """Paths of two comparable reports; the second one's class "dog" gained and its class "cat" lost."""
    folders = []
    for name in ("one", "two"):
        report, _, _ = make_case(tmp_path)
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        if name == "two":
            report["bbox"]["AP50-novel"] += 2.5
            report["per_class"][2]["AP50"] += 2.5
            report["per_class"][0]["AP50"] -= 1.25
            report["bbox"]["AP50-base"] = None
        (folders[-1] / "report.json").write_text(json.dumps(report))
    return folders


def change(folder, **entries):
    """Change entries of a folder's report."""
    path = folder / "report.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_compare_gives_differences_and_the_classes_that_changed_most(two, capsys, tmp_path):
    comparison = compare_reports.main([str(two[0]), str(two[1] / "report.json"), "--html", str(tmp_path / "c.html")])
    rows = {key: (a, b, d) for key, a, b, d in comparison["figures"]["bbox"]}
    assert rows["AP50-novel"] == (60, 62.5, 2.5)
    assert rows["AP50-base"] == (60, None, None)
    assert [row[:2] + row[-1:] for row in comparison["gains"]] == [("<b>dog</b>", "novel", 2.5)]
    assert [row[:2] + row[-1:] for row in comparison["losses"]] == [("cat", "base", -1.25)]
    assert "+2.50" in capsys.readouterr().out
    page = Tags((tmp_path / "c.html").read_text(encoding="utf-8"))
    assert "<b>dog</b>" in page.words and "b" not in page.seen and "+2.50" in page.words


@pytest.mark.parametrize(
    "entry",
    [
        {"dataset": "other"},
        {"json_sha256": "1" * 64},
        {"protocol": "other"},
        {"detections_per_image": 300},
        {"metric": "other"},
        {"split": "other"},
        {"distractors": ["tie"]},
    ],
)
def test_compare_refuses_reports_that_did_not_measure_the_same(two, capsys, entry):
    change(two[1], **entry)
    (key,) = entry
    with pytest.raises(DataError, match=key):
        compare_reports.main([str(folder) for folder in two])
    assert compare_reports.main([*(str(folder) for folder in two), "--anyway"])["unlike"].keys() == {key}
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("NOT MEASURED IN THE SAME WAY") and key in lines[3]


def test_a_comparison_that_is_none_says_so_on_its_page(two):
    a, b = (json.loads((folder / "report.json").read_text()) for folder in two)
    b["dataset"] = "other"
    comparison = compare(a, b)
    assert "Not measured in the same way" in as_html(comparison, (a, b), ("a", "b"))
    assert as_text(compare(a, a), ("a", "a")).endswith("AP50 of a class: none")


def test_compare_refuses_what_is_no_report(two, tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(DataError, match="not a report"):
        compare_reports.main([str(two[0]), str(tmp_path / "x.json")])
    with pytest.raises(DataError, match="does not exist"):
        compare_reports.main([str(two[0]), str(tmp_path / "absent.json")])


HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(1)>'


def places(value, path=()):
    """The path of every entry at any depth: {("bbox", "AP50-novel"), ...}."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in pairs:
        yield (*path, key)
        yield from places(entry, (*path, key))


def changed(report, path, as_key):
    """A copy with a hostile text as the value, or as the key, of one entry."""
    report = json.loads(json.dumps(report))
    owner = report
    for key in path[:-1]:
        owner = owner[key]
    if as_key:
        owner[HOSTILE] = owner.pop(path[-1])
    else:
        owner[path[-1]] = HOSTILE
    return report


@pytest.mark.parametrize("as_key", [False, True])
def test_a_report_of_a_stranger_is_escaped_or_refused_in_every_entry(two, tmp_path, as_key):
    """On both pages, whatever entry holds the markup; a refusal is a DataError."""
    report = json.loads((two[1] / "report.json").read_text())
    report |= {"distractors": ["tie"], "distractor_detections": 3, "git_commit": "a", "finished": "b"}
    report["decoder_layers"] = [dict(report["bbox"])]
    report["per_class"][1]["segm"] = {"AP": 1.0}
    found = [path for path in places(report) if not (as_key and isinstance(path[-1], int))]
    assert len(found) > 60
    refused = 0
    for path in found:
        (two[1] / "report.json").write_text(json.dumps(changed(report, path, as_key)))
        page = tmp_path / "c.html"
        page.unlink(missing_ok=True)
        try:
            compare_reports.main([*map(str, two), "--anyway", "--html", str(page)])
        except DataError as error:
            assert "two/report.json is not" in str(error), path
            refused += 1
        else:
            seen = Tags(page.read_text(encoding="utf-8")).seen
            assert "script" not in seen and seen.count("img") == 0, path
    assert 0 < refused < len(found)


@pytest.mark.parametrize("path", [
    ("per_class", 0, "subset"), ("per_class", 0, "name"), ("per_class", 0, "boxes"), ("per_class", 0, "AP50"),
    ("classes", "novel", "boxes"), ("classes", "base", "with_ground_truth"), ("bbox", "AP50-novel"), ("protocol",),
    ("metric",), ("command",), ("versions", "torch"), ("dataset",),
])  # fmt: skip
def test_the_page_of_an_evaluation_escapes_its_report_too(tmp_path, path):
    """Called directly, without the check of types; what cannot be drawn is an error, never markup."""
    report, truth, detections = make_case(tmp_path)
    try:
        page = written(tmp_path, (changed(report, path, False), truth, detections))
    except (TypeError, ValueError):
        return
    assert "script" not in Tags(page).seen


def test_make_report_refuses_an_unknown_data_set_and_an_absent_folder(two, tmp_path):
    with pytest.raises(UsageError, match="not registered"):
        make_report.main([str(two[0])])
    with pytest.raises(DataError, match="does not exist"):
        make_report.main([str(tmp_path / "absent")])


def test_make_report_of_an_evaluation_folder(tmp_path):
    report, truth, detections = make_case(tmp_path)
    name, names = f"test_{uuid.uuid4().hex}", {5: "dog", 7: "cat"}
    data = {
        "images": [
            {**record, "id": image_id, "file_name": Path(record["file_name"]).name}
            for image_id, record in truth.images.items()
        ],
        "categories": [{"id": i, "name": names[i]} for i in names],
        "annotations": [
            {"id": number, "image_id": int(image_id), "category_id": 5, "bbox": [*box[:2], *(box[2:] - box[:2])]}
            for number, (image_id, box) in enumerate(zip(truth.image_ids, truth.boxes_xyxy.round()), start=1)
        ],
    }
    json_file = tmp_path / "truth.json"
    json_file.write_text(json.dumps(data))
    split = Split("test", base=((7, "cat"),), novel=((5, "dog"),))
    with open(tmp_path / "predictions.jsonl", "w") as lines:
        for image_id in truth.images:
            rows = detections.image_ids == image_id
            record = {
                "image_id": image_id,
                "category_ids": [5] * int(rows.sum()),
                "scores": detections.scores[rows].tolist(),
            }
            lines.write(json.dumps({**record, "boxes_xyxy": detections.boxes_xyxy[rows].tolist()}) + "\n")
    report |= {"dataset": name, "json_sha256": sha256_file(json_file)}
    (tmp_path / "report.json").write_text(json.dumps(report))
    register_dataset(name, json_file, tmp_path, split)
    try:
        page = Tags(make_report.main([str(tmp_path), "--pictures", "1"]).read_text(encoding="utf-8"))
        assert page.seen.count("img") == 2 * 2
        assert "No confusion." in page.words  # everything is called dog
        (tmp_path / "report.json").write_text(json.dumps(report | {"json_sha256": "0"}))
        with pytest.raises(DataError, match="is not the file that"):
            make_report.main([str(tmp_path)])
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)
