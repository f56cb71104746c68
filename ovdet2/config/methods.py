"""Discovery of methods: by directory, by entry point, by import path in the configuration."""

import functools
import importlib
import logging
import pkgutil
from collections.abc import Iterable
from importlib.metadata import entry_points

from detectron2.config import CfgNode

import ovdet2.methods
from ovdet2.config.method import Method
from ovdet2.errors import UsageError

logger = logging.getLogger(__name__)

GROUP = "ovdet2.parts"


def find_methods(paths: Iterable[str] = ()) -> tuple[Method, ...]:
    """The methods of ovdet2 by name, those of installed packages, then those of ``paths``.

    Args:
        paths: import paths of modules with a ``METHOD``, as of MODEL.PARTS; a method that is known already is skipped.

    Raises:
        UsageError: a module cannot be imported or has no METHOD, or two methods have one name.
    """
    methods = list(_installed())
    for path in paths:
        method = _method_of(path)
        if method not in methods:
            methods.append(method)
    names = [method.name for method in methods]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"several methods are named {', '.join(twice)}: rename one, or remove it from MODEL.PARTS.")
    return tuple(methods)


def methods_of(cfg: CfgNode) -> tuple[Method, ...]:
    """:func:`find_methods` with MODEL.PARTS."""
    return find_methods(cfg.MODEL.PARTS)


def _with_background(cfg):
    """The secondary scores that have a background column."""
    return [name for method in methods_of(cfg) if method.scores_background for name in method.secondary_scores]


def check_methods(cfg: CfgNode) -> None:
    """Refuse contradictory settings of methods, and methods that the meta-architecture does not support.

    What the methods in use add to Detectron2's registries is imported.

    Raises:
        UsageError: the message names the keys.
    """
    known = [name for method in methods_of(cfg) for name in method.secondary_scores]
    chosen = cfg.MODEL.OVD.SECONDARY_SCORES
    if chosen != "none" and chosen not in known:
        raise UsageError(
            f"MODEL.OVD.SECONDARY_SCORES is {chosen!r}: choose one of {', '.join(['none', *known])}, or name the "
            "method that provides it in MODEL.PARTS."
        )
    background = cfg.MODEL.OVD.SECONDARY_BACKGROUND
    if background != "none" and (chosen == "none" or chosen in _with_background(cfg)):
        reason = "there are no secondary scores" if chosen == "none" else f"the scores {chosen!r} have a background"
        raise UsageError(f'MODEL.OVD.SECONDARY_BACKGROUND is {background!r}, but {reason}: set it to "none".')
    for method in methods_of(cfg):
        method.check(cfg)
        host = cfg.MODEL.META_ARCHITECTURE
        if method.is_on(cfg) and method.hosts and host not in method.hosts:
            raise UsageError(
                f"the configuration switches on {method.name}, which is for {' and '.join(method.hosts)}: {host} "
                "would ignore it. Set its keys to their defaults, or choose another MODEL.META_ARCHITECTURE."
            )
        if method.is_on(cfg):
            method.register()


@functools.lru_cache(maxsize=1)
def _installed() -> tuple[Method, ...]:
    own = sorted(module.name for module in pkgutil.iter_modules(ovdet2.methods.__path__) if module.ispkg)
    methods = [_method_of(f"ovdet2.methods.{name}", "ovdet2") for name in own]
    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.value, point.name)):
        try:
            methods.append(_method_of(point.module, f"the entry point {point.name} of {GROUP}"))
        except Exception as error:  # noqa: BLE001  a broken package must not stop the programs that do not need it
            logger.warning("An installed package is skipped: %s", error)
    return tuple(methods)


def _method_of(path: str, owner: str = "MODEL.PARTS") -> Method:
    """METHOD of a module; ``owner`` is what names the module, for messages."""
    if not isinstance(path, str) or not all(part.isidentifier() for part in path.split(".")):
        raise UsageError(f"{owner} names {path!r}: give import paths of modules, such as projects.Example.example.")
    try:
        module = importlib.import_module(path)
    except (ImportError, SyntaxError) as error:
        # Whether the module itself is missing, or something that it imports.
        missing = isinstance(error, ModuleNotFoundError) and f"{path}.".startswith(f"{error.name}.")
        remedy = "run in the folder that contains its top-level package, or install the package"
        raise UsageError(
            f"{owner} names {path}, which cannot be imported ({type(error).__name__}: {error}): "
            f"{remedy if missing else 'correct the module, or install what it imports'}."
        ) from error
    method = getattr(module, "METHOD", None)
    if not isinstance(method, Method):
        what = "is a class: write METHOD = <Class>()" if isinstance(method, type) else "is lacking or is something else"
        raise UsageError(f"METHOD of {path}, an instance of a subclass of ovdet2.config.Method, {what}.")
    if not method.name.isidentifier():
        raise UsageError(f"the method of {path} is named {method.name!r}: its name must be a Python identifier.")
    return method
