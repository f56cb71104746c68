"""What may depend on what: hosts, data and engine name no method, and packages import downwards only."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

from ovdet2.config import find_methods, get_cfg

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ovdet2"
METHODS = sorted(path.parent.name for path in (PACKAGE / "methods").glob("*/__init__.py"))
# Above the methods: they may name one. Everything else finds methods through ovdet2.config.
MAY_NAME_METHODS = ("methods", "ov_shapes", "programs")

# Each package may import from those before it, and from itself. Above stand the command line and the programs.
FLOORS = (
    ("errors", "__init__"),
    ("io", "layers"),
    ("ov_shapes.world",),
    ("vlm",),
    ("vocabulary",),
    ("caches", "priors"),
    ("config", "zoo"),
    ("data",),
    ("modeling", "evaluation", "report"),
    ("methods",),
    ("engine",),
    ("predictor", "zero_shot"),
    ("ov_shapes", "experiments", "bench", "programs", "command_line", "doctor"),
    ("cli", "__main__"),
)
# Programs of a method, in its directory: they stand on the floor of the programs.
PROGRAMS_OF_METHODS = ("bench", "experiments")


def modules():
    """(dotted name below ovdet2, syntax tree) of every module but tests."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if "tests" not in parts:
            yield ".".join(part for part in parts if part != "__init__") or "__init__", ast.parse(path.read_text())


MODULES = dict(modules())


def imports(tree):
    """(module below ovdet2, name or None, line) of every import of ovdet2, whatever function it stands in."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.split(".")[0] == "ovdet2"
            and not node.level
        ):
            for alias in node.names:
                below = node.module.partition(".")[2]
                inner = f"{below}.{alias.name}".strip(".")
                yield (inner, None, node.lineno) if inner in MODULES else (below or "__init__", alias.name, node.lineno)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "ovdet2":
                    yield alias.name.partition(".")[2] or "__init__", None, node.lineno


def chain(node):
    """ "cfg.MODEL.CCKT.PRIORS" of an attribute chain; "" where it is none."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ".".join(reversed(parts))


def docstrings(tree):
    """The nodes of all docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                yield first.value


def floor_of(module):
    """The floor of a module: that of its longest listed prefix."""
    if module.startswith("methods.") and module.split(".")[2:3] in ([name] for name in PROGRAMS_OF_METHODS):
        return next(number for number, names in enumerate(FLOORS) if "programs" in names)
    found = [
        (len(name), number) for number, names in enumerate(FLOORS) for name in names
        if module == name or module.startswith(f"{name}.")
    ]  # fmt: skip
    assert found, f"{module} is on no floor: add its package to FLOORS"
    return max(found)[1]


def test_the_methods_are_found_by_their_directories():
    assert [method.name for method in find_methods()][: len(METHODS)] == METHODS


def key_groups():
    """The groups of keys that each method adds below MODEL."""
    known = get_cfg()
    core = {name: value for name, value in known.MODEL.items()}
    groups = {}
    for method in find_methods():
        probe = get_cfg()
        for name in core:
            if name not in ("PARTS", "OVD"):
                del probe.MODEL[name]
        method.add_keys(probe)
        groups[method.name] = {name for name in probe.MODEL if name not in ("PARTS", "OVD")}
    return groups


@pytest.mark.parametrize("module", [name for name in MODULES if not name.startswith(MAY_NAME_METHODS)])
def test_no_module_outside_names_a_method(module):
    tree, groups = MODULES[module], {group for names in key_groups().values() for group in names}
    faults = [
        f"line {line} imports {target}" for target, name, line in imports(tree)
        if target.startswith("methods.") or (target == "methods" and name is not None)
    ]  # fmt: skip
    prose = set(map(id, docstrings(tree)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            parts = chain(node).split(".")
            faults += [
                f"line {node.lineno} reads {'.'.join(parts)}" for group in groups
                if "MODEL" in parts and parts[parts.index("MODEL") + 1 :][:1] == [group]
            ]  # fmt: skip
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            faults += [f"line {node.lineno} says MODEL.{g}" for g in groups if f"MODEL.{g}" in node.value]
    assert not faults, "; ".join(sorted(set(faults)))


# Names of the core that only one method uses today, and why they are not its own.
SHARED_ALL_THE_SAME = {
    "ovdet2.modeling.contrastive": "one InfoNCE for every method, gathered over processes",
    "ovdet2.modeling.weak.region_word": "region-word losses, of which each method on captions takes some",
    "ovdet2.modeling.weak.samplers": "region samplers, of which each method on captions takes some",
    "ovdet2.data.steps.regions": "read by ViLD and by projects",
    "ovdet2.experiments.command": "what the runner offers to the tables of any method",
}


def test_the_core_defines_nothing_that_one_method_alone_uses():
    users = defaultdict(set)
    for module, tree in MODULES.items():
        for target, name, _ in imports(tree):
            if name is not None:
                users[target, name].add(module)
    faults = []
    for module, tree in MODULES.items():
        if module.startswith(MAY_NAME_METHODS) or f"ovdet2.{module}" in SHARED_ALL_THE_SAME:
            continue
        named_here = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        named_here |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in named_here:
                of = {tuple(user.split(".")[:2]) for user in users[module, node.name]}
                if len(of) == 1 and next(iter(of))[0] == "methods" and len(next(iter(of))) == 2:
                    faults.append(f"{module}.{node.name} is used by {'.'.join(next(iter(of)))} alone")
    assert not faults, "\n".join(faults)


# Imports within functions that look up: a registry is filled, or a file is read, only when it is needed.
LATE = {
    (
        "config.load",
        "data.datasets.own",
    ): "the data sets of DATASETS.OWN are registered once a configuration is read",
    ("config.methods", "methods"): "the folder of methods is listed",
}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down(module):
    faults = [
        f"line {line}: {module} (floor {floor_of(module)}) imports {target} (floor {floor_of(target)})"
        for target, _, line in imports(MODULES[module])
        if floor_of(target) > floor_of(module) and (module, target) not in LATE and not _for_types(module, line)
    ]
    assert not faults, "\n".join(faults)


def _for_types(module, line):
    """Whether a line stands under ``if TYPE_CHECKING``."""
    return any(
        isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        and node.lineno <= line <= node.end_lineno
        for node in ast.walk(MODULES[module])
    )  # fmt: skip


def test_no_circle_of_files():
    graph = {
        module: {target for target, _, line in imports(tree) if target != module and not _for_types(module, line)}
        for module, tree in MODULES.items()
    }
    done, path = set(), []

    def visit(module):
        if module in path:
            raise AssertionError(" -> ".join([*path[path.index(module) :], module]))
        if module not in done:
            path.append(module)
            for target in graph.get(module, ()):
                visit(target)
            done.add(path.pop())

    for module in graph:
        visit(module)


def test_projects_import_from_ovdet2_and_ovdet2_from_no_project():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            wrong = [name for name in names if name.split(".")[0] in ("projects", "tools", "clim")]
            assert not wrong, f"{path} imports {wrong}"
