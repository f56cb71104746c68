"""Learning rates by name, mixed precision of the forward pass, and the moving average of the weights."""

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from torch import nn

import train_net
from ovdet2.config import get_cfg
from ovdet2.engine import Trainer, launch
from ovdet2.engine.ema import WeightAverage
from ovdet2.engine.optimizer import build_optimizer, mixed_precision
from ovdet2.errors import DataError, UsageError
from ovdet2.io.files import read_safetensors, write_safetensors
from tests import micro_training
from tests.micro_training import micro_cfg, micro_opts, write_data
from tests.test_engine import train, weights

EMA = ["SOLVER.EMA.ENABLED", "True", "SOLVER.EMA.DECAY", "0.8"]


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder with the micro data set; runs write below it."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write_data(tmp_path)
    return tmp_path


class Parts(nn.Module):
    """Names as a detector has them."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
        self.decoder = nn.ModuleDict({"sampling_offsets": nn.Linear(2, 2), "ffn": nn.Linear(2, 2)})
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def settings_of(model, overrides):
    """{parameter name: (learning rate, weight decay)} that an optimizer gives."""
    cfg = get_cfg()
    cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY = 1.0, 0.5
    cfg.merge_from_list(overrides)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = build_optimizer(cfg, model).param_groups
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in model.parameters())
    return {names[p]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


class TestLearningRates:
    @pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
    def test_go_by_name_and_the_first_pattern(self, optimizer):
        factors = "[['backbone', 0.1], ['offsets|back', 0.5], ['frozen', 0.3]]"
        found = settings_of(Parts(), ["SOLVER.OPTIMIZER", optimizer, "SOLVER.LR_FACTORS", factors])
        assert {name: lr for name, (lr, _) in found.items()} == {
            "backbone.0.weight": 0.1, "backbone.0.bias": 0.1, "backbone.1.weight": 0.1, "backbone.1.bias": 0.1,
            "decoder.sampling_offsets.weight": 0.5, "decoder.sampling_offsets.bias": 0.5,
            "decoder.ffn.weight": 1.0, "decoder.ffn.bias": 1.0,
        }  # fmt: skip

    def test_without_factors_nothing_is_regrouped(self):
        assert {lr for lr, _ in settings_of(Parts(), []).values()} == {1.0}

    def test_decay_of_norms_is_a_key_of_its_own(self):
        factors = ["SOLVER.LR_FACTORS", "[['backbone', 0.1]]"]
        assert settings_of(Parts(), factors)["backbone.1.weight"] == (0.1, 0.0)
        assert settings_of(Parts(), [*factors, "SOLVER.WEIGHT_DECAY_NORM", "0.5"])["backbone.1.weight"] == (0.1, 0.5)
        assert settings_of(Parts(), factors)["backbone.0.weight"] == (0.1, 0.5)

    @pytest.mark.parametrize("factors, words", [
        ("[['backbon', 0.1], ['bakcbone', 0.1]]", "bakcbone.*no parameter.*backbone, decoder, frozen"),
        ("[['backbone']]", "list of .pattern, factor."),
        ("[['(', 0.1]]", "list of .pattern, factor."),
        ("['backbone', 0.1]", "list of .pattern, factor."),
    ])  # fmt: skip
    def test_factors_that_would_change_nothing(self, factors, words):
        with pytest.raises(UsageError, match=words):
            settings_of(Parts(), ["SOLVER.LR_FACTORS", factors])

    def test_schedule_keeps_the_ratio_and_a_resumed_run_too(self, root):
        """Through the warm-up and a step, and bit for bit after an interruption."""
        options = ["SOLVER.LR_FACTORS", "[['stem', 0.1]]", "SOLVER.STEPS", "(6,)", "SOLVER.MAX_ITER", "8"]
        options += ["SOLVER.CHECKPOINT_PERIOD", "4", "SOLVER.OPTIMIZER", "AdamW"]
        straight, _ = train(root / "straight", *options)
        rates = sorted({group["lr"] for group in straight.optimizer.param_groups})
        assert rates == pytest.approx([0.0001, 0.001])
        train(root / "parts", *options, stop_after=5)
        resumed, _ = train(root / "parts", *options, resume=True)
        assert torch.equal(weights(resumed), weights(straight))


@META_ARCH_REGISTRY.register()
class PrecisionMicroDetector(micro_training.MicroDetector):
    """Keeps the type of what its linear layer gives."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.types = {True: [], False: []}
        self.head.register_forward_hook(lambda _, __, found: self.types[self.training].append(found.dtype))

    def forward(self, batch):
        found = super().forward(batch)
        return {name: loss.float() for name, loss in found.items()} if self.training else found


class TestMixedPrecision:
    @pytest.mark.parametrize("enabled, expected", [("True", torch.bfloat16), ("False", torch.float32)])
    def test_covers_the_forward_pass_of_training_alone(self, root, enabled, expected):
        options = ["MODEL.META_ARCHITECTURE", "PrecisionMicroDetector", "SOLVER.AMP.ENABLED", enabled]
        trainer, _ = train(root / "out", *options)
        types = trainer.checkpointer.model.types
        assert set(types[True]) == {expected} and set(types[False]) == {torch.float32}
        assert trainer._trainer.scaler is None and weights(trainer).dtype == torch.float32

    @pytest.mark.slow
    def test_covers_it_in_several_processes(self, root):
        launch(two_processes_in_bfloat16, 2, args=(root / "out",), use_cuda=False)
        assert [(root / "out" / f"{rank}.txt").read_text() for rank in (0, 1)] == ["{torch.bfloat16}"] * 2

    def test_resumed_run_equals_an_uninterrupted_one(self, root):
        options = ["SOLVER.AMP.ENABLED", "True", "SOLVER.CHECKPOINT_PERIOD", "3"]
        straight, _ = train(root / "straight", *options)
        train(root / "parts", *options, stop_after=4)
        resumed, _ = train(root / "parts", *options, resume=True)
        assert torch.equal(weights(resumed), weights(straight))

    def test_unknown_type(self):
        cfg = get_cfg()
        cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.DTYPE = True, "float8"
        with pytest.raises(UsageError, match="float8.*bfloat16"):
            mixed_precision(cfg)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    @pytest.mark.parametrize("name", ["bfloat16", "float16"])
    def test_on_a_gpu(self, root, name):
        options = ["MODEL.META_ARCHITECTURE", "PrecisionMicroDetector", "SOLVER.AMP.ENABLED", "True"]
        cfg = micro_cfg(
            root / "out", [*options, "SOLVER.AMP.DTYPE", name, "MODEL.DEVICE", "cuda", "DATASETS.TEST", "()"]
        )
        assert mixed_precision(cfg)[0] == getattr(torch, name) and (mixed_precision(cfg)[1] is None) == ("b" in name)
        trained, _ = train(root / "trained", *options, "SOLVER.AMP.DTYPE", name, "MODEL.DEVICE", "cuda")
        assert torch.isfinite(weights(trained)).all()


def two_processes_in_bfloat16(folder):
    """In each process: the types seen in training, written to ``folder``."""
    seed_all_rng(0)
    options = ["MODEL.META_ARCHITECTURE", "PrecisionMicroDetector", "SOLVER.AMP.ENABLED", "True", "DATASETS.TEST", "()"]
    trainer = Trainer(micro_cfg(folder, options))
    trainer.train()
    (folder / f"{comm.get_rank()}.txt").write_text(str(set(trainer.checkpointer.model.types[True])))


class TestMovingAverage:
    def test_equals_the_recursion(self):
        """In float64, over parameters; buffers are the trained model's."""
        model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
        average, expected = WeightAverage(model, 0.9), None
        for _ in range(5):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter))
            model(torch.randn(4, 3, dtype=torch.float64))
            now = [parameter.detach().clone() for parameter in model.parameters()]
            expected = now if expected is None else [0.9 * old + 0.1 * new for old, new in zip(expected, now)]
            average.update()
        for found, wanted in zip(average.model.parameters(), expected):
            assert torch.allclose(found, wanted, atol=1e-12) and not found.requires_grad
        assert torch.equal(average.model[1].running_mean, model[1].running_mean)

    def test_is_what_is_evaluated_and_saved(self, root):
        trained = []
        trainer, _ = train(root / "out", *EMA, "SOLVER.MAX_ITER", "1")
        trained.append({name: p.detach().clone() for name, p in trainer._trainer.model.named_parameters()})
        trainer, _ = train(root / "out", *EMA, "SOLVER.MAX_ITER", "2", resume=True)
        trained.append({name: p.detach().clone() for name, p in trainer._trainer.model.named_parameters()})
        saved = torch.load(root / "out" / "model_final.pth", weights_only=True)["model"]
        for name, first in trained[0].items():
            wanted = 0.8 * first + 0.2 * trained[1][name]
            assert torch.allclose(saved[name], wanted, atol=1e-7) and not torch.equal(saved[name], trained[1][name])
        options = [*micro_opts(root / "again"), "MODEL.META_ARCHITECTURE", "NoisyMicroDetector"]
        options += ["MODEL.WEIGHTS", str(root / "out" / "model_final.pth")]
        results = train_net.main(train_net.parse_args(["--eval-only", *options]))
        assert results["bbox"] == pytest.approx(trainer._last_eval_results["bbox"], nan_ok=True)
        assert all(torch.equal(saved[name], p) for name, p in trainer.checkpointer.model.named_parameters())

    def test_resumed_run_equals_an_uninterrupted_one(self, root):
        """Trained weights and average alike, with an evaluation after the checkpoint."""
        options = [*EMA, "SOLVER.CHECKPOINT_PERIOD", "4", "TEST.EVAL_PERIOD", "4", "SOLVER.MAX_ITER", "8"]
        straight, expected = train(root / "straight", *options)
        train(root / "parts", *options, stop_after=5)
        resumed, found = train(root / "parts", *options, resume=True)
        assert sorted(found) == [4, 5, 6, 7] and {i: expected[i] for i in found} == found
        assert torch.equal(weights(resumed), weights(straight))
        for mine, theirs in zip(resumed._trainer.model.parameters(), straight._trainer.model.parameters()):
            assert torch.equal(mine, theirs)

    def test_does_not_change_the_training(self, root):
        plain, expected = train(root / "plain")
        averaged, found = train(root / "averaged", *EMA)
        assert found == expected
        assert torch.equal(
            torch.cat([p.detach().flatten() for p in averaged._trainer.model.parameters()]), weights(plain)
        )

    def test_starts_from_given_weights(self, root):
        """MODEL.WEIGHTS reaches the trained model, not the average alone."""
        train(root / "first", "SOLVER.MAX_ITER", "2")
        given = str(root / "first" / "model_final.pth")
        plain, expected = train(root / "plain", "MODEL.WEIGHTS", given)
        averaged, found = train(root / "averaged", *EMA, "MODEL.WEIGHTS", given)
        assert found == expected

    def test_switched_on_or_off_by_a_resumed_run(self, root):
        """The trained weights go on in both cases."""
        _, expected = train(root / "plain", "SOLVER.MAX_ITER", "6")
        train(root / "off", *EMA, "SOLVER.MAX_ITER", "3")
        _, found = train(root / "off", "SOLVER.MAX_ITER", "6", resume=True)
        assert found == {i: expected[i] for i in (3, 4, 5)}
        train(root / "on", "SOLVER.MAX_ITER", "3")
        _, found = train(root / "on", *EMA, "SOLVER.MAX_ITER", "6", resume=True)
        assert found == {i: expected[i] for i in (3, 4, 5)}

    def test_checkpoint_of_another_model(self):
        average = WeightAverage(nn.Linear(2, 2), 0.9)
        with pytest.raises(DataError, match="another model.*0.weight"):
            WeightAverage(nn.Sequential(nn.Linear(2, 2)), 0.9).load_state_dict(average.state_dict())

    def test_is_the_same_in_all_processes(self, root):
        """Parameters by averaged gradients, running statistics by averaging; each process sees other images."""
        out = root / "out"
        launch(average_in_two_processes, 2, args=(out,), use_cuda=False)
        first, second = (read_safetensors(out / f"rank{rank}.safetensors", "test")[0] for rank in (0, 1))
        saved = torch.load(out / "model_final.pth", weights_only=True)["model"]
        assert set(first) >= {"stem.1.running_mean", "head.weight"}
        for name, tensor in first.items():
            assert torch.equal(tensor, second[name]) and torch.equal(tensor, saved[name])


def average_in_two_processes(folder):
    """In each process: the averaged model after a run, written to ``folder``."""
    seed_all_rng(comm.get_rank())
    options = ["MODEL.META_ARCHITECTURE", "BatchNormMicroDetector", *EMA, "DATASETS.TEST", "()"]
    trainer = Trainer(micro_cfg(folder, options))
    trainer.resume_or_load(resume=False)
    trainer.train()
    tensors = {name: tensor.clone() for name, tensor in trainer.checkpointer.model.state_dict().items()}
    write_safetensors(folder / f"rank{comm.get_rank()}.safetensors", tensors, {"schema": "test"})
