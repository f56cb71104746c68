"""Safe loading of configurations: yaml files, overrides, keys of earlier versions, the device."""

import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode

from ovdet2.config.keys import OLD_KEYS, get_cfg
from ovdet2.config.method import Method
from ovdet2.config.methods import find_methods, methods_of
from ovdet2.errors import UsageError, did_you_mean
from ovdet2.io.devices import require_device
from ovdet2.zoo import DETECTORS

logger = logging.getLogger(__name__)

_PACKAGE = Path(__file__).resolve().parents[1]


def find_config(name: str | Path) -> Path:
    """The path of a yaml file: as given, below the package's ``configs/`` ("ovshapes/vild_text.yaml"), or of a detector.

    Raises:
        UsageError: there is no such file; the message has the most similar name, or else all of them.
    """
    if str(name) in DETECTORS:
        name = DETECTORS[str(name)].config
    shipped = _configs_folder()
    relative = Path(*Path(name).parts[1:]) if Path(name).parts[:1] == ("configs",) else Path(name)
    for candidate in (Path(name), shipped / relative):
        if candidate.is_file():
            return candidate
    known = sorted(str(path.relative_to(shipped)) for path in shipped.rglob("*.yaml"))
    meant = did_you_mean(str(relative), [*DETECTORS, *known])
    listed = f" Trained detectors: {', '.join(DETECTORS)}. Configurations of ovdet2: {', '.join(known)}."
    raise UsageError(f"there is no configuration file {name}{meant}.{'' if meant else listed}")


class _Yaml(CfgNode):
    """Reads yaml files whose ``_BASE_`` is relative to the file, or else the name of a shipped configuration."""

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> Any:
        """The content of a file over that of its base; see fvcore.

        Raises:
            UsageError: there is no such file.
        """
        if "://" in filename:
            raise UsageError(f"_BASE_ names the address {filename}: download the file, and give its path.")
        if not os.path.isfile(filename):
            parts = Path(filename).parts[filename.startswith("/") :]
            shipped = (_configs_folder().joinpath(*parts[start:]) for start in range(len(parts)))
            found = next((path for path in shipped if path.is_file()), None)
            if found is None:
                raise UsageError(
                    f"_BASE_ names {filename}, which does not exist: give a path relative to the yaml file, or a "
                    "configuration of ovdet2 such as ovshapes/vild_text_r18.yaml."
                )
            filename = str(found)
        return super().load_yaml_with_base(filename, allow_unsafe)


def load_config(
    name: str | Path, overrides: Sequence[Any] = (), extend: Callable[[CfgNode], None] | None = None
) -> CfgNode:
    """Read a yaml file over the defaults and apply ``KEY VALUE ...`` overrides.

    Keys of earlier versions are accepted, with a warning that names the current key.

    Args:
        name: path, or name below the package's ``configs/``, or of a detector of :data:`ovdet2.zoo.DETECTORS`, which
            also sets MODEL.WEIGHTS; "" for the defaults only. A file's ``_BASE_`` may be such a name, too.
        overrides: list [key, value, key, value, ...] as from a command line.
        extend: function that adds the keys of a system built on ovdet2 to the defaults (``extend(cfg)``), or None.
            Methods are named in MODEL.PARTS instead.

    Returns:
        CfgNode, not frozen. The data sets of its DATASETS.OWN are registered.

    Raises:
        UsageError: unknown file, unknown key, a value of the wrong type, a module of MODEL.PARTS that is no method, or
            an invalid entry of DATASETS.OWN; yaml tags that run code are refused.
        DataError: the weights of the named detector are not there.
    """
    named = DETECTORS.get(str(name))
    if named is not None:
        name, overrides = named.config, [*named.overrides, "MODEL.WEIGHTS", named.weights, *overrides]
    known = CfgNode()
    try:
        given = CfgNode(_Yaml.load_yaml_with_base(str(find_config(name)), allow_unsafe=False)) if name else CfgNode()
        overrides = list(overrides)
        cfg = known = get_cfg(_parts_of(given, overrides))
        if extend is not None:
            extend(cfg)
        if given.get("VERSION", cfg.VERSION) != cfg.VERSION:
            raise UsageError(f"{name} has VERSION {given.VERSION}, ovdet2 reads {cfg.VERSION}: update the file.")
        _refuse_empty(given, cfg, name)
        moved = old_keys(find_methods(cfg.MODEL.PARTS))
        _rename(given, moved, name)
        cfg.merge_from_other_cfg(given)
        cfg.merge_from_list([_current_key(part, moved) if not n % 2 else part for n, part in enumerate(overrides)])
    except RecursionError:
        raise UsageError(f"{name} is its own _BASE_, perhaps through other files: change the _BASE_ of one.") from None
    except OSError as error:
        raise UsageError(
            f"{error.filename or name} cannot be read ({error.strerror}): check its permissions."
        ) from None
    except (KeyError, ValueError, AssertionError, TypeError, AttributeError, yaml.YAMLError) as error:
        if isinstance(error, UsageError):
            raise
        reason = error if isinstance(error, yaml.YAMLError) or not error.args else error.args[0]
        unknown = re.search(r"Non-existent (?:config )?key: (\S+)", str(reason))
        hint = did_you_mean(unknown[1], _keys_of(known)) if unknown else ""
        raise UsageError(
            f"{reason}{hint}, in {name or 'the command line'} or its overrides. Keys are documented in "
            "ovdet2/config/keys.py, in the __init__.py of each method, and in Detectron2's config/defaults.py."
        ) from None
    if named is not None:
        named.require(cfg.MODEL.WEIGHTS)
    if cfg.DATASETS.OWN:
        from ovdet2.data.datasets.own import register_own  # needs torch, which most errors above do not

        register_own(cfg)
    return cfg


def _keys_of(cfg: CfgNode, prefix: str = "") -> list[str]:
    """All keys of a configuration, such as "MODEL.WEIGHTS"."""
    keys = []
    for name, value in cfg.items():
        keys += _keys_of(value, f"{prefix}{name}.") if isinstance(value, CfgNode) else [f"{prefix}{name}"]
    return keys


def _refuse_empty(given, cfg, name, path=""):
    """Refuse a group without keys, such as "OVD:" with nothing below it. It replaces the group of the file's _BASE_.

    Raises:
        UsageError: such a group.
    """
    for key, value in given.items():
        default = cfg.get(key)
        if value is None and isinstance(default, CfgNode):
            raise UsageError(f"{name} has the group {path}{key} without any key: remove it.")
        if isinstance(value, dict) and isinstance(default, CfgNode):
            _refuse_empty(value, default, name, f"{path}{key}.")


def old_keys(methods: Iterable[Method]) -> dict[str, str]:
    """{key of an earlier version: current key} of the core and of methods."""
    return OLD_KEYS | {old: new for method in methods for old, new in method.OLD_KEYS.items()}


def _parts_of(given, overrides):
    """MODEL.PARTS of a yaml file and of overrides, before the keys of these methods are known."""
    in_file = (given.get("MODEL") or {}).get("PARTS", [])
    if not isinstance(in_file, list):
        raise UsageError(
            f"MODEL.PARTS is {in_file!r}: give a list of import paths, such as [projects.Example.example]."
        )
    probe = CfgNode({"MODEL": CfgNode({"PARTS": list(in_file)})})
    for key, value in zip(overrides[::2], overrides[1::2]):
        if key == "MODEL.PARTS":
            probe.merge_from_list([key, value])
    return list(probe.MODEL.PARTS)


def _rename(given, moved, name):
    """Rename the old keys of a yaml file, in place."""
    for old, new in moved.items():
        *path, last = old.split(".")
        node = given
        for part in path:
            node = node.get(part) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last not in node:
            continue
        value = node.pop(last)
        logger.warning("%s: %s is now called %s.", name, old, new)
        *path, last = new.split(".")
        node = given
        for part in path:
            node = node.setdefault(part, CfgNode())
        if last in node:
            raise UsageError(f"{name} has {old} and {new}, which are the same key: remove {old}.")
        node[last] = value
    _drop_empty(given, {old.rpartition(".")[0] for old in moved})


def _drop_empty(given: CfgNode, groups: Iterable[str]) -> None:
    """Delete groups of keys that are empty after the renaming."""
    for group in sorted(groups, key=len, reverse=True):
        *path, last = group.split(".")
        node = given
        for part in path:
            node = node.get(part) if isinstance(node, dict) else None
        if isinstance(node, dict) and last in node and not node[last]:
            del node[last]


def _current_key(key, moved):
    if key not in moved:
        return key
    logger.warning("%s is now called %s.", key, moved[key])
    return moved[key]


def settle_device(cfg: CfgNode) -> bool:
    """Set MODEL.DEVICE to "cpu" if it is CUDA and no CUDA device exists; returns whether it was changed.

    Raises:
        UsageError: MODEL.DEVICE is neither "cpu" nor CUDA, such as "mps".
        SetupError: the machine does not have the numbered GPU.
    """
    lacking = cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available()
    if lacking:
        cfg.MODEL.DEVICE = "cpu"
    require_device(cfg.MODEL.DEVICE, "MODEL.DEVICE")
    return lacking


def without_training_parts(cfg: CfgNode) -> CfgNode:
    """A copy of a configuration for evaluation and prediction.

    Parts of a detector that only training uses are switched off, so that their files are not needed.
    """
    cfg = cfg.clone()
    frozen = cfg.is_frozen()
    cfg.defrost()
    for method in methods_of(cfg):
        method.for_evaluation(cfg)
    if frozen:
        cfg.freeze()
    return cfg


def _configs_folder() -> Path:
    """``configs/`` inside an installed package, or next to the package in a checkout."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"
