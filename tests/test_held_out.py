"""Nothing but the final table reads the test split: the rest works without it, and comparisons on it are refused."""

import pytest
from detectron2.data import DatasetCatalog

import train_net
from ovdet2.data.datasets.ov_shapes import TEST_ANNOTATION_FILES, ensure_generated, ensure_test
from ovdet2.errors import UsageError
from ovdet2.experiments import Artefact, Column, Entry, Experiment
from ovdet2.experiments.runner import Runner
from ovdet2.io.files import read_json
from ovdet2.programs import experiments
from ovdet2.programs.build_concept_priors import main as build_priors

CONFIG = "ovshapes/cckt_priors_r18.yaml"
SMALL = [
    "MODEL.DEVICE", "cpu", "MODEL.DETR.DIM", "32", "MODEL.DETR.HEADS", "4", "MODEL.DETR.FFN_DIM", "16",
    "MODEL.DETR.ENCODER_LAYERS", "1", "MODEL.DETR.DECODER_LAYERS", "2", "MODEL.DETR.NUM_QUERIES", "10",
    "MODEL.VOCABULARY.TEMPLATES", "single", "SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2",
    "SOLVER.WARMUP_ITERS", "1", "DATALOADER.NUM_WORKERS", "0", "INPUT.MIN_SIZE_TRAIN", "(64,)",
    "INPUT.MIN_SIZE_TEST", "64", "TEST.EXPECTED_RESULTS", "[]", "TEST.HTML_REPORT", "False",
]  # fmt: skip
ON_TEST = ["DATASETS.TEST", "('ov_shapes_test',)"]
REFUSED = "reads ov_shapes_test, which is held out for final tables: .* Use ov_shapes_val_all"


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Root of a small OV-Shapes whose test split cannot be read, not even by the superuser."""
    root = tmp_path / "datasets"
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    ensure_generated(root, counts={"train2017": 4, "val2017": 2}, workers=1)
    folder = root / "ov_shapes"
    for path in (*(folder / "annotations" / name for name in TEST_ANNOTATION_FILES), folder / "manifest_test.json"):
        path.mkdir()
    (folder / "test2017").symlink_to("nowhere")
    return root


def test_training_sweeps_and_thresholds_need_no_test_split(root, tmp_path):
    priors = {}
    for backend in ("oracle", "random"):
        priors[backend] = str(tmp_path / f"{backend}.safetensors")
        rows = build_priors(["--backend", backend, "--dataset", "ov_shapes_val_all", "--output", priors[backend],
                             "--rho", "0.5,0.9", "--top-l", "2,6"])  # fmt: skip
        assert len(rows) == 4
    run = tmp_path / "run"
    overrides = [*SMALL, "MODEL.CCKT.PRIOR_FILE", priors["oracle"]]
    train_net.run(["--config-file", f"configs/{CONFIG}", *overrides, "OUTPUT_DIR", str(run)])
    assert read_json(run / "inference" / "ov_shapes_val_all" / "report.json")["images"] == 2
    sweep = ["cckt.priors", "--config-file", CONFIG, "--priors", *priors.values(), "--rho", "0.5,0.9", "--output",
             str(tmp_path / "sweep"), *SMALL, "MODEL.WEIGHTS", str(run / "model_final.pth")]  # fmt: skip
    assert len(experiments.main(sweep)) == 4
    with pytest.raises(UsageError, match=REFUSED):
        experiments.main([*sweep, *ON_TEST])
    with pytest.raises(OSError):  # the split is indeed unreadable
        DatasetCatalog.get("ov_shapes_test")


@pytest.mark.parametrize("arguments", [
    ["cckt.teachers", "--config-file", "ovshapes/cckt_full_r18.yaml", "--teachers", "a:b", "{output}", *ON_TEST],
    ["clip_detr.ablations", "--config-file", "ovshapes/clip_detr_both_closed_r18.yaml", "{output}", "--", *ON_TEST],
    ["ov-shapes", "--rows", "vild", "{output}", "--", *ON_TEST],
    ["ov-shapes", "--rows", "vild", "{output}", "--tabulate", "--", *ON_TEST],
    ["ov-shapes", "--rows", "vild", "{output}", "--", "DATASETS.TEST", "('ov_shapes_val_all', 'ov_shapes_test')"],
])  # fmt: skip
def test_experiments_that_choose_settings_refuse_it(arguments, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    with pytest.raises(UsageError, match=REFUSED):
        experiments.main([word.format(output=f"--output={tmp_path / 'out'}") for word in arguments])
    assert not list(tmp_path.iterdir())


def test_programs_of_rows_and_artefacts_are_refused_too(tmp_path):
    program = ("evaluate", "--dataset", "ov_shapes_test")
    made = Artefact("prior", "MODEL.CCKT.PRIOR_FILE", "p", program)
    entries = {"program": Entry("a", command=program), "reads": Entry("b", CONFIG, needs=("prior",))}
    runner = Runner(Experiment(entries, {"AP": Column(("bbox", "AP"))}, {"prior": made}), tmp_path / "out")
    for name in entries:
        with pytest.raises(UsageError, match=f"the row {name} {REFUSED}"):
            runner.run(name)
    assert not list(tmp_path.iterdir())


def test_a_prior_of_the_test_split_is_not_compared_at_several_thresholds(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    ensure_generated(tmp_path, counts={"train2017": 2, "val2017": 1}, workers=1)
    ensure_test(tmp_path, count=2, workers=1)
    output = tmp_path / "p.safetensors"
    assert build_priors(["--backend", "oracle", "--dataset", "ov_shapes_test", "--output", str(output)]) == []
    assert output.is_file() and "Precision" not in (printed := capsys.readouterr().out)
    assert "rho and L are not compared on it: use ov_shapes_val_all" in printed
