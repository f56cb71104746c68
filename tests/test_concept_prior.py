"""Concept priors: the format and its reader, the sources that need no language model, and the tool."""

import itertools
import json
import multiprocessing
import pickle
import random

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from ovdet2.data.concept_prior import SCHEMA, ConceptPriors, PriorWriter, content_sha256
from ovdet2.data.datasets import split_of
from ovdet2.data.datasets.coco_json import Split
from ovdet2.data.images import read_image
from ovdet2.errors import CacheError, DataError, UsageError
from ovdet2.files import write_safetensors
from ovdet2.priors.clip import ClipBackend, views
from ovdet2.priors.from_file import FromFile
from ovdet2.priors.quality import as_table, quality
from ovdet2.priors.simulated import Chance, NoisyOracle, Oracle
from ovdet2.priors.truth import Truth, truth_of
from ovdet2.vlm.teacher import Teacher
from ovdet2.vocabulary import Vocabulary
from tests.micro_training import SPLIT, write_data
from tools.build_concept_priors import main

WORDS = ("cat", "dog", "Red_Mug", "tree", "car")


def write(path, lists, words=WORDS, missing=(), top=100, kind="prediction"):
    """A prior of {image id: {word index: score}}."""
    writer = PriorWriter(words, [*lists, *missing], top)
    for image_id, scores in lists.items():
        writer.add(image_id, torch.tensor(list(scores), dtype=torch.int64), torch.tensor(list(scores.values())))
    writer.save(path, "made_up", "0" * 64, {"backend": "test"}, kind)
    return ConceptPriors(path)


def reference(scores, top):
    """What the format says of {word index: score}, in plain Python."""
    ordered = sorted((-float(np.float32(score)), index) for index, score in scores.items())
    return [(index, -score) for score, index in ordered if score < 0][:top]


# Few different values, so that ties are common.
_SCORES = st.dictionaries(st.integers(0, 4), st.sampled_from([0.0, 0.25, 0.7, 0.9, 1.0]), max_size=5)
_LISTS = st.dictionaries(st.integers(0, 10**12), _SCORES, min_size=1, max_size=6)


@given(_LISTS, st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_round_trip_and_order(tmp_path_factory, lists, top):
    path = tmp_path_factory.mktemp("prior") / "p.safetensors"
    priors = write(path, lists, top=top)
    assert priors.words == WORDS and len(priors) == len(lists) and not priors.missing
    for image_id, scores in lists.items():
        index, score = priors.scores(image_id)
        assert list(zip(index.tolist(), score.tolist())) == reference(scores, top)
        assert index.dtype == torch.int64 and score.dtype == torch.float32
    assert priors.manifest["entries"] == sum(len(reference(scores, top)) for scores in lists.values())


@given(_SCORES, st.permutations(range(5)), st.sampled_from([0.0, 0.25, 0.7, 0.95]), st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_selection(tmp_path_factory, scores, order, rho, top):
    """A higher threshold or a shorter list selects a prefix; another order of the caller's words selects the same."""
    priors = write(tmp_path_factory.mktemp("prior") / "p.safetensors", {7: scores})
    found = priors.select(7, rho, top).tolist()
    assert found == [index for index, score in reference(scores, 5) if score >= np.float32(rho)][:top]
    assert priors.select(7, rho + 0.04, top).tolist() == found[: len(priors.select(7, rho + 0.04, top))]
    names = [WORDS[i] for i in order]
    assert [order[i] for i in priors.select(7, rho, top, names).tolist()] == found


def test_dense_scores_equal_listed_ones(tmp_path):
    scores = torch.rand(3000, generator=torch.Generator().manual_seed(0)).mul(200).round().div(200)  # many ties
    writer = PriorWriter([f"word {i}" for i in range(3000)], [1], top=100)
    writer.add(1, None, scores)
    writer.save(tmp_path / "p", "made_up", "0" * 64, {"backend": "test"}, "prediction")
    index, score = ConceptPriors(tmp_path / "p").scores(1)
    assert list(zip(index.tolist(), score.tolist())) == reference(dict(enumerate(scores.tolist())), 100)


@pytest.mark.parametrize(
    "image_id, index, score",
    [
        (9, [0], [0.5]),
        (2, [0], [0.5]),  # a second time
        (1, [5], [0.5]),
        (1, [-1], [0.5]),
        (1, [0, 0], [0.5, 0.6]),
        (1, [0, 1], [0.5]),
        (1, [0], [1.5]),
        (1, [0], [float("nan")]),
    ],
)
def test_writer_refuses(image_id, index, score):
    writer = PriorWriter(WORDS, [1, 2])
    writer.add(2, torch.tensor([0]), torch.tensor([0.5]))
    with pytest.raises(ValueError, match=f"image id {image_id}|{image_id} are not"):
        writer.add(image_id, torch.tensor(index), torch.tensor(score))


def test_threshold_is_compared_as_scores_are_stored(tmp_path):
    assert write(tmp_path / "p", {1: {0: 0.7}}).select(1, threshold=0.7).tolist() == [0]  # float32(0.7) < 0.7


def test_words_of_another_vocabulary(tmp_path, caplog):
    priors = write(tmp_path / "p", {1: {0: 0.9, 1: 0.8, 2: 0.7, 3: 0.6}})
    names = ("tree", "red mug.", "boat")
    assert priors.select(1, top=1, names=names).tolist() == [1]  # top L counts the caller's words alone
    assert priors.select(1, names=names).tolist() == [1, 0]
    assert priors.coverage(names) == (["Red_Mug", "tree"], ["cat", "dog", "car"], ["boat"])
    priors.select(1, names=list(names))
    said = [r.getMessage() for r in caplog.records if r.name == "ovdet2.data.concept_prior"]
    assert len(said) == 1 and "3 of its 5 words are not in the vocabulary" in said[0] and "of 1 of the" in said[0]
    with pytest.raises(UsageError, match="twice"):
        priors.select(1, names=("red mug", "red_mug"))


def test_missing_and_empty_and_unknown_images(tmp_path):
    priors = write(tmp_path / "p", {1: {0: 0.9}, 2: {}}, missing=[3, 4])
    assert priors.missing == {3, 4} and "2 missing" in str(priors) and len(priors) == 2
    assert all(len(part) == 0 for image_id in (2, 3) for part in priors.scores(image_id))
    assert len(priors.select(3, names=WORDS)) == 0
    with pytest.raises(CacheError, match="no entry for image id 5: it was made for other images"):
        priors.scores(5)


def test_a_prior_without_entries(tmp_path):
    assert len(write(tmp_path / "p", {1: {}}).select(1)) == 0
    nobody = write(tmp_path / "q", {}, missing=[1])
    assert len(nobody) == 0 and len(nobody.select(1)) == 0


def test_simulations_say_so(tmp_path):
    assert ": SIMULATION, backend test" in str(write(tmp_path / "p", {1: {}}, kind="simulation"))
    with pytest.raises(ValueError, match="kind of a prior"):
        write(tmp_path / "p", {1: {}}, kind="guess")


def _select(priors, image_id):
    return priors.select(image_id, 0.3, 2).tolist()


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_reader_travels_to_workers(tmp_path, start):
    priors = write(tmp_path / "p", {1: {0: 0.9, 3: 0.4, 4: 0.8}, 2: {2: 0.5}})
    assert _select(priors, 1) == [0, 4]  # the map is open before the worker starts
    with multiprocessing.get_context(start).Pool(1) as pool:
        assert pool.starmap(_select, [(priors, 1), (priors, 2)]) == [[0, 4], [2]]
    assert _select(pickle.loads(pickle.dumps(priors)), 2) == [2]


def _tensors(**changes):
    tensors = {
        "image_ids": torch.tensor([1, 2]),
        "offsets": torch.tensor([0, 1, 2]),
        "word_index": torch.tensor([0, 4], dtype=torch.int32),
        "score": torch.tensor([0.5, 0.25]),
    }
    return tensors | changes


def _write_raw(path, tensors, **changes):
    manifest = {
        "schema": SCHEMA,
        "words": list(WORDS),
        "kind": "prediction",
        "source": {},
        "dataset": "made_up",
        "dataset_sha256": "0" * 64,
        "missing_image_ids": [],
        "content_sha256": content_sha256(tensors, WORDS),
    }
    write_safetensors(path, tensors, {k: v for k, v in (manifest | changes).items() if v is not None})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"word_index": torch.tensor([0, 5], dtype=torch.int32)}, "out of range"),
        ({"score": torch.tensor([0.5, float("nan")])}, "out of range"),
        ({"offsets": torch.tensor([0, 2, 1])}, "2 images, 3 offsets"),
        ({"offsets": torch.tensor([0, 3, 2])}, "do not ascend"),
        ({"image_ids": torch.tensor([2, 1])}, "do not ascend"),
        ({"score": torch.tensor([0.5])}, "2 words and 1 scores"),
        ({"score": torch.tensor([0.5, 0.25]).double()}, "float64"),
    ],
)
def test_inconsistent_tensors_are_refused(tmp_path, changes, message):
    _write_raw(tmp_path / "good", _tensors())
    assert _select(ConceptPriors(tmp_path / "good"), 1) == [0]
    _write_raw(tmp_path / "p", _tensors(**changes))
    with pytest.raises(CacheError, match=f"damaged.*{message}.*build_concept_priors.py anew"):
        ConceptPriors(tmp_path / "p")


def test_damaged_files_are_refused(tmp_path):
    with pytest.raises(CacheError, match="does not exist: build it with tools/build_concept_priors.py"):
        ConceptPriors(tmp_path / "none")
    write(tmp_path / "p", {1: {0: 0.9, 1: 0.8}})
    whole = (tmp_path / "p").read_bytes()
    for end in (0, 5, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut").write_bytes(whole[:end])
        with pytest.raises(CacheError, match="not a whole concept prior"):
            ConceptPriors(tmp_path / "cut")
    for place in range(len(whole) - 40, len(whole)):  # any bit of the tensors
        flipped = bytearray(whole)
        flipped[place] ^= 1
        (tmp_path / "flipped").write_bytes(flipped)
        with pytest.raises(CacheError, match="is damaged"):
            ConceptPriors(tmp_path / "flipped")
    edited = whole.replace(b'\\"cat\\"', b'\\"cow\\"')
    assert edited != whole
    (tmp_path / "edited").write_bytes(edited)
    with pytest.raises(CacheError, match="SHA-256"):
        ConceptPriors(tmp_path / "edited")


def test_other_schema_and_lacking_parts(tmp_path):
    _write_raw(tmp_path / "p", _tensors(), schema="ovdet2/concept-prior/2")
    with pytest.raises(
        CacheError, match="schema 'ovdet2/concept-prior/2', this version reads 'ovdet2/concept-prior/1'"
    ):
        ConceptPriors(tmp_path / "p")
    _write_raw(tmp_path / "p", _tensors(), words=None)
    with pytest.raises(CacheError, match="has no words"):
        ConceptPriors(tmp_path / "p")
    save_file({"a": torch.zeros(1)}, str(tmp_path / "foreign"))
    with pytest.raises(CacheError, match="schema None"):
        ConceptPriors(tmp_path / "foreign")


# ---- truth, simulations, quality -------------------------------------------------------------------------------------

TRUTH_SPLIT = Split("made up", base=((1, "cat"), (2, "dog"), (3, "tree")), novel=((7, "car"), (9, "boat")))


def made_truth(images, classes, seed=0):
    """Truth of 0 to 3 present classes an image."""
    rng = random.Random(seed)
    return {i: Truth(frozenset(rng.sample(range(classes), rng.randint(0, 3))), None) for i in range(1, images + 1)}


def records_of(truth):
    return [{"image_id": image_id} for image_id in truth]


def written(path, backend, truth, words):
    writer = PriorWriter(words, list(truth))
    for image_id, index, score in backend.lists(records_of(truth), skip=None):
        writer.add(image_id, index, score)
    writer.save(path, "made_up", "0" * 64, backend.source, backend.kind)
    return ConceptPriors(path)


def test_truth_counts_crowds_and_reads_federated_lists():
    record = {"image_id": 5, "annotations": [{"category_id": 1, "iscrowd": 1}, {"category_id": 3, "iscrowd": 0}]}
    assert truth_of([record], TRUTH_SPLIT) == {5: ({1, 3}, None)}
    assert truth_of([record | {"neg_category_ids": [9, 1, 100]}], TRUTH_SPLIT) == {5: ({1, 3}, {4, 0})}


def test_oracle_is_the_truth_in_the_words_asked_for(tmp_path):
    truth = made_truth(30, 5)
    words = ("sofa", "BOAT", "dog", "cat")  # the data set's classes 4, 1 and 0
    priors = written(tmp_path / "p", Oracle(truth, TRUTH_SPLIT.names, words), truth, words)
    assert priors.kind == "ground truth"
    for image_id, (present, _) in truth.items():
        assert set(priors.select(image_id, 1.0, names=TRUTH_SPLIT.names).tolist()) == present & {0, 1, 4}
    with pytest.raises(DataError, match="none of the data set's 5 classes is among the 1 words"):
        Oracle(truth, TRUTH_SPLIT.names, ("sofa",))


@pytest.mark.parametrize("precision, recall", [(0.8, 0.7), (0.5, 1.0), (1.0, 0.4), (0.25, 0.3)])
def test_noisy_oracle_has_the_stated_precision_and_recall(precision, recall):
    """Within four standard errors of the counts it is measured from."""
    names = [f"class {i}" for i in range(65)]
    truth = made_truth(1000, 65)
    backend = NoisyOracle(truth, names, names, precision, recall, seed=3)
    true = false = 0
    for image_id, index, score in backend.lists(records_of(truth), skip=None):
        hits = len(truth[image_id].present & set(index.tolist()))
        true, false = true + hits, false + len(index) - hits
        assert torch.all((score > 0) & (score <= 1))
    present = sum(len(there) for there, _ in truth.values())
    assert backend.kind == "simulation" and backend.source["precision"] == precision
    assert abs(true / present - recall) <= 4 * (recall * (1 - recall) / present) ** 0.5
    listed = true + false
    assert abs(true / listed - precision) <= 4 * (precision * (1 - precision) / listed) ** 0.5


def test_noisy_oracle_draws_by_image_alone():
    truth, names = made_truth(50, 65), [f"class {i}" for i in range(65)]

    def lists(records, seed=1):
        backend = NoisyOracle(truth, names, names, 0.6, 0.7, seed)
        return {i: (a.tolist(), b.tolist()) for i, a, b in backend.lists(records, skip=None)}

    whole = lists(records_of(truth))
    assert lists(records_of(truth)[::-3]).items() <= whole.items()
    assert lists(records_of(truth), seed=2) != whole
    assert all(not whole[i][0] for i, (present, _) in truth.items() if not present)


def test_impossible_simulations_are_refused():
    truth = {1: Truth(frozenset({0, 1, 2}), None)}
    with pytest.raises(UsageError, match="--precision 0.1 is too low for --recall 0.9: an image with 3 of 5 classes"):
        NoisyOracle(truth, TRUTH_SPLIT.names, TRUTH_SPLIT.names, 0.1, 0.9, 0)
    for precision, recall in ((0, 0.5), (0.5, 0), (1.1, 0.5), (0.5, float("nan"))):
        with pytest.raises(UsageError, match="above 0 and at most 1"):
            NoisyOracle(truth, TRUTH_SPLIT.names, TRUTH_SPLIT.names, precision, recall, 0)


def test_chance_draws_every_word_alike(tmp_path):
    truth = made_truth(500, 5)
    priors = written(tmp_path / "p", Chance(WORDS, 0), truth, WORDS)
    counts = torch.bincount(torch.cat([priors.select(i, top=2) for i in truth]), minlength=5)
    assert priors.kind == "control" and counts.sum() == 1000
    assert torch.all((counts - 200).abs() < 4 * (500 * 0.4 * 0.6) ** 0.5)


def brute_force(priors, truth, members, rho, top):
    hits = judged = selected = total = 0
    for image_id, (present, absent) in truth.items():
        total += len(present & members)
        chosen = set(priors.select(image_id, rho, top, TRUTH_SPLIT.names).tolist()) & members
        hits += len(chosen & present)
        selected += len(chosen)
        judged += len(chosen) if absent is None else len(chosen & (present | absent))
    return (hits / judged if judged else None, hits / total) if total else (None, None)


@pytest.mark.parametrize("federated", [False, True])
def test_quality(tmp_path, federated):
    rng = random.Random(1)
    truth = made_truth(40, 5)
    if federated:
        truth = {i: Truth(there, frozenset(rng.sample(range(5), 2)) - there) for i, (there, _) in truth.items()}
    words = ("boat", "sofa", "tree", "cat", "dog")  # without "car"; "sofa" is judged nowhere
    lists = {i: {w: rng.random() for w in range(5)} for i in list(truth)[:-3]}
    priors = write(tmp_path / "p", lists, words, missing=list(truth)[-3:])
    rhos, tops = [0.0, 0.5, 0.99], [1, 3, None]
    rows = quality(priors, truth, TRUTH_SPLIT, rhos, tops)
    assert [(row["rho"], row["top"]) for row in rows] == list(itertools.product(rhos, tops))
    for row in rows:
        for name, members in (("base", {0, 1, 2}), ("novel", {3, 4}), ("all", {0, 1, 2, 3, 4})):
            assert row[name] == pytest.approx(brute_force(priors, truth, members, row["rho"], row["top"]))
    assert len(as_table(rows).splitlines()) == 10


def test_classes_without_annotations_are_not_judged(tmp_path):
    truth = {1: Truth(frozenset({0}), None), 2: Truth(frozenset({1, 2}), None)}
    priors = write(tmp_path / "p", {1: {0: 0.9, 4: 0.8}, 2: {4: 0.7}}, ("cat", "dog", "tree", "boat", "car"))
    (row,) = quality(priors, truth, TRUTH_SPLIT, [0.0], [None])
    assert row["novel"] == (None, None) and row["base"] == (1.0, 1 / 3) and row["words"] == 1.5
    assert as_table([row]).splitlines()[1].split() == ["0.00", "all", "1.5", "100.0", "33.3", "-", "-", "33.3", "33.3"]


# ---- somebody else's file --------------------------------------------------------------------------------------------


def from_file(tmp_path, data):
    (tmp_path / "p.json").write_text(data if isinstance(data, str) else json.dumps(data))
    return FromFile(tmp_path / "p.json", ("cat", "red mug", "boat"), (1, 7, 9), ("cat", "car", "Boat"))


def test_file_by_category_id_and_by_word(tmp_path):
    backend = from_file(tmp_path, {"1": [[9, 0.25], ["Red_Mug", 1], [7, 0.5], [80, 0.5]], "3": [], "99": [[1, 0.5]]})
    found = {
        i: dict(zip(index.tolist(), score.tolist()))
        for i, index, score in backend.lists([{"image_id": 3}, {"image_id": 2}, {"image_id": 1}], None)
    }
    assert found == {1: {2: 0.25, 1: 1.0}, 3: {}}
    assert backend.other_images == 1 and backend.other_words == {7: 1, 80: 1}


@pytest.mark.parametrize(
    "data, message",
    [
        ("[", "not valid JSON"),
        ([], "no object"),
        ({"1": {"cat": 0.5}}, "image 1: no list"),
        ({"1": [["cat"]]}, "image 1: .'cat'."),
        ({"1": [["cat", 1.5]]}, "image 1: .'cat', 1.5."),
        ({"1": [["cat", "high"]]}, "image 1"),
        ({"1": [[True, 0.5]]}, "image 1"),
        ({"1": [["cat", float("nan")]]}, "image 1"),
        ({"1": [[1, 0.5], ["Cat", 0.6]]}, "image 1: 'Cat' stands there twice"),
        ({"2": [["cat", 0.5]]}, "none of the 1 images"),
        ({}, "none of the 1 images"),
        ({"1": [["sofa", 0.5], [80, 0.5]]}, "none of its words is among the"),
    ],
)
def test_malformed_files_are_refused(tmp_path, data, message):
    with pytest.raises(DataError, match=message):
        list(from_file(tmp_path, data).lists([{"image_id": 1}], None))


# ---- CLIP ------------------------------------------------------------------------------------------------------------

CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def clip_weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    (folder / "prior-clip.json").write_text(json.dumps(CLIP))
    open_clip.add_model_config(folder / "prior-clip.json")
    torch.manual_seed(0)
    weights = open_clip.create_model("prior-clip").state_dict()
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, str(folder / "w.safetensors"))
    return folder / "w.safetensors"


@pytest.fixture(scope="module")
def teacher(clip_weights):
    return Teacher.load("prior-clip", str(clip_weights))


@pytest.fixture
def pictures(tmp_path):
    """Records of images in every form: RGB, grey, 16-bit, CMYK, turned by EXIF, with transparency, and long."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "rgb.png")
    image.convert("L").save(tmp_path / "grey.jpg")
    Image.fromarray(rng.integers(0, 65535, (48, 64)).astype(np.uint16)).save(tmp_path / "deep.png")
    image.convert("CMYK").save(tmp_path / "cmyk.jpg")
    image.save(tmp_path / "turned.jpg", exif=exif)
    image.convert("RGBA").save(tmp_path / "alpha.png")
    Image.fromarray(rng.integers(0, 255, (40, 200, 3), dtype=np.uint8)).save(tmp_path / "long.png")
    names = ("rgb.png", "grey.jpg", "deep.png", "cmyk.jpg", "turned.jpg", "alpha.png", "long.png")
    return [{"image_id": i, "file_name": str(tmp_path / name)} for i, name in enumerate(names, 1)]


@pytest.mark.parametrize("tiles, resize", [(1, "crop"), (1, "squash"), (2, "crop"), (3, "squash")])
def test_clip_scores_equal_a_plain_loop(teacher, pictures, tiles, resize):
    """Against open_clip's own transform of each view, image by image, and float64 arithmetic."""
    vocabulary = Vocabulary.build(WORDS, teacher, "single")
    mode = {"crop": "shortest", "squash": "squash"}[resize]
    transform = open_clip.image_transform(
        32, is_train=False, mean=teacher.mean.flatten().tolist(), std=teacher.std.flatten().tolist(), resize_mode=mode
    )
    backend = ClipBackend(teacher, vocabulary, tiles, resize, batch_size=12)
    found = {i: score for i, index, score in backend.lists(pictures, skip=None)}
    assert list(found) == [record["image_id"] for record in pictures]
    for record in pictures:
        image = Image.fromarray(read_image(record["file_name"], "RGB"))
        cells = [image]
        if tiles > 1:
            x, y = (np.rint(np.linspace(0, side, tiles + 1)).astype(int).tolist() for side in image.size)
            cells += [image.crop((x[j], y[i], x[j + 1], y[i + 1])) for i in range(tiles) for j in range(tiles)]
        with torch.no_grad():
            embedded = teacher.clip.encode_image(torch.stack([transform(cell) for cell in cells])).double()
        cosine = (embedded / embedded.norm(dim=1, keepdim=True)) @ vocabulary.embeddings.double().T
        wanted = 1 / (1 + torch.exp(-cosine.amax(dim=0) / 0.07))
        assert torch.allclose(found[record["image_id"]].double(), wanted, atol=2e-4)


def test_batches_and_workers_change_nothing(teacher, pictures):
    vocabulary = Vocabulary.build(WORDS, teacher, "single")

    def scores(**options):
        return torch.stack([s for _, _, s in ClipBackend(teacher, vocabulary, 2, **options).lists(pictures, None)])

    assert torch.allclose(scores(batch_size=1), scores(batch_size=64, num_workers=1), atol=1e-5)


def test_squash_sees_the_ends_of_a_long_image_and_crop_does_not():
    image = np.zeros((32, 128, 3), dtype=np.uint8)
    image[:, :20] = 255
    assert views(image, 1, "crop", 32).float().mean() == 0
    assert views(image, 1, "squash", 32).float().mean() == pytest.approx(255 * 20 / 128, rel=0.05)
    cells = views(image, 2, "squash", 32).float().mean(dim=(1, 2, 3))
    assert cells[1] == cells[3] > 0 and cells[2] == cells[4] == 0


def test_unreadable_images_are_left_out(teacher, pictures, tmp_path):
    whole = (tmp_path / "rgb.png").read_bytes()
    (tmp_path / "rgb.png").write_bytes(whole[: len(whole) // 2])
    said = []
    backend = ClipBackend(teacher, Vocabulary.build(WORDS, teacher, "single"), batch_size=2)
    found = [i for i, _, _ in backend.lists(pictures + [{"image_id": 99, "file_name": "none.png"}], said.append)]
    assert found == [2, 3, 4, 5, 6, 7]
    assert len(said) == 2 and "rgb.png" in said[0] and "none.png" in said[1]


# ---- the tool --------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    write_data(tmp_path)
    return tmp_path


def build(data, *options, dataset="ov_micro_val"):
    output = data / "out" / "p.safetensors"
    rows = main(["--dataset", dataset, "--output", str(output), *options])
    return ConceptPriors(output), rows


def test_oracle_by_the_tool(data, capsys):
    priors, rows = build(data, "--backend", "oracle", "--rho", "1", "--top-l", "all")
    (row,) = rows
    assert row["base"] == row["novel"] == row["all"] == (1.0, 1.0) and len(priors) == 12
    assert priors.words == SPLIT.names
    priors.require_dataset("ov_micro_val", data / "micro" / "val.json")
    with pytest.raises(CacheError, match="made for ov_micro_val .*, but ov_micro_train reads .*train.json"):
        priors.require_dataset("ov_micro_train", data / "micro" / "train.json")
    assert "GROUND TRUTH" in capsys.readouterr().out
    assert build(data, "--backend", "oracle", dataset="ov_micro_train")[1][0]["novel"] == (None, None)


def test_simulation_is_announced(data, capsys):
    priors, _ = build(data, "--backend", "noisy-oracle", "--precision", "0.9", "--recall", "0.5", "--seed", "4")
    assert priors.kind == "simulation" and priors.manifest["source"]["recall"] == 0.5
    assert capsys.readouterr().out.startswith("SIMULATION: ")


def test_clip_by_the_tool(data, clip_weights, teacher, capsys):
    options = ("--backend", "clip", "--architecture", "prior-clip", "--pretrained", str(clip_weights), "--keep", "2")
    priors, rows = build(data, *options, "--num-workers", "0", "--rho", "0,0.5", "--top-l", "1,all")
    assert priors.manifest["source"]["teacher"] == teacher.fingerprint.to_dict() and len(rows) == 4
    assert priors.manifest["entries"] == 24 and rows[0]["words"] == 1
    # The same words by a vocabulary file: of the same teacher as it is, of another one embedded anew.
    vocabulary = Vocabulary.build(split_of("ov_micro_val").names[::-1], teacher, "vild63")
    vocabulary.save(data / "v.safetensors")
    again, _ = build(data, *options, "--num-workers", "0", "--vocabulary", str(data / "v.safetensors"))
    assert "embedded anew" not in capsys.readouterr().out and again.words == SPLIT.names[::-1]
    for image_id in range(1, 13):
        assert torch.equal(again.select(image_id, names=SPLIT.names), priors.select(image_id))
    foreign = Vocabulary.from_table(vocabulary.names, np.eye(3), teacher.fingerprint.stated("other", "x"), "stated")
    foreign.save(data / "v.safetensors")
    anew, _ = build(data, *options, "--num-workers", "0", "--vocabulary", str(data / "v.safetensors"))
    assert "embedded anew" in capsys.readouterr().out and torch.equal(anew.scores(3)[1], again.scores(3)[1])


def test_bad_images_are_listed_up_to_the_limit(data, clip_weights, capsys):
    for name in ("0002.png", "0005.png"):
        (data / "micro" / "images" / name).write_bytes(b"")
    options = ("--backend", "clip", "--architecture", "prior-clip", "--pretrained", str(clip_weights))
    priors, _ = build(data, *options, "--num-workers", "0")
    assert priors.missing == {2, 5} and "0005.png" in capsys.readouterr().out
    with pytest.raises(DataError, match="2 images cannot be used, --max-bad-images is 1"):
        build(data, *options, "--num-workers", "0", "--max-bad-images", "1")


def test_file_and_words_by_the_tool(data, capsys):
    (data / "p.json").write_text(json.dumps({"3": [[2, 0.5], ["sofa", 0.75]], "4": [[1, 0.9]], "77": []}))
    priors, _ = build(data, "--backend", "file", "--input", str(data / "p.json"), "--words", "bar, sofa")
    assert priors.select(3, names=("sofa", "bar")).tolist() == [0, 1] and len(priors.missing) == 10
    out = capsys.readouterr().out
    assert "1 images that ov_micro_val does not have, and 1 entries of 1 words" in out
    assert "2 are not among the words; 1 words are no class of it" in out


@pytest.mark.parametrize(
    "options, message",
    [
        (["--backend", "clip"], "--backend clip needs --architecture"),
        (["--backend", "oracle", "--tiles", "2"], "--tiles is no option of --backend oracle"),
        (["--backend", "noisy-oracle", "--precision", "0.5"], "needs --recall"),
        (["--backend", "random", "--words", "a", "--vocabulary", "v"], "--words or --vocabulary"),
        (["--backend", "random", "--keep", "0"], "--keep is at least 1"),
        (["--backend", "mllm", "--model", "m"], "needs --url and --model, or --local"),
        (["--backend", "mllm", "--local", "f", "--workers", "2"], "--workers is no option of --backend mllm --local"),
        (["--backend", "mllm", "--local", "f", "--top", "2"], "--candidates and --top go together"),
    ],
)
def test_wrong_options(options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--dataset", "ov_micro_val", "--output", "x", *options])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_unknown_data_set_is_a_usage_error(data):
    with pytest.raises(UsageError, match="name registered data sets"):
        build(data, "--backend", "oracle", dataset="nowhere")
