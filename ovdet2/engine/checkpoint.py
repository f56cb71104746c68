"""Checkpoints: atomic writing, safe reading of untrusted files, and fallback from a damaged file to an older one."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from torch import Tensor, nn

from ovdet2.config import find_methods
from ovdet2.engine.finite import listed, not_finite
from ovdet2.errors import DataError, NumericalError, SetupError, UsageError
from ovdet2.io.files import atomic_path, write_text
from ovdet2.io.weights import DamagedFile, read_weights, verify_archive
from ovdet2.modeling.part import parts_of

if TYPE_CHECKING:
    from fvcore.common.checkpoint import _IncompatibleKeys

logger = logging.getLogger(__name__)

_POINTER = "last_checkpoint"
_PERIODIC = re.compile(r"model_\d{7}\.pth")
_CONNECT_SECONDS = 20
_ASSET, _ASSETS = "ovdet2://", Path(__file__).resolve().parents[1] / "assets"
_SHOWN = 5  # keys named in an error message


class DivergedWeights(DamagedFile):
    """A checkpoint whose state of the training is not finite; :func:`read_weights` refuses such weights."""


class AtomicCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer with atomic writing, safe reading, and fallback from a damaged file to an older one.

    A checkpoint is written to a temporary file, fsynced and renamed; then the pointer ``last_checkpoint`` is
    replaced in the same way; only then are older files removed. The pointer names a complete file at all times.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        save_to_disk: bool | None = None,
        keep: int = 2,
        **checkpointables: Any,
    ) -> None:
        """
        Args:
            model: or its DistributedDataParallel wrapper.
            save_dir: folder of the run.
            save_to_disk: whether this process writes; None: rank 0 only.
            keep: how many periodic checkpoints stay (the default: one to resume from and one to fall back to);
                0 keeps all. ``model_final.pth``, other names and the file pointed to are never removed.
            checkpointables: named objects with ``state_dict`` and ``load_state_dict``.
        """
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.keep = keep
        self._exact = False  # whether the file must have all parameters, as when resuming
        self._incompatible: _IncompatibleKeys | None = None  # entries that the latest load did not find or use
        self.loaded = ""  # the file or URL of the latest load

    def save(self, name: str, **extra: Any) -> None:
        """Write ``<save_dir>/<name>.pth`` and point to it.

        Call it in every process: the state of the checkpointables may be gathered. Rank 0 writes.

        Raises:
            SetupError: the file cannot be written; files written before are untouched.
            NumericalError: a weight or a state of the optimizer is not finite; nothing is written.
        """
        if not self.save_dir:
            return
        data = {"model": self.model.state_dict()}
        data.update((key, item.state_dict()) for key, item in self.checkpointables.items())
        data.update(extra)
        if bad := not_finite(data):
            raise NumericalError(
                f"the training has diverged: {listed(bad)} are not finite, so {name}.pth is not written. Lower "
                "SOLVER.BASE_LR, lengthen SOLVER.WARMUP_ITERS or clip gradients (SOLVER.CLIP_GRADIENTS), and go on with "
                f"--resume from {self.get_checkpoint_file() or 'the start: there is no checkpoint yet'}."
            )
        if not self.save_to_disk:
            return
        path = Path(self.save_dir) / f"{name}.pth"
        self.logger.info("Saving checkpoint to %s", path)
        try:
            with atomic_path(path) as temporary:
                torch.save(data, temporary)
            self.tag_last_checkpoint(path.name)
        except (OSError, RuntimeError) as error:
            # torch's zip writer reports a full disk as a RuntimeError.
            raise SetupError(
                f"cannot write the checkpoint {path} ({error}): free some disk space and go on with --resume; "
                f"the latest complete checkpoint is {self.get_checkpoint_file() or 'none'}."
            ) from error
        self._remove_old()

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Point to the newest checkpoint, atomically."""
        write_text(Path(self.save_dir) / _POINTER, last_filename_basename)

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load weights, and checkpointables if requested, as Detectron2 does.

        Args:
            path: file, or URL (http, https, detectron2://, ovdet2:// for a file of ovdet2/assets); "" loads nothing.

        Raises:
            DataError: the file is missing, cannot be downloaded, is damaged, has weights that are not finite, or could
                run code.
        """
        loaded = self._load(path, 'or to "" to start from scratch', *args, **kwargs)
        if path and self._incompatible is not None:
            _announce(self.loaded, self._incompatible)
        return loaded

    def _load(self, path, otherwise, *args, **kwargs):
        self.loaded = path
        if path and not os.path.isfile(path):
            path = self._fetch(path, otherwise)
        return super().load(path, *args, **kwargs)

    def load_all(self, path: str) -> dict[str, Any]:
        """Load all weights of a trained model, for evaluation and prediction; a missing one is an error.

        Entries may be missing for modules that take the vocabulary of this run (see :meth:`_load_model`), and for what
        only training uses: parts that are ``training_only``, and the step counts of batch normalisation,
        which converted files lack.

        Args:
            path: as for :meth:`load`.

        Returns:
            As of :meth:`load`.

        Raises:
            UsageError: the path is empty.
            DataError: as of :meth:`load`, or weights of the model are not in the file or have another shape.
        """
        if not path:
            raise UsageError("there are no trained weights to evaluate: set MODEL.WEIGHTS to a checkpoint.")
        loaded = self._load(path, "to evaluate or predict", checkpointables=[])
        unused, incompatible = self._training_only(), self._incompatible
        assert incompatible is not None  # set by the load of a file
        if self._holds_only_the_backbone(incompatible):
            raise DataError(
                f"{path} holds only the backbone, from which training starts, and no trained detector: set MODEL.WEIGHTS "
                "to a checkpoint of a training, such as OUTPUT_DIR/model_final.pth."
            )
        misshaped = [
            f"{name} ({list(saved)} in the file, {list(wanted)} in the model)"
            for name, saved, wanted in incompatible.incorrect_shapes
            if not name.startswith(unused)
        ]
        reported = {name for name, _, _ in incompatible.incorrect_shapes}
        missing = [
            f"{name} (missing)"
            for name in incompatible.missing_keys
            if name not in reported and not name.endswith(".num_batches_tracked") and not name.startswith(unused)
        ]
        faults = misshaped + missing
        if faults:
            shown = ", ".join(faults[:_SHOWN]) + (", ..." if len(faults) > _SHOWN else "")
            raise DataError(
                f"{path} does not hold {len(faults)} of the model's weights: {shown}. "
                "Use the configuration the file was trained with, or a file of this configuration."
            )
        _announce(path, incompatible)
        return loaded

    def resume_or_load(self, path: str, *, resume: bool = True, complete: bool = False) -> dict[str, Any]:
        """Resume from the newest complete checkpoint of the folder, or load ``path`` if there is none or ``resume`` is False.

        Args:
            path: as for :meth:`load`.
            resume: whether to look into the folder first.
            complete: load only the weights, all of them, by :meth:`load_all`: for an evaluation.

        Returns:
            What the checkpoint resumed from holds in addition to the weights, such as "iteration"; empty when ``path``
            was loaded, whose iterations are not those of this run.

        Raises:
            UsageError: ``complete``, and there is nothing to load; or the run that wrote the checkpoint had another model.
            DataError: there are checkpoints and none can be read, or the processes see different ones; see
                :meth:`load` and :meth:`load_all`.
        """
        candidates = self._newest_first() if resume else []
        if not candidates:
            self.load_all(path) if complete else self.load(path, checkpointables=[])
            return {}
        for candidate in candidates:
            try:
                verify_archive(candidate)
                self._exact = not complete
                loaded = self.load_all(str(candidate)) if complete else self.load(str(candidate))
            except DamagedFile as error:
                self.logger.warning("%s Trying the checkpoint before it.", error)
                continue
            finally:
                self._exact = False
            chosen = comm.all_gather(candidate.name)
            if len(set(chosen)) > 1:
                raise DataError(f"the processes resumed from different files ({chosen}): share {self.save_dir}.")
            return loaded
        raise DataError(
            f"none of the checkpoints of {self.save_dir} can be read: start without --resume, or in another OUTPUT_DIR."
        )

    def _fetch(self, path, otherwise):
        """The local copy of a URL; ``otherwise`` ends the remedy "set MODEL.WEIGHTS to a file"."""
        if str(path).startswith(_ASSET):
            local = str(_ASSETS / path.removeprefix(_ASSET))
            if not os.path.isfile(local):
                raise DataError(f"{path} is not among the files that come with ovdet2 ({local} is missing).")
            return local
        try:
            with _connect_timeout():
                local = self.path_manager.get_local_path(path)
        except Exception as error:  # each protocol of the path manager raises its own kind
            raise DataError(
                f"the weights {path} cannot be fetched ({type(error).__name__}: {error}): download them elsewhere and "
                f"set MODEL.WEIGHTS to the file, {otherwise}."
            ) from error
        if not os.path.isfile(local):
            raise DataError(f"the weights {path} do not exist: set MODEL.WEIGHTS to a file, {otherwise}.")
        return local

    def _load_file(self, filename):
        return read_weights(filename)

    def _load_model(self, checkpoint):
        """Load the weights except those of modules that take the vocabulary of this run.

        A sub-module with ``adopt_saved_vocabulary(saved)`` receives its own entries, prefix removed, and decides.
        What the checkpoint has of a training-only part that the model lacks is skipped without a warning. Entries of
        earlier versions get the names of today.
        """
        adopting = [(f"{name}.", adopt) for name, adopt in self._adopting()]
        weights = checkpoint["model"] = with_present_names(checkpoint["model"], self.model)
        lacking = tuple(prefix for prefix in self._training_only() if getattr(self.model, prefix[:-1], None) is None)
        for name in [name for name in weights if name.startswith(lacking)]:
            del weights[name]
        for prefix, adopt in adopting:
            saved = {name[len(prefix) :]: weights.pop(name) for name in list(weights) if name.startswith(prefix)}
            if saved:
                adopt(saved)
        incompatible = super()._load_model(checkpoint)
        prefixes = tuple(prefix for prefix, _ in adopting)
        if prefixes:
            incompatible.missing_keys[:] = [k for k in incompatible.missing_keys if not k.startswith(prefixes)]
        self._incompatible = incompatible
        if self._exact:
            self._require_parameters(incompatible)
        return incompatible

    def _require_parameters(self, incompatible):
        """Require all parameters of the model in a file to resume from: their optimizer state is in it as well."""
        parameters = {name for name, _ in self.model.named_parameters()}
        shapes = {
            name: f"{name} ({list(saved)}, now {list(now)})" for name, saved, now in incompatible.incorrect_shapes
        }
        absent = [name for name in incompatible.missing_keys if name in parameters and name not in shapes]
        if faults := [*shapes.values(), *absent]:
            raise UsageError(
                f"{self.loaded} is of a run of another model, which lacks {listed(faults)}: resume with the "
                "configuration of that run (config.yaml of its OUTPUT_DIR), or start anew from the weights, with "
                "MODEL.WEIGHTS and another OUTPUT_DIR."
            )

    def get_checkpoint_file(self) -> str:
        """The file that the pointer names; "" without one, or if its bytes are no file name."""
        try:
            return super().get_checkpoint_file()
        except ValueError:  # neither UTF-8 nor, with a NUL byte, a path
            self.logger.warning("%s/%s is damaged: the newest checkpoint is used.", self.save_dir, _POINTER)
            return ""

    def _holds_only_the_backbone(self, incompatible):
        absent = {name for name, _, _ in incompatible.incorrect_shapes} | set(incompatible.missing_keys)
        adopting = tuple(f"{name}." for name, _ in self._adopting())
        found = [name for name in self.model.state_dict() if name not in absent and not name.startswith(adopting)]
        return bool(incompatible.missing_keys and found) and all(name.startswith("backbone.") for name in found)

    def _adopting(self):
        """(name, method) of each sub-module that takes its entries itself."""
        for name, module in self.model.named_modules():
            if name and (adopt := getattr(module, "adopt_saved_vocabulary", None)) is not None:
                yield name, adopt

    def _training_only(self):
        """Entry prefixes of training-only parts, including parts that the model does not have."""
        parts = [part.name for part in parts_of(self.model) if part.training_only]
        absent = [method.name for method in find_methods() if method.training_only]
        return tuple(f"{name}." for name in dict.fromkeys(parts + absent))

    def _newest_first(self):
        """The pointed-to checkpoint, then the periodic ones by the time they were written."""
        folder = Path(self.save_dir)
        named = self.get_checkpoint_file() if self.has_checkpoint() else ""
        pointed = [Path(named)] if named else []
        others = [path for path in self._periodic() if path not in pointed]
        return [path for path in pointed + others if path.parent == folder]

    def _periodic(self):
        """Periodic checkpoints, the newest first. By time, since the folder may hold a longer run's higher numbers."""
        found = [path for path in Path(self.save_dir).glob("model_*.pth") if _PERIODIC.fullmatch(path.name)]
        return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)

    def _remove_old(self):
        pointed = Path(self.get_checkpoint_file())
        for path in self._periodic()[self.keep :] if self.keep else []:
            if path != pointed:
                path.unlink(missing_ok=True)


def _announce(source: str, incompatible: _IncompatibleKeys) -> None:
    """Log what was loaded, which modules of the model it does not hold, and what of it the model does not use."""
    misshaped = [name for name, _, _ in incompatible.incorrect_shapes]
    missing = [name for name in incompatible.missing_keys if name not in misshaped]
    notes = [
        f"{what} {_modules(names)}"
        for what, names in (
            ("not in the file, so at their initial values:", missing),
            ("of another shape in the file, so at their initial values:", misshaped),
            ("in the file, but not in the model:", incompatible.unexpected_keys),
        )
        if names
    ]
    logger.info("Weights: %s%s", source, "".join(f"; {note}" for note in notes))


def _modules(names: Sequence[str]) -> str:
    """The first modules of some entries, to two levels."""
    modules = list(dict.fromkeys(".".join(name.split(".")[:2]) for name in names))
    return ", ".join(modules[:_SHOWN]) + f" and {len(modules) - _SHOWN} more" * (len(modules) > _SHOWN)


def with_present_names(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The entries of a checkpoint under the present names of the model's parts.

    Args:
        weights: by the names of this or of an earlier version.
        model: with ``parts``, if it has any, whose ``old_weights`` map former prefixes to present ones.
    """
    present = dict(weights)
    for part in parts_of(model):
        for old, new in part.old_weights.items():
            for name in [name for name in present if name.startswith(old)]:
                present[new + name.removeprefix(old)] = present.pop(name)
    return present


@contextlib.contextmanager
def _connect_timeout():
    """A limit for sockets: without one, an unreachable host keeps the run waiting for minutes without a message."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_CONNECT_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
