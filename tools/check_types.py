"""Check types with pyrefly, and that every public function is annotated. Exceptions are listed; new ones are refused.

    python tools/check_types.py            # print new errors and stale list entries; exit code 1 if there are any
    python tools/check_types.py --update   # remove stale entries from the lists; entries are never added

Two lists of known exceptions are committed: .ci/type_errors.json, pyrefly's baseline, and .ci/unannotated.json, the
public functions without complete annotations, by file. A missing list is created with the current exceptions.
"""

import argparse
import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TYPE_ERRORS = ROOT / ".ci" / "type_errors.json"
UNANNOTATED = ROOT / ".ci" / "unannotated.json"
PACKAGE = "ovdet2"


def check_types(update: bool = False) -> int:
    """Run pyrefly with this Python's packages; returns its exit code: 0 without new errors and without stale entries.

    ``update`` removes stale entries of the list.
    """
    command = [sys.executable, "-m", "pyrefly", "check", "--python-interpreter-path", sys.executable]
    command += ["--baseline", str(TYPE_ERRORS.relative_to(ROOT)), "--output-format", "min-text"]
    if not TYPE_ERRORS.exists():
        command.append("--update-baseline")
    else:
        command.append("--prune-baseline" if update else "--error-stale-baseline")
    return subprocess.run(command, cwd=ROOT).returncode


def source_files(folder: Path = ROOT / PACKAGE) -> list[Path]:
    """The Python files below ``folder``, without tests."""
    return sorted(path for path in folder.rglob("*.py") if "tests" not in path.relative_to(folder).parts)


def public_functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef, bool]]:
    """The public functions of a module and the public methods of its public classes.

    Yields:
        (qualified name, definition, whether the first parameter is self or cls); names with a leading underscore are
        not public.
    """
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for member in node.body:
                if _is_public_function(member):
                    decorators = {ast.unparse(each) for each in member.decorator_list}
                    yield f"{node.name}.{member.name}", member, "staticmethod" not in decorators
        elif _is_public_function(node):
            yield node.name, node, False


def _is_public_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_")


def is_annotated(function: ast.FunctionDef | ast.AsyncFunctionDef, bound: bool) -> bool:
    """Whether the result and all parameters are annotated; with ``bound``, the first parameter is skipped."""
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args][bound:]
    others = [each for each in (arguments.vararg, arguments.kwarg) if each is not None]
    return function.returns is not None and all(
        parameter.annotation is not None for parameter in [*positional, *arguments.kwonlyargs, *others]
    )


def unannotated(root: Path = ROOT) -> dict[str, list[str]]:
    """Public functions of the package without complete annotations, by file."""
    result = {}
    for path in source_files(root / PACKAGE):
        functions = public_functions(ast.parse(path.read_text(encoding="utf-8")))
        names = [name for name, function, bound in functions if not is_annotated(function, bound)]
        if names:
            result[path.relative_to(root).as_posix()] = sorted(set(names))
    return result


def compare(known: dict[str, list[str]], now: dict[str, list[str]]) -> tuple[list[str], list[str]]:
    """(unlisted functions without annotations, listed functions that are annotated or deleted), each "file: name"."""
    before, after = ({f"{path}: {name}" for path, names in each.items() for name in names} for each in (known, now))
    return sorted(after - before), sorted(before - after)


def check_annotations(update: bool = False) -> int:
    """Compare with the list and print the differences; 1 if there are any, else 0. ``update`` removes stale entries."""
    now = unannotated()
    known = json.loads(UNANNOTATED.read_text(encoding="utf-8")) if UNANNOTATED.exists() else now
    new, stale = compare(known, now)
    for line in new:
        print(f"{line} lacks annotations of parameters or of the result")
    if update or not UNANNOTATED.exists():
        kept = {path: sorted(set(names) & set(now.get(path, ()))) for path, names in known.items()}
        kept = {path: names for path, names in sorted(kept.items()) if names}
        UNANNOTATED.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
        stale = []
    for line in stale:
        print(f"{line} is listed in {UNANNOTATED.relative_to(ROOT)} but resolved: run tools/check_types.py --update")
    return int(bool(new or stale))


def main(arguments: list[str] | None = None) -> int:
    """Run both checks; 0 if both pass."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--update", action="store_true", help="remove stale entries from the lists")
    update = parser.parse_args(arguments).update
    return max(check_annotations(update), int(check_types(update) != 0))


if __name__ == "__main__":
    sys.exit(main())
