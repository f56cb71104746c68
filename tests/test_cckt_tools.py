"""The programs around CCKT-Det: pseudo labels and their mark, sweeps, and priors of a photograph at once."""

import json
from pathlib import Path

import numpy as np
import pytest
import sweep_cckt_priors as sweep
import sweep_cckt_teachers
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image

from ovdet2 import Detector
from ovdet2.config import get_cfg
from ovdet2.data.datasets.own import register_own
from ovdet2.data.records import load_records
from ovdet2.engine.checkpoint import AtomicCheckpointer
from ovdet2.engine.trainer import _facts_of
from ovdet2.errors import DataError, UsageError
from ovdet2.experiments import command
from ovdet2.experiments.evaluation import SharedDetector
from ovdet2.experiments.find import find_plan
from ovdet2.io.files import write_json
from ovdet2.methods.cckt.experiments import build_prior_sweep
from ovdet2.methods.cckt.online_priors import OnlinePriors, word_indices
from ovdet2.methods.cckt.prior_words import WordOrder, ordered_words
from ovdet2.priors.concept_prior import ConceptPriors
from ovdet2.programs import build_pseudo_labels, experiments
from ovdet2.programs import predict as demo
from ovdet2.vocabulary import Vocabulary
from ovdet2.vocabulary.bank import WordBank
from tests import micro
from tests.cache_cases import manifest
from tests.micro_training import SPLIT, write_data
from tests.test_cckt_data import priors
from tests.test_detr_build import SMALL


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    write_data(tmp_path)
    return tmp_path


@pytest.fixture
def trained(data, micro_clip_weights, micro_teacher):
    """(overrides, path of weights) of an untrained CCKT-Det for the micro data set with the micro CLIP."""
    overrides = [
        *SMALL, "MODEL.TEACHER.ARCHITECTURE", "micro-clip", "MODEL.TEACHER.PRETRAINED", str(micro_clip_weights),
        "MODEL.VOCABULARY.TEMPLATES", "single", "MODEL.CCKT.ENABLED", "True", "MODEL.CCKT.PRIOR_THRESHOLD", "0.0",
        "MODEL.CCKT.PRIOR_TOP", "2", "DATASETS.TRAIN", "('ov_micro_train',)", "DATASETS.TEST", "('ov_micro_val',)",
        "DATALOADER.NUM_WORKERS", "0", "INPUT.MIN_SIZE_TEST", "48", "OUTPUT_DIR", str(data / "out"),
    ]  # fmt: skip
    from detectron2.modeling import META_ARCH_REGISTRY

    cfg = get_cfg()
    cfg.merge_from_list(overrides)
    words = Vocabulary.build(SPLIT.names, micro_teacher, "single", SPLIT.base_mask)
    torch.manual_seed(0)
    model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg, vocabulary=words)
    AtomicCheckpointer(model, str(data)).save("weights")
    return overrides, str(data / "weights.pth")


class TestPseudoLabels:
    def instances(self):
        boxes = [[0, 0, 20, 20], [1, 0, 21, 20], [30, 30, 50, 50], [30, 31, 50, 50], [60, 0, 80, 9], [5, 50, 5, 60]]
        scores, classes = [0.95, 0.97, 0.99, 0.93, 0.5, 0.99], [2, 2, 2, 3, 2, 2]
        return Instances(
            (90, 90), pred_boxes=Boxes(torch.tensor(boxes).float()), scores=torch.tensor(scores),
            pred_classes=torch.tensor(classes),
        )  # fmt: skip

    def test_what_is_selected(self):
        """Novel, sure, with an area, on no annotation, and not twice."""
        found = build_pseudo_labels.select(self.instances(), [], 2, 0.9, 0.5)
        assert found.scores.tolist() == pytest.approx([0.99, 0.97])
        found = build_pseudo_labels.select(self.instances(), [[29, 30, 20, 20]], 2, 0.9, 0.5)
        assert found.scores.tolist() == pytest.approx([0.97])
        assert len(build_pseudo_labels.select(self.instances(), [], 4, 0.9, 0.5)) == 0

    def test_by_the_tool_marked_refused_and_said(self, data, trained, capsys):
        overrides, weights = trained
        file, output = priors(data, dataset="ov_micro_train"), data / "micro" / "pseudo.json"
        written = build_pseudo_labels.main([
            "--config-file", "", "--dataset", "ov_micro_train", "--output", str(output), "--min-score", "0.0",
            "--overlap", "0.9", *overrides, "MODEL.WEIGHTS", weights, "MODEL.CCKT.PRIOR_FILE", file,
        ])  # fmt: skip
        assert json.loads(output.read_text()) == written and "pseudo_labels" in capsys.readouterr().out
        made = [annotation for annotation in written["annotations"] if annotation.get("pseudo")]
        assert made and {annotation["category_id"] for annotation in made} == {5}
        assert len({annotation["id"] for annotation in written["annotations"]}) == len(written["annotations"])
        assert written["info"]["pseudo_labels"]["words"] == ["ring"]
        assert written["info"]["pseudo_labels"]["annotations"] == len(made)
        own = {"json": str(output), "images": str(data / "micro" / "images"), "base": list(SPLIT.names)}
        cfg = get_cfg()
        cfg.DATASETS.OWN = [own | {"name": "pseudo_refused"}, own | {"name": "pseudo_said", "pseudo_labels": True}]
        register_own(cfg)
        with pytest.raises(
            DataError, match="pseudo labels, made with the names of novel classes .'ring'.*pseudo_labels"
        ):
            load_records(["pseudo_refused"], "DATASETS.TRAIN", False, base_only=True)
        records = load_records(["pseudo_said"], "DATASETS.TRAIN", False, base_only=True)
        assert sum(len(record["annotations"]) for record in records) == len(written["annotations"])

    def test_the_report_names_novel_words_that_were_trained_on(self, caplog):
        class Model:
            vocabulary = WordBank(micro.vocabulary())

        trained = WordBank(micro.vocabulary(num_base=5))
        assert "novel_words_trained_on" not in _facts_of(Model(), "w")
        Model.vocabulary.adopt_saved_vocabulary(trained.state_dict())
        assert _facts_of(Model(), "w")["novel_words_trained_on"] == list(micro.NAMES[3:])
        assert "2 novel words were trained on" in caplog.text


class TestOnlinePriors:
    def test_equal_the_files_of_the_tool(self, data, micro_clip_weights, micro_teacher):
        file = priors(
            data, "--backend", "clip", "--architecture", "micro-clip", "--pretrained", str(micro_clip_weights),
            "--tiles", "2", "--templates", "single", "--num-workers", "0",
        )  # fmt: skip
        words = Vocabulary.build(SPLIT.names, micro_teacher, "single")
        look = OnlinePriors(micro_teacher, words, threshold=0.0, top=2, tiles=2)
        for image_id in (1, 3):
            image = np.asarray(Image.open(data / "micro" / "images" / f"{image_id:04d}.png"))
            index, score = ConceptPriors(file).ranked(image_id, SPLIT.names)
            expected = ordered_words(index, score, WordOrder(SPLIT.names).keys(image_id), 2)
            assert torch.equal(look(image), expected) and torch.equal(look(image), look(image.copy()))
        assert OnlinePriors(micro_teacher, words, threshold=1.0, top=2)(image).tolist() == []
        assert len(OnlinePriors(micro_teacher, words, threshold=1.0, top=2, fill="random")(image)) == 2

    def test_words_that_the_user_gives(self):
        assert word_indices(["tree", "Red_Mug"], ("red mug", "cat", "tree")).tolist() == [2, 0]
        assert word_indices([], ("cat",)).tolist() == []
        for words in (["dog"], ["cat", "cat"]):
            with pytest.raises(UsageError, match="each once"):
                word_indices(words, ("cat", "tree"))

    def test_predictor_and_demo(self, data, trained, tmp_path):
        overrides, weights = trained
        cfg = get_cfg()
        cfg.merge_from_list(overrides)
        predictor = Detector(cfg, weights)
        path = data / "micro" / "images" / "0001.png"
        seen = predictor.predict_present_words(path)
        assert predictor.present(path) == seen
        assert predictor.has_priors and len(seen) == 2
        found = predictor.predict(path)
        assert {predictor.names[word] for word in found.prior_words.tolist()} <= set(seen)
        assert torch.equal(predictor.predict(path, seen).scores, found.scores)
        said = predictor.predict([path, path], ["ring"])
        assert all(set(instances.prior_words.tolist()) == {2} for instances in said)
        predictor.set_vocabulary("disc, cube")
        assert set(predictor.predict_present_words(path)) == {"disc", "cube"}
        with pytest.raises(UsageError, match="invalid: ring"):
            predictor.predict(path, ["ring"])
        drawn = tmp_path / "drawn"
        demo.main([
            "--config-file", "", "--input", str(path), "--output", str(drawn), "--confidence-threshold", "0.0",
            "--present", "ring", *overrides, "MODEL.WEIGHTS", weights,
        ])  # fmt: skip
        [record] = json.loads((drawn / "detections.json").read_text())
        assert record["present"] == ["ring"] and {d["prior"] for d in record["detections"]} == {"ring"}
        assert (drawn / "0001.png").is_file()

    def test_a_detector_without_priors_takes_no_words(self, trained):
        overrides, weights = trained
        cfg = get_cfg()
        cfg.merge_from_list([*overrides, "MODEL.CCKT.PRIORS", "False"])
        predictor = Detector(cfg, weights)
        assert not predictor.has_priors
        image = np.zeros((40, 40, 3), np.uint8)
        with pytest.raises(UsageError, match="takes no semantic priors: do not give present words"):
            predictor.prepare(image, ["ring"])
        with pytest.raises(UsageError, match="takes no semantic priors"):
            predictor.predict_present_words(image)
        assert predictor.prepare(image).attachments == {}


class TestSweeps:
    def test_priors(self, data, trained, monkeypatch):
        """Rows, table and curve; a second call evaluates nothing."""
        overrides, weights = trained
        files = [priors(data, name="oracle"), priors(data, "--backend", "random", name="random")]
        arguments = [
            "--config-file", "", "--priors", *files, "--rho", "0.5", "--top", "1", "--output", str(data / "sweep"),
            *overrides, "MODEL.WEIGHTS", weights, "MODEL.DEVICE", "cuda",  # the CPU, where there is none
        ]  # fmt: skip
        rows = sweep.main(arguments)
        assert [(row["prior"], row["rho"]) for row in rows] == [("oracle", 0.5), ("random", 0.5)]
        assert all(0 <= row["AP50-novel"] <= 100 for row in rows) and rows[0]["base"][0] == 1.0
        table = (data / "sweep" / "table.md").read_text()
        assert table.count("ground truth") == 1 and table.count("control") == 1
        assert table.startswith(
            "| prior | kind | rho | L | words | novel P / R | base P / R | novel AP50 | base AP50 |"
        )
        assert "| oracle | ground truth | 0.5 | 1 | " in table
        assert Image.open(data / "sweep" / "curve.png").size[0] > 100
        assert json.loads((data / "sweep" / "results.json").read_text())["rows"] == rows
        monkeypatch.setattr(SharedDetector, "evaluate", None)
        assert sweep.main(arguments) == rows and (data / "sweep" / "table.md").read_text() == table

    def test_files_of_one_name(self, data, trained):
        overrides, weights = trained
        paths = [data / "a" / "clip.safetensors", data / "b" / "clip.safetensors", data / "b" / "llm.safetensors"]
        words = ["--config-file", "", "--priors", *map(str, paths), str(paths[0]), "--output", str(data), *overrides]
        args = experiments.parse_args(find_plan("cckt.priors"), [*words, "MODEL.WEIGHTS", weights], "")
        entries = build_prior_sweep(args).entries
        assert list(entries) == ["a_clip_rho0.7_top6", "b_clip_rho0.7_top6", "llm_rho0.7_top6"]

    def test_nothing_to_vary(self):
        with pytest.raises(UsageError, match="no semantic priors"):
            sweep.main(["--config-file", "", "--priors", "a", "--output", "b"])
        with pytest.raises(UsageError, match="the detector has no weights"):
            sweep.main(["--config-file", "", "--priors", "a", "--output", "b", "MODEL.CCKT.ENABLED", "True"])

    def test_teachers(self, tmp_path, monkeypatch):
        """The commands of each teacher, and the table of their reports; what was run by earlier versions counts."""
        asked = []

        def run(words):
            asked.append(words)
            path = Path(words[words.index("OUTPUT_DIR" if "OUTPUT_DIR" in words else "--output") + 1])
            (path if "--boxes" in words or "OUTPUT_DIR" in words else path.parent).mkdir(parents=True, exist_ok=True)
            if "--boxes" in words:
                write_json(path / "manifest.json", manifest())
            elif "OUTPUT_DIR" in words:
                figures = {"AP50-novel": 3.0 + len(asked), "AP50-base": 2.0, "AP50-all": 1.0}
                write_json(path / "inference" / "ov_shapes_val_all" / "report.json", {"bbox": figures})
                (path / "model_final.pth").touch()
            else:
                path.write_text("priors")

        monkeypatch.setattr(command, "run_program", run)
        arguments = ["--config-file", "ovshapes/cckt_full_r18.yaml", "--output", str(tmp_path), "--teachers"]
        sweep_cckt_teachers.main([*arguments, "ovshapes-resnet:embedded", "ovshapes-vit:embedded"])
        table = (tmp_path / "table.md").read_text()
        kinds = ["ovdet2.programs.build_region_cache", "ovdet2.programs.build_concept_priors", "ovdet2.programs.train"]
        assert [words[0] for words in asked] == 2 * kinds
        assert "| ovshapes-resnet:embedded | 6.0 | 2.0 | 1.0 |" in table and "| ovshapes-vit:embedded | 9.0" in table
        cache = str(tmp_path / "ovshapes-vit_embedded" / "annotation_cache")
        assert asked[3][asked[3].index("--output") + 1] == cache and cache in asked[5]
        assert asked[5][asked[5].index("OUTPUT_DIR") + 1] == str(tmp_path / "ovshapes-vit_embedded" / "run")
        assert "SEED" not in asked[5]
        for path in tmp_path.rglob("*.json"):
            if path.name in ("row.json", "annotation_cache.json", "priors.json"):  # earlier versions wrote none
                path.unlink()
        asked.clear()
        sweep_cckt_teachers.main([*arguments, "ovshapes-vit:embedded"])
        assert asked == [] and "| ovshapes-vit:embedded | 9.0 | 2.0 | 1.0 |" in (tmp_path / "table.md").read_text()
        with pytest.raises(SystemExit):
            sweep_cckt_teachers.main([*arguments, "ovshapes-vit"])
        with pytest.raises(UsageError, match="does not use the priors and the contrast of CCKT-Det"):
            sweep_cckt_teachers.main([*arguments, "a:b", "--seeds", "0", "--tabulate", "MODEL.CCKT.CONTRAST", "none"])
