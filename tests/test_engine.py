"""Training runs of a micro model: exact resume, several processes, numbers that are not finite, exit codes."""

import contextlib
import json
import logging
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

import train_net
from ovdet2.data.samples import Sample
from ovdet2.engine import Trainer, launch, setup
from ovdet2.engine.step import CheckedStep
from ovdet2.engine.trainer import require_norms_of_device
from ovdet2.errors import DataError, NumericalError, SetupError, UsageError, exit_on_error
from ovdet2.io.files import read_safetensors
from tests import micro_training
from tests.micro_training import micro_cfg, micro_opts, parallel_check, write_data
from tests.processes import run_program


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder with the micro data set; runs write below it."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write_data(tmp_path)
    return tmp_path


def train(output, *overrides, resume=False, stop_after=None):
    """Run a training; returns (trainer, sums of the gradients by iteration). It is interrupted in ``stop_after``."""
    seed_all_rng(0 if not resume else 1)  # a resumed run must not depend on it
    trainer = Trainer(micro_cfg(output, ["MODEL.META_ARCHITECTURE", "NoisyMicroDetector", *overrides]))
    trainer.resume_or_load(resume=resume)
    gradients = {}

    def before_step(*_):
        gradients[trainer.iter] = [p.grad.sum().item() for p in trainer._trainer.model.parameters()]
        if trainer.iter == stop_after:
            raise KeyboardInterrupt

    trainer.optimizer.register_step_pre_hook(before_step)
    with contextlib.suppress(KeyboardInterrupt):
        trainer.train()
    return trainer, gradients


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.checkpointer.model.parameters()])


@pytest.mark.parametrize(
    "workers, optimizer, schedule", [("0", "SGD", "WarmupMultiStepLR"), ("2", "AdamW", "WarmupCosineLR")]
)
def test_resume_equals_an_uninterrupted_run(root, workers, optimizer, schedule):
    """Bit for bit: image ids, gradients (hence losses), weights; with an evaluation after the checkpoint, and a kill
    three steps after it."""
    options = ["SOLVER.MAX_ITER", "20", "SOLVER.STEPS", "(8, 15)", "DATALOADER.NUM_WORKERS", workers]
    options += ["SOLVER.OPTIMIZER", optimizer, "SOLVER.LR_SCHEDULER_NAME", schedule, "SOLVER.CHECKPOINT_PERIOD", "10"]
    options += ["TEST.EVAL_PERIOD", "10"]
    straight, expected = train(root / "straight", *options)
    train(root / "parts", *options, stop_after=13)
    resumed, found = train(root / "parts", *options, resume=True)
    assert sorted(found) == list(range(10, 20))
    assert {i: expected[i] for i in found} == found
    assert resumed.checkpointer.model.seen == straight.checkpointer.model.seen[10:]
    assert torch.equal(weights(resumed), weights(straight))
    assert resumed.optimizer.param_groups[0]["lr"] == straight.optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("mix", ["parallel", "alternate"])
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_resume_of_a_run_with_boxes_and_captions(root, mix, processes):
    """Bit for bit, after it was stopped two steps beyond its last checkpoint; where sources alternate, gradients are
    averaged though a step does not reach all weights."""

    def run(name, steps, resume=False):
        launch(micro_training.mixed_run, processes, args=(root / name, mix, steps, resume), use_cuda=False)
        paths = [root / name / f"rank{rank}.safetensors" for rank in range(processes)]
        return [read_safetensors(path, "test")[0] for path in paths]

    straight = run("straight", 9)
    run("parts", 6)
    (root / "parts" / "last_checkpoint").write_text("model_0000003.pth")
    (root / "parts" / "model_final.pth").unlink()
    resumed = run("parts", 9, resume=True)
    for expected, found in zip(straight, resumed):
        seen = found.pop("seen")
        assert torch.equal(expected.pop("seen")[-len(seen) :], seen) and (seen < 0).any() and (seen > 0).any()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
        assert all(torch.equal(straight[0][name], expected[name]) for name in expected)


def test_run_leaves_metrics_configuration_and_report(root):
    trainer, _ = train(root / "out", "SOLVER.MAX_ITER", "20", "TEST.HTML_REPORT", "True")
    lines = [json.loads(line) for line in (root / "out" / "metrics.json").read_text().splitlines()]
    assert len(lines) >= 10 and {"total_loss", "loss_box", "loss_cls", "lr"} <= set(lines[0])
    assert json.loads((root / "out/inference/ov_micro_val/report.json").read_text())["schema"] == "ovdet2/report/2"
    assert "data:image" in (root / "out/inference/ov_micro_val/report.html").read_text()
    assert "AP50-novel" in trainer._last_eval_results["bbox"]
    assert (root / "out" / "last_checkpoint").read_text() == "model_final.pth"


def test_not_resuming_into_a_used_folder_warns(root, caplog):
    train(root / "out")
    again, seen = train(root / "out")
    assert sorted(seen) == list(range(6)) and "earlier run" in caplog.text
    longer, seen = train(root / "out", "SOLVER.MAX_ITER", "8", resume=True)
    assert sorted(seen) == [6, 7]


@pytest.mark.parametrize(
    "model, what",
    [
        ("ExplodingMicroDetector", "the loss is not finite"),
        ("InfiniteGradientMicroDetector", "a gradient is not finite"),
    ],
)
def test_not_finite_stops_before_the_weights_change(root, model, what):
    options = ["MODEL.META_ARCHITECTURE", model, "SOLVER.CHECKPOINT_PERIOD", "2"]
    with pytest.raises(NumericalError, match=rf"(?s){what} at iteration 2.*loss_.*\.png \(id \d+\).*--resume"):
        train(root / "out", *options)
    saved = torch.load(root / "out" / (root / "out" / "last_checkpoint").read_text(), weights_only=True)
    assert saved["iteration"] == 1
    assert all(torch.isfinite(tensor).all() for tensor in saved["model"].values())


def test_nan_that_detectron2_meets_is_reported_the_same_way(root, monkeypatch):
    def forward(self, batch):
        raise FloatingPointError("Predicted boxes or scores contain Inf/NaN.")

    monkeypatch.setattr(micro_training.MicroDetector, "forward", forward)
    with pytest.raises(NumericalError, match=r"(?s)iteration 0.*Predicted boxes.*\.png \(id"):
        train(root / "out")


@pytest.mark.parametrize(
    "owner, method",
    [(micro_training.MicroDetector, "forward"), (torch.Tensor, "backward"), (torch.optim.SGD, "step")],
)
def test_too_little_gpu_memory_names_sizes_and_keys(root, monkeypatch, owner, method):
    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(owner, method, exhausted)
    with pytest.raises(SetupError, match=r"images of \(3, \d+, \d+\).*iteration 0.*SOLVER.IMS_PER_BATCH"):
        train(root / "out")


def test_float16_gradients_that_are_never_finite(root):
    """The scale would be halved down to zero, and no step be made, until the last iteration."""
    model = torch.nn.Linear(1, 1, bias=False)
    model.forward = lambda batch: {"loss_root": (model.weight * 0).sum().sqrt()}
    batch = [{"file_name": "7.png", "image_id": 7, "image": torch.zeros(3, 8, 8)}]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    step = CheckedStep(model, [batch] * 9, torch.optim.SGD(model.parameters(), lr=1.0), scaler)
    weight = model.weight.detach().clone()
    with EventStorage():
        step.run_step()
        step.run_step()
        assert scaler.get_scale() == 1.0
        with pytest.raises(NumericalError, match=r"(?s)float16.*loss_root.*7.png \(id 7\)"):
            step.run_step()
    assert torch.equal(model.weight, weight)


def test_skipped_images_are_summed_up(root, caplog):
    (root / "micro" / "images" / "0004.png").write_bytes(b"")
    train(root / "out", "DATASETS.TEST", "()")
    assert "1 training images could not be used" in caplog.text and "0004.png" in caplog.text


def test_weights_of_another_run_do_not_set_the_iteration(root):
    """--resume in an empty folder starts at 0 from MODEL.WEIGHTS, though that file holds an iteration."""
    train(root / "first", "SOLVER.MAX_ITER", "3")
    _, seen = train(root / "second", "MODEL.WEIGHTS", str(root / "first" / "model_final.pth"), resume=True)
    assert sorted(seen) == list(range(6))


def test_batch_statistics_are_averaged_over_the_processes(root):
    """Before an evaluation and before a checkpoint; the mean of what the processes had, which differs."""
    out = root / "out"
    launch(micro_training.batch_norm_check, 2, args=(out,), use_cuda=False)
    first, second = (read_safetensors(out / f"rank{rank}.safetensors", "test")[0] for rank in (0, 1))
    saved = torch.load(out / "model_final.pth", weights_only=True)["model"]
    for name in ("stem.1.running_mean", "stem.1.running_var"):
        for iteration in (1, 2):
            before, after = f"before.{iteration}.{name}", f"after.{iteration}.{name}"
            assert not torch.allclose(first[before], second[before], rtol=1e-6), before
            assert torch.equal(first[after], second[after]), after
            assert torch.allclose(first[after], (first[before] + second[before]) / 2, rtol=1e-6), after
        assert torch.equal(saved[name], first[f"after.2.{name}"])


def test_two_processes_equal_one(root):
    """Weights equal on both ranks; gradient and evaluation equal to one process with the same batches of 4."""
    launch(parallel_check, 2, args=(root / "two",), use_cuda=False)
    parallel_check(root / "one")
    (first, _), (second, _), (single, _) = (
        read_safetensors(root / f"{name}.safetensors", "test") for name in ("two/rank0", "two/rank1", "one/rank0")
    )
    for name in first:
        if name != "seen":
            assert torch.equal(first[name], second[name]), name
            assert torch.allclose(first[name], single[name], atol=1e-6), name
    # Draws t, t + 2 on rank 0 and t + 1, t + 3 on rank 1 make up the batch of the single process.
    both = torch.stack([first["seen"], second["seen"]], dim=2).flatten(1)
    assert torch.equal(both, single["seen"])
    one, two = (predictions(root / name) for name in ("one", "two"))
    assert sorted(two) == sorted(one) == list(range(1, 13))
    for image_id in one:
        for key in ("scores", "boxes_xyxy"):
            assert np.allclose(one[image_id][key], two[image_id][key], atol=1e-5)


def predictions(folder):
    """The evaluator's file by image id; every image must be there once."""
    lines = (folder / "inference/ov_micro_val/predictions.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert len({line["image_id"] for line in found}) == len(found)
    return {line["image_id"]: line for line in found}


def test_nan_in_one_process_stops_all(root):
    """Both ranks end with the same message; none waits for the other."""
    options = micro_opts(root / "out") + ["MODEL.META_ARCHITECTURE", "ExplodingMicroDetector"]
    arguments = train_net.parse_args([*options, "SOLVER.CHECKPOINT_PERIOD", "2"])
    with pytest.raises(NumericalError, match="the loss is not finite at iteration 2") as caught:
        launch(micro_training.main, 2, args=(arguments,), use_cuda=False)
    ended = time.time()
    assert "process 0: loss_box" in str(caught.value) and "process 1: loss_box nan" in str(caught.value)
    assert caught.value.exit_code == 5
    assert (root / "out" / "last_checkpoint").read_text() == "model_0000001.pth"
    # The checkpoint was written one step before the NaN.
    assert ended - (root / "out" / "model_0000001.pth").stat().st_mtime < 10


def test_error_or_death_of_one_process_ends_the_other(root):
    """The other one waits in a collective operation for ever."""
    began = root / "began"
    with pytest.raises(DataError, match="^image 7 is damaged$") as caught:
        launch(micro_training.fail_while_the_other_waits, 2, args=(began, "raise"), use_cuda=False)
    assert caught.value.exit_code == 3 and time.time() - began.stat().st_mtime < 10


@pytest.mark.slow
def test_killed_process_ends_the_other(root):
    began = root / "began"
    with pytest.raises(SetupError, match="SIGKILL.*memory"):
        launch(micro_training.fail_while_the_other_waits, 2, args=(began, "kill"), use_cuda=False)
    assert time.time() - began.stat().st_mtime < 10


@pytest.mark.parametrize("arguments, code, words", [
    (["SOLVER.NO_SUCH_KEY", "1"], 2, "NO_SUCH_KEY"),
    (["SOLVER.MAX_ITER", "many"], 2, "MAX_ITER"),
    (["DATASETS.TRAIN", "('ov_coco_train_base',)"], 3, "ov_coco_train_base"),
    (["MODEL.META_ARCHITECTURE", "ExplodingMicroDetector"], 5, "the loss is not finite"),
])  # fmt: skip
def test_exit_codes(root, capsys, arguments, code, words):
    """A plain sentence and the documented code."""
    with pytest.raises(SystemExit) as ended, exit_on_error():
        train_net.run([*micro_opts(root / "out"), *arguments])
    assert ended.value.code == code and words in capsys.readouterr().err


def test_program_reports_a_wrong_key_without_traceback():
    done = run_program("train_net.py", "SOLVER.NO_SUCH_KEY", "1")
    assert done.returncode == 2 and "NO_SUCH_KEY" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("kind, largest", [("value", None), ("norm", None), ("full_model", 0.02)])
def test_gradients_are_clipped(root, kind, largest):
    """With SGD at rate 1 and no decay the weights move by the gradient: full_model bounds the whole move."""
    options = ["SOLVER.CLIP_GRADIENTS.ENABLED", "True", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", kind]
    options += ["SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "0.02", "SOLVER.BASE_LR", "1.0", "SOLVER.WARMUP_ITERS", "0"]
    options += ["SOLVER.WEIGHT_DECAY", "0.0", "SOLVER.MAX_ITER", "1"]
    seed_all_rng(0)
    before = weights(Trainer(micro_cfg(root / "out", ["MODEL.META_ARCHITECTURE", "NoisyMicroDetector", *options])))
    moved = (weights(train(root / "out", *options)[0]) - before).norm().item()
    if largest is None:
        assert moved > 0.021  # several parameters, each within its own bound
    else:
        assert moved == pytest.approx(largest, rel=1e-3)


def test_missed_expected_results_exit_1(root):
    options = micro_opts(root / "out") + ["TEST.EXPECTED_RESULTS", "[['bbox', 'AP50-novel', 100.0, 0.1]]"]
    with pytest.raises(SystemExit) as ended:
        train_net.run(options)
    assert ended.value.code == 1


def test_expected_results_without_a_test_are_not_asked_for(root):
    expected = ["TEST.EXPECTED_RESULTS", "[['bbox', 'AP50-novel', 100.0, 0.1]]", "DATASETS.TEST", "()"]
    train_net.main(train_net.parse_args([*micro_opts(root / "out"), *expected]))
    assert (root / "out" / "model_final.pth").is_file()


class TestEvalOnly:
    def test_equals_the_evaluation_after_training(self, root):
        trainer, _ = train(root / "out")
        options = micro_opts(root / "again") + ["MODEL.WEIGHTS", str(root / "out" / "model_final.pth")]
        results = train_net.main(train_net.parse_args(["--eval-only", *options]))
        assert results["bbox"] == pytest.approx(trainer._last_eval_results["bbox"], nan_ok=True)
        assert not (root / "again" / "last_checkpoint").exists()

    @pytest.mark.parametrize("switches", [[], ["--resume"]])
    def test_random_weights_are_not_evaluated(self, root, switches):
        arguments = train_net.parse_args(["--eval-only", *switches, *micro_opts(root / "out")])
        with pytest.raises(UsageError, match="no trained weights.*MODEL.WEIGHTS"):
            train_net.main(arguments)

    def test_weights_of_another_model_are_refused(self, root):
        train(root / "out", "SOLVER.MAX_ITER", "1", "DATASETS.TEST", "()")
        options = micro_opts(root / "out") + ["MODEL.META_ARCHITECTURE", "BatchNormMicroDetector"]
        for switches in (["MODEL.WEIGHTS", str(root / "out" / "model_final.pth")], []):
            arguments = train_net.parse_args(["--eval-only", *([] if switches else ["--resume"]), *options, *switches])
            with pytest.raises(DataError, match=r"model_final.pth.*stem.0.weight \(missing\)"):
                train_net.main(arguments)


class TestSetup:
    def arguments(self, root, *opts):
        return SimpleNamespace(config_file="", opts=micro_opts(root / "out") + list(opts))

    def test_writes_the_configuration_it_returns(self, root):
        cfg = setup(self.arguments(root, "SEED", "-1"))
        assert cfg.is_frozen() and cfg.SEED >= 0
        assert (root / "out" / "config.yaml").read_text() == cfg.dump()

    def test_configuration_written_is_the_scaled_one(self, root, caplog):
        """What is run, and what the trainer would not scale again."""
        logger = logging.getLogger("ovdet2.engine.start")
        logger.addHandler(caplog.handler)  # Detectron2's set-up of logging keeps records from the root logger
        try:
            cfg = setup(self.arguments(root, "SOLVER.REFERENCE_WORLD_SIZE", "2"))
        finally:
            logger.removeHandler(caplog.handler)
        assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS) == (2, 12, 6)
        assert cfg.SOLVER.BASE_LR == 0.005 and cfg.SOLVER.REFERENCE_WORLD_SIZE == 1 and cfg.is_frozen()
        assert (root / "out" / "config.yaml").read_text() == cfg.dump() == Trainer(cfg).cfg.dump()
        assert "from 2 processes to 1: IMS_PER_BATCH 2, BASE_LR 0.005, MAX_ITER 12" in caplog.text

    def test_evaluation_is_not_scaled(self, root):
        arguments = self.arguments(root, "SOLVER.REFERENCE_WORLD_SIZE", "2")
        arguments.eval_only = True
        assert setup(arguments).SOLVER.IMS_PER_BATCH == 4

    def test_batch_that_cannot_be_scaled(self, root):
        with pytest.raises(UsageError, match="IMS_PER_BATCH is 4.*REFERENCE_WORLD_SIZE, 3"):
            setup(self.arguments(root, "SOLVER.REFERENCE_WORLD_SIZE", "3"))

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
    def test_cuda_falls_back_to_the_cpu(self, root):
        assert setup(self.arguments(root, "MODEL.DEVICE", "cuda")).MODEL.DEVICE == "cpu"

    def test_switches_that_would_be_ignored_are_refused(self, root):
        with pytest.raises(UsageError, match="TEST.AUG.ENABLED"):
            setup(self.arguments(root, "TEST.AUG.ENABLED", "True"))

    def test_output_that_cannot_be_made(self, root):
        (root / "file").write_text("")
        with pytest.raises(SetupError, match="OUTPUT_DIR"):
            setup(self.arguments(root, "OUTPUT_DIR", str(root / "file" / "out")))


@pytest.mark.parametrize("overrides, words", [
    (["SOLVER.OPTIMIZER", "Lion"], "SOLVER.OPTIMIZER"),
    (["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "float16"], "SOLVER.AMP.DTYPE.*bfloat16"),
    (["SOLVER.CLIP_GRADIENTS.ENABLED", "True", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "half"], "CLIP_TYPE.*full_model"),
    (["MODEL.META_ARCHITECTURE", "NoSuchNet"], "NoSuchNet.*OpenVocabularyRCNN"),
])  # fmt: skip
def test_settings_that_do_not_go_together(root, overrides, words):
    with pytest.raises(UsageError, match=words):
        train(root / "out", *overrides)


def test_a_step_without_a_loss_names_the_kind_of_its_images():
    class Silent(torch.nn.Linear):
        def forward(self, batch):
            return {}

    model = Silent(1, 1)
    step = CheckedStep(model, [[Sample(kind="captions")]], torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(UsageError, match="a step on images of kind captions gives no loss"):
        step.run_step()


@pytest.mark.parametrize("norm, on_cuda, refused", [(torch.nn.SyncBatchNorm, False, True), (torch.nn.SyncBatchNorm, True, False), (torch.nn.BatchNorm2d, False, False)])  # fmt: skip
def test_norms_over_processes_need_cuda(norm, on_cuda, refused):
    model = torch.nn.ModuleDict({"head": torch.nn.Sequential(torch.nn.Conv2d(2, 2, 1), norm(2))})
    if not refused:
        require_norms_of_device(model, on_cuda)
        return
    with pytest.raises(UsageError, match="head.1 is a SyncBN, which needs CUDA in a run of several processes"):
        require_norms_of_device(model, on_cuda)
