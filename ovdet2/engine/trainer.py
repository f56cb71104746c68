"""The trainer: Detectron2's hooks, schedules and evaluation around a checked step and an exact resume."""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ovdet2.config import methods_of, settle_device, without_training_parts
from ovdet2.data.datasets.register import require_metric, split_of
from ovdet2.data.datasets.splits import distractors
from ovdet2.data.loader import TestLoader, TrainLoader, build_test_loader, build_train_loader
from ovdet2.data.records import require_test_sets
from ovdet2.data.sources import TrainSource
from ovdet2.engine.batch_norm import average_batch_norm
from ovdet2.engine.checkpoint import AtomicCheckpointer, DivergedWeights
from ovdet2.engine.claim import check_claim
from ovdet2.engine.console import TrainingBar
from ovdet2.engine.ema import AverageHook, WeightAverage, restore_trained
from ovdet2.engine.finite import listed, not_finite
from ovdet2.engine.optimizer import build_optimizer, full_model_norm, mixed_precision
from ovdet2.engine.random_state import preserved_random_state, random_state, set_random_state
from ovdet2.engine.resume import carried_over, changes, parameter_names, run_settings
from ovdet2.engine.run_folder import claim_folder, release_folder, sweep_folder
from ovdet2.engine.start import require_numbers, scaled
from ovdet2.engine.step import CheckedStep
from ovdet2.engine.stop import StopHook, StopRequest
from ovdet2.errors import UsageError
from ovdet2.io.loading import WorkerError
from ovdet2.io.weights import DamagedFile
from ovdet2.modeling.part import prepare_training
from ovdet2.vocabulary.templates import clean_name

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from ovdet2.evaluation.evaluation import Evaluation
    from ovdet2.evaluation.ov_evaluator import OpenVocabularyEvaluator
    from ovdet2.vocabulary.bank import WordBank

logger = logging.getLogger(__name__)

_WRITE_PERIOD = 20


class Trainer(DefaultTrainer):
    """Detectron2's default trainer on CPU or CUDA, in one or several processes.

    Its constructor is replaced, not extended: Detectron2's wraps the model for CUDA only. The model with
    its classes and its vocabulary is built by MODEL.META_ARCHITECTURE only.
    """

    _trainer: CheckedStep  # pyrefly: ignore[bad-override]  it takes the place of Detectron2's trainers
    # Properties of the step, which Detectron2 adds to its class.
    model: nn.Module
    data_loader: Iterable[Any]
    optimizer: Optimizer

    def __init__(self, cfg: CfgNode) -> None:
        """
        Args:
            cfg: frozen configuration. With SOLVER.REFERENCE_WORLD_SIZE > 0, batch, learning rate and iterations are
                scaled to the number of processes as Detectron2 does, unless :func:`setup` has done it.

        Raises:
            UsageError: settings that do not go together, such as a source of captions and no part with a loss on them.
            DataError: the training set or a test set cannot be read, or image files of a test set are missing.
        """
        TrainerBase.__init__(self)
        require_numbers(cfg)
        cfg = scaled(cfg, comm.get_world_size())
        amp_dtype, scaler = mixed_precision(cfg)
        require_test_sets(cfg)
        data_loader = self.build_train_loader(cfg)
        model = self.build_model(cfg)
        _require_words(cfg, model)
        sources = getattr(data_loader, "sources", [])
        _require_teacher(sources, model)
        prepare_training(model, sources)
        _announce(cfg, model, sources)
        optimizer = self.build_optimizer(cfg, model)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self._trainer = CheckedStep(
            _distribute(model, getattr(data_loader, "alternates", False)),
            data_loader,
            optimizer,
            scaler,
            full_model_norm(cfg),
            amp_dtype,
        )
        self._trained = model
        self._average = WeightAverage(model, cfg.SOLVER.EMA.DECAY) if cfg.SOLVER.EMA.ENABLED else None
        # The model that is loaded, saved and evaluated.
        published = model if self._average is None else self._average.model
        self.checkpointer = AtomicCheckpointer(
            published, cfg.OUTPUT_DIR, keep=cfg.SOLVER.CHECKPOINTS_TO_KEEP, trainer=weakref.proxy(self)
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self._restored_random_state = None
        self._stop_request = StopRequest()
        self.register_hooks([*self.build_hooks()])

    def resume_or_load(self, resume: bool = True) -> None:
        """Go on from the newest complete checkpoint of OUTPUT_DIR if ``resume`` and there is one, else load MODEL.WEIGHTS."""
        if not resume and self.checkpointer.has_checkpoint():
            logger.warning(
                "%s holds checkpoints of an earlier run, which this run will replace (--resume would go on from them).",
                self.cfg.OUTPUT_DIR,
            )
        state = self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if "iteration" in state:
            self.start_iter = state["iteration"] + 1
        elif self._average is not None:
            self._average.start_training_from_average()

    def train(self) -> dict[str, Any] | None:
        """Train from ``start_iter`` to SOLVER.MAX_ITER, evaluate, and check TEST.EXPECTED_RESULTS on rank 0.

        SIGTERM and SIGINT (Ctrl-C) stop it after the step, with a checkpoint.

        Raises:
            NumericalError, DataError, SetupError: see :class:`CheckedStep`, the loader and the checkpointer; SetupError
                also if another process trains in OUTPUT_DIR.
            SystemExit, KeyboardInterrupt: stopped by SIGTERM (code 143) or SIGINT.
        """
        if comm.is_main_process() and claim_folder(self.cfg.OUTPUT_DIR):  # else setup has done it
            sweep_folder(self.cfg.OUTPUT_DIR)
        try:
            with self._stop_request:
                TrainerBase.train(self, self.start_iter, self.max_iter)
            logger.info("Trained weights: %s", self.checkpointer.get_checkpoint_file())
        finally:
            release_folder(self.cfg.OUTPUT_DIR)
            self._trainer.close()
            bad = getattr(self.data_loader, "bad_images", None)
            if bad:
                logger.warning("%d training images could not be used: %s", len(bad), ", ".join(bad))
        results = getattr(self, "_last_eval_results", None)
        if results and comm.is_main_process():
            check_claim(self.cfg, results)
        return results

    def before_train(self) -> None:
        """Run the hooks, then restore the random states of a resumed run, so that nothing can change them before."""
        super().before_train()
        if self._restored_random_state is not None:
            set_random_state(self._restored_random_state)
            self._restored_random_state = None

    def run_step(self) -> None:
        """One step; if the signal that stops the run has ended a loading process too, stop after the step before."""
        try:
            super().run_step()
        except WorkerError:
            if self._stop_request.number and comm.get_world_size() == 1 and self.iter > self.start_iter:
                self._stop_hook.stop(self.iter - 1)
            raise

    def build_hooks(self) -> list[HookBase]:
        """Timing, learning rate, checkpoints, evaluation, metrics: an evaluation that fails loses no checkpoint."""

        def settle():
            average_batch_norm(self._trained)
            if self._average is not None:
                self._average.follow_buffers()

        def evaluate():
            settle()
            done = min(self.iter + 1, self.max_iter)
            weights = f"of the run in {self.cfg.OUTPUT_DIR}, after {done} iterations"
            weights += "" if self._average is None else f", averaged with decay {self.cfg.SOLVER.EMA.DECAY}"
            # In several processes an evaluation runs to its end: a process that left it would keep the others waiting.
            with self._stop_request.immediate(comm.get_world_size() == 1):
                try:
                    self._last_eval_results = self.test(self.cfg, self.checkpointer.model, weights=weights)
                except (SystemExit, KeyboardInterrupt):
                    if self._stop_request.number:
                        self._stop_hook.stop(done - 1)
                    raise
            return self._last_eval_results

        checkpoints = CheckpointHook(self.checkpointer, self.cfg.SOLVER.CHECKPOINT_PERIOD, settle)
        device = next(self._trained.parameters()).device
        self._stop_hook = StopHook(self._stop_request, checkpoints.save_unless_saved, device)
        built: list[HookBase] = [
            hooks.IterationTimer(),
            hooks.LRScheduler(),
            *([] if self._average is None else [AverageHook(self._average)]),
            checkpoints,
            self._stop_hook,
            hooks.EvalHook(self.cfg.TEST.EVAL_PERIOD, evaluate),
        ]
        if comm.is_main_process():
            # A run of 50 steps should show more than two lines.
            period = max(1, min(_WRITE_PERIOD, self.max_iter // 10))
            built += [hooks.PeriodicWriter(self.build_writers(), period), TrainingBar()]
        return built

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs in addition to the weights; a collective call, complete on rank 0."""
        state: dict[str, Any] = TrainerBase.state_dict(self)
        state["optimizer"] = self.optimizer.state_dict()
        state["optimizer_parameters"] = parameter_names(self.optimizer, self._trained)
        state["solver_settings"] = run_settings(self.cfg)
        # Detectron2's LRScheduler hook saves it as well, if it knows the kind: version 0.6 requires torch's
        # _LRScheduler, by now an empty subclass of the real one. A schedule the hook does not know would restart
        # without a warning.
        state["scheduler"] = self.scheduler.state_dict()
        state["random"] = comm.gather(random_state())
        if self._trainer.scaler is not None:
            state["scaler"] = self._trainer.scaler.state_dict()
        if self._average is not None:
            state["average"] = self._average.state_dict()
        if hasattr(self.data_loader, "state_dict"):
            state["data"] = self.data_loader.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; with another number of processes the random states are not restored.

        Settings of SOLVER that differ from those of the saved run apply from here on.

        Raises:
            DamagedFile: it is no state of a training, or (:class:`DivergedWeights`) a state of the optimizer or of the
                average is not finite.
            UsageError: SOLVER.OPTIMIZER is another one.
        """
        state = state_dict
        if lacking := {"iteration", "optimizer", "scheduler", "random"} - state.keys():
            raise DamagedFile(f"the checkpoint holds no {', '.join(sorted(lacking))} of a training.")
        if bad := not_finite({key: state.get(key) for key in ("optimizer", "average")}):
            raise DivergedWeights(f"the saved state of the training is not finite, {listed(bad)}: it has diverged.")
        self._restore_optimizer(state)
        if self._trainer.scaler is not None and "scaler" in state:
            self._trainer.scaler.load_state_dict(state["scaler"])
        if self._average is not None and "average" in state:
            self._average.load_state_dict(state["average"])
        elif self._average is not None:
            self._average.start_training_from_average()
        elif "average" in state:
            restore_trained(self._trained, state["average"])
        if "data" in state and hasattr(self.data_loader, "load_state_dict"):
            self.data_loader.load_state_dict(state["data"])
        if len(state["random"]) == comm.get_world_size():
            self._restored_random_state = state["random"][comm.get_rank()]

    def _restore_optimizer(self, state: dict[str, Any]) -> None:
        """Restore the optimizer's moments and the position of the schedule; rates and decay are those of this run."""
        names = parameter_names(self.optimizer, self._trained)
        optimizer, untrained = carried_over(
            self.optimizer, names, state["optimizer"], state.get("optimizer_parameters")
        )
        initial_rates = list(self.scheduler.base_lrs)
        TrainerBase.load_state_dict(self, state)
        self.optimizer.load_state_dict(optimizer)
        self.scheduler.load_state_dict(state["scheduler"])
        if isinstance(self.scheduler, LRMultiplier):  # the rate of a step is a function of its number
            self.scheduler.base_lrs = initial_rates
            for group, rate in zip(self.optimizer.param_groups, self.scheduler.get_lr(), strict=True):
                group["lr"] = rate
        if changed := changes(state.get("solver_settings", {}), run_settings(self.cfg)):
            logger.warning("Other settings than in the saved run, which apply from here on: %s", "; ".join(changed))
        if untrained:
            logger.warning("The saved run did not train %s: they start without momentum.", listed(untrained))

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Build MODEL.META_ARCHITECTURE.

        Raises:
            UsageError: no such architecture is registered.
        """
        import ovdet2.modeling  # noqa: F401  registers the meta-architectures

        if cfg.MODEL.META_ARCHITECTURE not in META_ARCH_REGISTRY:
            known = ", ".join(sorted(name for name, _ in META_ARCH_REGISTRY))
            raise UsageError(f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE!r} is unknown; known are {known}.")
        return build_model(cfg)

    @classmethod
    def build_trained(cls, cfg: CfgNode) -> nn.Module:
        """MODEL.META_ARCHITECTURE with MODEL.WEIGHTS, for evaluation, on the CPU if no GPU is available.

        Raises:
            UsageError, DataError: see :meth:`build_model` and :meth:`AtomicCheckpointer.load_all`.
        """
        cfg = without_training_parts(cfg)
        cfg.defrost()  # a copy
        settle_device(cfg)
        model = cls.build_model(cfg)
        AtomicCheckpointer(model).load_all(cfg.MODEL.WEIGHTS)
        return model.eval()

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> Optimizer:
        """See :func:`ovdet2.engine.optimizer.build_optimizer`."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> TrainLoader:
        """See :func:`ovdet2.data.loader.build_train_loader`."""
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> TestLoader:
        """See :func:`ovdet2.data.loader.build_test_loader`."""
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, facts: dict[str, Any] | None = None
    ) -> OpenVocabularyEvaluator:
        """The evaluator of a data set, writing to OUTPUT_DIR/inference/<data set>.

        Args:
            facts: further entries of its report.json.

        Raises:
            UsageError: the data set's evaluator type is not one of ovdet2.
        """
        from ovdet2.evaluation.ov_evaluator import DETECTION_LIMITS, OpenVocabularyEvaluator

        kind = require_metric(dataset_name)
        if kind == "ov_lvis" and cfg.TEST.DETECTIONS_PER_IMAGE != DETECTION_LIMITS[kind]:
            logger.warning(
                "TEST.DETECTIONS_PER_IMAGE is %d; published LVIS figures are of 300.", cfg.TEST.DETECTIONS_PER_IMAGE
            )
        folder = f"{cfg.OUTPUT_DIR}/inference/{dataset_name}"
        return OpenVocabularyEvaluator(
            dataset_name,
            folder,
            max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
            proposals_per_image=min(cfg.TEST.PROPOSALS_PER_IMAGE, cfg.MODEL.RPN.POST_NMS_TOPK_TEST),
            distractors=distractors(cfg),
            facts=facts,
            decoder_layers=cfg.MODEL.DETR.DECODER_LAYERS if cfg.TEST.DECODER_LAYERS else 0,
            resamples=cfg.TEST.BOOTSTRAP,
        )

    @classmethod
    def test(
        cls,
        cfg: CfgNode,
        model: nn.Module,
        evaluators: DatasetEvaluator | Sequence[DatasetEvaluator] | None = None,
        weights: str | None = None,
    ) -> dict[str, Any]:
        """Evaluate on every DATASETS.TEST, as Detectron2's trainer does, without touching the random states.

        With TEST.HTML_REPORT, the first process draws report.html in the folder of each report.json.

        Args:
            weights: description of the model's weights in the reports; None: MODEL.WEIGHTS.

        Raises:
            UsageError: a data set has other words than the model.
        """
        if evaluators is None:
            _require_words(cfg, model)
            facts = _facts_of(model, cfg.MODEL.WEIGHTS if weights is None else weights)
            for method in methods_of(cfg):
                facts |= method.facts(cfg)
            evaluators = [
                cls.build_evaluator(cfg, name, facts | {"setting": _setting_of(cfg, model, name, weights)})
                for name in cfg.DATASETS.TEST
            ]
        evaluators = [evaluators] if isinstance(evaluators, DatasetEvaluator) else evaluators
        with preserved_random_state():
            if cfg.DATASETS.TEST:
                logger.info("Evaluating on %s", ", ".join(cfg.DATASETS.TEST))
            results = super().test(cfg, model, evaluators)
            if cfg.TEST.HTML_REPORT:
                for name, evaluator in zip(cfg.DATASETS.TEST, evaluators):
                    _draw_report(name, getattr(evaluator, "evaluation", None), f"{cfg.OUTPUT_DIR}/inference/{name}")
        return results


def _announce(cfg: CfgNode, model: nn.Module, sources: Sequence[TrainSource]) -> None:
    """Log what is trained on what."""
    millions = [
        sum(p.numel() for p in model.parameters() if p.requires_grad is wanted) / 1e6 for wanted in (True, False)
    ]
    images = "; ".join(
        f"{', '.join(source.spec.datasets)} ({len(source.records):,} images, {source.spec.images_per_step} a step)"
        for source in sources
    )
    words = _vocabulary_of(model)
    logger.info(
        "Training %s (%.1f M parameters, %.1f M frozen) on %s%s: %d steps",
        cfg.MODEL.META_ARCHITECTURE,
        *millions,
        images,
        "" if words is None else f", {words.num_base} base words",
        cfg.SOLVER.MAX_ITER,
    )


def _vocabulary_of(model: nn.Module) -> WordBank | None:
    """The words of a model; None for one without."""
    return getattr(getattr(model, "module", model), "vocabulary", None)


def _require_words(cfg: CfgNode, model: nn.Module) -> None:
    """Require that all test sets have the model's words: a detection's class is only a column of the vocabulary."""
    vocabulary = _vocabulary_of(model)
    if vocabulary is None:
        return
    for name in cfg.DATASETS.TEST:
        split = split_of(name)
        if split is None:
            continue  # build_evaluator refuses it
        wanted = (*split.names, *distractors(cfg))
        if vocabulary.names != wanted:
            raise UsageError(
                f"the model has the {len(vocabulary)} words of {cfg.DATASETS.TEST[0]}, {name} has "
                f"{len(wanted)} other words: evaluate one data set at a time, named in DATASETS.TEST."
            )


def _facts_of(model: nn.Module, weights: str) -> dict[str, Any]:
    """What a report says of the detector: its weights and, if it has words, their fingerprint, and the novel ones among
    them that it was trained on, as with pseudo labels."""
    vocabulary = _vocabulary_of(model)
    facts: dict[str, Any] = {"weights": weights}
    if vocabulary is not None:
        stated = vocabulary.words.manifest()
        kept = ("templates", "templates_sha256", "names_sha256", "synonyms_sha256", "teacher")
        facts["vocabulary"] = {"words": len(vocabulary), **{key: stated[key] for key in kept}}
        if vocabulary.words.pooling:
            facts["vocabulary"]["names_of_a_word"] = vocabulary.words.pooling
        pairs = zip(vocabulary.names, vocabulary.words.base_mask.tolist())
        trained = [n for n, base in pairs if not base and clean_name(n) in vocabulary.trained_base_names]
        if trained and vocabulary.from_checkpoint:
            logger.warning("%d novel words were trained on (%s, ...): they are not novel.", len(trained), trained[0])
            facts["novel_words_trained_on"] = trained
    return facts


def _setting_of(cfg: CfgNode, model: nn.Module, dataset: str, weights: str | None) -> dict[str, str]:
    """The entry "setting" of a report."""
    from ovdet2.evaluation.training_setting import setting_of

    vocabulary, split = _vocabulary_of(model), split_of(dataset)
    names = None
    if vocabulary is not None and (vocabulary.from_checkpoint or model.training):  # in training, those of this run
        names = vocabulary.trained_base_names
    novel = [] if split is None else [name for _, name in split.novel]
    trains = weights is None and model.training
    return setting_of(cfg, novel, cfg.MODEL.WEIGHTS if weights is None else weights, names, trains).to_report()


def _draw_report(dataset_name: str, evaluation: Evaluation | None, folder: str) -> None:
    """Write report.html; if drawing fails, the figures of the run are still kept."""
    if evaluation is None:  # not the first process, or another kind of evaluator
        return
    from ovdet2.report.html_report import write_html

    path = f"{folder}/report.html"
    try:
        split = split_of(dataset_name)
        assert split is not None  # the evaluator requires one
        write_html(path, evaluation.report, evaluation.truth, evaluation.detections, split)
    except Exception:  # noqa: BLE001
        logger.warning("%s could not be drawn; ovdet2 report make tries again.", path, exc_info=True)
    else:
        logger.info("Report: %s", path)


class CheckpointHook(HookBase):
    """Saves every ``period`` iterations as model_<iteration>.pth, and after the last one as model_final.pth.

    Registered in every process, since the random states of all of them are saved; ``settle`` is called before, to
    average their batch statistics.
    """

    def __init__(self, checkpointer: DetectionCheckpointer, period: int, settle: Callable[[], object]) -> None:
        self.checkpointer = checkpointer
        self.period = period
        self.settle = settle
        self._saved = -1  # the iteration of the latest checkpoint of this process

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done == self.trainer.max_iter:
            self._save("model_final", self.trainer.iter)
        elif self.period > 0 and done % self.period == 0:
            self.save_unless_saved(self.trainer.iter)

    def save_unless_saved(self, iteration: int) -> None:
        """A periodic checkpoint after ``iteration``, unless it has one."""
        if self._saved != iteration:
            self._save(f"model_{iteration:07d}", iteration)

    def _save(self, name, iteration):
        self.settle()
        self.checkpointer.save(name, iteration=iteration)
        self._saved = iteration


def _distribute(model: nn.Module, alternates: bool = False) -> nn.Module:
    """Average gradients over the processes, if there are several; the device is where the parameters are.

    Args:
        model: to train.
        alternates: whether sources alternate: a step then gives gradients only to parameters that its source uses.
    """
    if comm.get_world_size() == 1:
        return model
    on_cuda = next(model.parameters()).is_cuda
    require_norms_of_device(model, on_cuda)
    device_ids = [comm.get_local_rank()] if on_cuda else None
    # Buffers are not sent at every step: the vocabulary and frozen statistics are the same everywhere, and running
    # statistics are averaged before they are used (average_batch_norm). torch 2.15 renamed the switch.
    names = inspect.signature(DistributedDataParallel).parameters
    switch = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    options: dict[str, Any] = {switch: False}
    return DistributedDataParallel(model, device_ids=device_ids, find_unused_parameters=alternates, **options)


def require_norms_of_device(model: nn.Module, on_cuda: bool) -> None:
    """Refuse batch norms over several processes on a CPU, where torch has none: they would fail in the first step.

    Raises:
        UsageError: names a module.
    """
    if on_cuda:
        return
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm):
            raise UsageError(
                f'{name} is a SyncBN, which needs CUDA in a run of several processes: set the norms that are "SyncBN" '
                '(MODEL.*.NORM) to "BN" or "GN", or train in one process.'
            )


def _require_teacher(sources: Sequence[TrainSource], model: nn.Module) -> None:
    """Require one teacher for the vocabulary and for what steps attach to samples, by the hash of its weights.

    Raises:
        CacheError: names both teachers.
    """
    vocabulary = _vocabulary_of(model)
    if vocabulary is None:
        return
    for step in [step for source in sources for step in source.steps]:
        step.require_teacher(vocabulary.teacher, "the vocabulary")
