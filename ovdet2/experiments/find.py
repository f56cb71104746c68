"""Finding an experiment by its name: those of the methods, or an import path."""

import importlib
import importlib.util
from typing import Any

from ovdet2.config import find_methods
from ovdet2.errors import UsageError
from ovdet2.experiments.entry import Plan


def find_plan(name: str) -> Plan:
    """The plan of a name.

    Args:
        name: "<method>.<plan>" for an entry of PLANS in experiments.py of a method's directory, such as
            "cckt.priors"; or an import path, "package.module:NAME".

    Raises:
        UsageError: there is none.
    """
    path, _, attribute = name.rpartition(":")
    if path:
        try:
            plan = getattr(importlib.import_module(path), attribute, None)
        except ModuleNotFoundError as error:
            raise UsageError(f"{path} cannot be imported ({error}): give <package.module>:<name of a Plan>.") from None
        if not isinstance(plan, Plan):
            raise UsageError(f"{path} has no {attribute} that is an ovdet2.experiments.Plan.")
        return plan
    plans = known_plans()
    if name not in plans:
        raise UsageError(f"there is no experiment {name!r}; there are {', '.join(plans)}, or give package.module:NAME.")
    return plans[name]


def known_plans() -> dict[str, Plan]:
    """{"<method>.<plan>": plan} of the methods of ovdet2 and of installed packages."""
    return {f"{method.name}.{key}": plan for method in find_methods() for key, plan in _plans_of(method).items()}


def _plans_of(method: Any) -> dict[str, Plan]:
    name = f"{type(method).__module__}.experiments"
    try:
        exists = importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the method is a module, not a package
        exists = False
    return importlib.import_module(name).PLANS if exists else {}
