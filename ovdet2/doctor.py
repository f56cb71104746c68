"""Check the environment, or install Detectron2.

    ovdet2 doctor
    ovdet2 doctor --only detectron2 --only cuda
    # install Detectron2 0.6 in pure Python, unless a usable one is installed
    ovdet2 doctor --install-detectron2

Prints what works, and each problem with its remedy. Most checks call the function in question (NMS, a scheduler, a
process group), because version numbers do not show whether it works.

Exit codes: 0 no problem, 4 at least one problem.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ovdet2.command_line import command_parser
from ovdet2.io.shared_memory import SHARED_MEMORY, shared_memory

OK, NOTE, WRONG = "ok", "note", "wrong"
INSTALL = "--install-detectron2"
INSTALL_DETECTRON2 = f"Run `ovdet2 doctor {INSTALL}`."
INSTALL_OVDET2 = "Run `pip install -c constraints.txt .` in the project folder."
ASSETS = Path(__file__).resolve().parent / "assets"


class Finding(NamedTuple):
    """Result of a check.

    Attributes:
        status: "ok", "note" (works with a limitation) or "wrong".
        sentence: the result, with the remedy if wrong.
    """

    status: str
    sentence: str


def check_python(version: tuple[int, ...] | None = None) -> Finding:
    """Python must be 3.11 or later."""
    version = tuple(version or sys.version_info)[:3]
    text = ".".join(map(str, version))
    if version < (3, 11):
        return Finding(WRONG, f"Python {text} is too old. Use Python 3.11 or later: `make PYTHON=python3.11 demo`.")
    return Finding(OK, f"Python {text}.")


def check_torch_pair() -> Finding:
    """torch and torchvision must be compatible; tested by a call of torchvision's compiled NMS."""
    pair = f"torch {_version('torch')} and torchvision {_version('torchvision')}"
    try:
        torch = importlib.import_module("torch")
        ops = importlib.import_module("torchvision.ops")
        boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 2.1], [5.0, 5.0, 6.0, 6.0]])
        kept = ops.nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5).tolist()
    except Exception as error:  # an incompatible pair raises many types
        return Finding(
            WRONG,
            f"{pair} do not work together ({_reason(error)}). Install the pair of constraints.txt from the same index: "
            "`pip install --force-reinstall -c constraints.txt torch torchvision`.",
        )
    if kept != [0, 2]:
        return Finding(WRONG, f"{pair}: NMS returned {kept}, expected [0, 2]. Reinstall both from constraints.txt.")
    return Finding(OK, f"{pair} work together (NMS was called).")


def check_requirements() -> Finding:
    """Every library of setup.py must be installed in a version that setup.py allows."""
    try:
        requirement_class = importlib.import_module("packaging.requirements").Requirement
        requirements = [requirement_class(line) for line in importlib.metadata.requires("ovdet2") or ()]
    except ImportError:  # PackageNotFoundError is one
        return Finding(NOTE, f"ovdet2 is not installed, so the versions of its libraries are unknown. {INSTALL_OVDET2}")
    problems, count = [], 0
    for requirement in requirements:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        count += 1
        version = _version(requirement.name)
        if version is None:
            problems.append(f"{requirement.name} is missing")
        elif not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"{requirement.name} is {version}, allowed is {requirement.specifier}")
    if problems:
        return Finding(WRONG, f"{'; '.join(problems)}. {INSTALL_OVDET2}")
    return Finding(OK, f"All {count} libraries of setup.py are installed in versions it allows.")


def check_import(module: str, purpose: str, remedy: str = INSTALL_OVDET2) -> Finding:
    """A library must be importable; a damaged or incomplete installation is not."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a damaged binary raises OSError, an incompatible one many types
        return Finding(WRONG, f"{module} ({purpose}) cannot be imported ({_reason(error)}). {remedy}")
    return Finding(OK, f"{module} ({purpose}).")


def check_opencv(owners: Sequence[str] | None = None) -> Finding:
    """Exactly one distribution must install ``cv2``: several overwrite each other's files."""
    if owners is None:
        owners = importlib.metadata.packages_distributions().get("cv2", [])
    owners = sorted(set(owners))
    if len(owners) > 1:
        return Finding(
            WRONG,
            f"{' and '.join(owners)} both own the module cv2 and overwrite each other. Run "
            f"`pip uninstall -y {' '.join(owners)}`, then `pip install opencv-python-headless`.",
        )
    if not owners:
        return Finding(WRONG, "OpenCV (cv2) is missing. Run `pip install opencv-python-headless`.")
    return check_import("cv2", f"drawing, from {owners[0]} {_version(owners[0])}", "Reinstall opencv-python-headless.")


def check_detectron2() -> Finding:
    """Detectron2 >= 0.6 must be importable and pass the probes with the installed libraries."""
    try:
        detectron2 = importlib.import_module("detectron2")
    except Exception as error:
        return Finding(WRONG, f"Detectron2 cannot be imported ({_reason(error)}). {INSTALL_DETECTRON2}")
    version = getattr(detectron2, "__version__", "of unknown version")
    assert detectron2.__file__ is not None
    place = Path(detectron2.__file__).parent
    if _numbers(version) < (0, 6):
        return Finding(WRONG, f"Detectron2 {version} in {place} is too old, 0.6 is needed. {INSTALL_DETECTRON2}")
    problems, notes = run_probes()
    if problems:
        what = "; ".join(problems)
        return Finding(WRONG, f"Detectron2 {version} in {place} does not run here: {what}. {INSTALL_DETECTRON2}")
    if notes:
        return Finding(NOTE, f"Detectron2 {version} in {place} is usable, but {'; '.join(notes)}.")
    return Finding(OK, f"Detectron2 {version} in {place} passes {len(PROBES)} checks.")


def check_cuda() -> Finding:
    """List CUDA devices; they are optional."""
    try:
        cuda = importlib.import_module("torch").cuda
        if not cuda.is_available():
            return Finding(OK, "No CUDA device: everything runs on the CPU.")
        devices = [cuda.get_device_properties(index) for index in range(cuda.device_count())]
    except Exception as error:
        return Finding(NOTE, f"CUDA devices could not be listed ({_reason(error)}); the CPU is used.")
    listed = ", ".join(f"{device.name} ({device.total_memory / 2**30:.0f} GiB)" for device in devices)
    return Finding(OK, f"{len(devices)} CUDA device{'s' * (len(devices) > 1)}: {listed}.")


def check_disk(folder: str | Path = ".", free_bytes: float | None = None) -> Finding:
    """Free disk space for OV-Shapes, checkpoints and predictions in ``folder``."""
    free = (shutil.disk_usage(folder).free if free_bytes is None else free_bytes) / 2**30
    place = Path(folder).resolve()
    if free < 1:
        return Finding(WRONG, f"Only {free:.1f} GiB are free in {place}. Free at least 1 GiB before training.")
    if free < 5:
        return Finding(NOTE, f"{free:.1f} GiB are free in {place}: enough for OV-Shapes, not for OV-COCO.")
    return Finding(OK, f"{free:.0f} GiB are free in {place}.")


def check_shared_memory(sizes: tuple[int, int] | None = None) -> Finding:
    """Loading processes hand over samples by shared memory, of which containers often have 64 MB.

    Args:
        sizes: (free, total) bytes; None: those of this machine.
    """
    sizes = shared_memory() if sizes is None else sizes
    if sizes is None:
        return Finding(OK, "This system has no /dev/shm.")
    free, total = (size / 2**20 for size in sizes)
    change = "Enlarge it (`docker run --shm-size 8g`), or set DATALOADER.NUM_WORKERS to 0."
    if free < 32:
        return Finding(WRONG, f"Of {total:,.0f} MiB in {SHARED_MEMORY} only {free:,.0f} are free. {change}")
    if free < 1024:
        return Finding(NOTE, f"{free:,.0f} MiB are free in {SHARED_MEMORY}, little for several workers. {change}")
    return Finding(OK, f"{free / 1024:,.0f} GiB are free in {SHARED_MEMORY}.")


def check_embedded_teachers(folder: Path | None = None) -> Finding:
    """The package must contain the weights of the embedded teachers, which the demonstration and the tests use."""
    folder = Path(folder or ASSETS / "open_clip")
    names = sorted(path.stem for path in folder.rglob("*.safetensors"))
    configured = {path.stem for path in folder.rglob("*.json") if "manifest" not in path.name}
    missing = sorted(configured - set(names))
    if not names or missing:
        which = f"The weights of {', '.join(missing)} are" if missing else "Embedded teachers are"
        return Finding(WRONG, f"{which} missing in {folder}. Install ovdet2 again from a complete checkout.")
    return Finding(OK, f"Teachers embedded in the package: {', '.join(names)}.")


def check_cached_teachers(folders: Sequence[tuple[Path, str]] | None = None) -> Finding:
    """List CLIP weights that open_clip can load without a download."""
    found = sorted({name for folder, pattern in folders or _teacher_caches() for name in _cached(folder, pattern)})
    if not found:
        return Finding(OK, "No CLIP weights are cached: open_clip downloads a model the first time it is used.")
    return Finding(OK, f"CLIP weights cached on this machine: {', '.join(found)}.")


def run_probes(probes: Sequence[tuple[Callable[[], object], bool, str]] | None = None) -> tuple[list[str], list[str]]:
    """Run every probe of Detectron2.

    Args:
        probes: tuple of (function, essential, problem if it raises); default PROBES.

    Returns:
        (problems, notes): sentences without a full stop, for failed essential and failed other probes.
    """
    problems, notes = [], []
    for probe, essential, meaning in probes or PROBES:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                probe()
        except Exception as error:  # any exception of an incompatible library is reported
            (problems if essential else notes).append(f"{meaning} ({_reason(error)})")
    return problems, notes


def probe_modules() -> None:
    for name in ("checkpoint", "config", "data", "engine", "evaluation", "layers", "modeling", "structures", "_C"):
        importlib.import_module(f"detectron2.{name}")


def probe_operators() -> None:
    import torch
    from detectron2.layers import ROIAlign, batched_nms

    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 4.1]])
    assert len(batched_nms(boxes, torch.tensor([0.9, 0.8]), torch.tensor([0, 0]), 0.5)) == 1, "NMS kept a duplicate"
    rois = torch.tensor([[0.0, 0.0, 0.0, 4.0, 4.0]])
    assert ROIAlign((2, 2), 1.0, 0, aligned=True)(torch.ones(1, 3, 8, 8), rois).shape == (1, 3, 2, 2), "RoIAlign"


def probe_images() -> None:
    import numpy as np
    from detectron2.data.transforms import ExtentTransform, ResizeTransform
    from detectron2.utils.visualizer import Visualizer

    image = np.zeros((8, 8, 3), np.uint8)
    assert ExtentTransform((0, 0, 4, 4), (4, 4)).apply_image(image).shape == (4, 4, 3), "ExtentTransform"
    assert ResizeTransform(8, 8, 4, 4).apply_image(image).shape == (4, 4, 3), "ResizeTransform"
    drawn = Visualizer(image).draw_box((1, 1, 6, 6), edge_color="w").get_image()
    assert drawn.shape == image.shape and drawn.any(), "Visualizer drew nothing"


def probe_numpy() -> None:
    from detectron2.data.build import print_instances_class_histogram
    from detectron2.structures.masks import polygons_to_bitmask

    assert polygons_to_bitmask([], 2, 2).dtype == bool, "masks are not boolean"
    print_instances_class_histogram([{"annotations": [{"category_id": 0}]}], ["word"])


def probe_scheduler(plain: bool = False) -> None:
    """The state of Detectron2's scheduler, or with ``plain`` of one of torch, must be saved in the checkpoint."""
    import torch
    from detectron2.engine import hooks
    from detectron2.solver import LRMultiplier
    from fvcore.common.param_scheduler import ConstantParamScheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    if plain:
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    else:
        scheduler = LRMultiplier(optimizer, ConstantParamScheduler(1.0), max_iter=2)
    assert hooks.LRScheduler(optimizer, scheduler).state_dict(), "empty state"


def probe_launch() -> None:
    """Start one gloo process group by Detectron2's worker. With CUDA it would use NCCL, which is not tested."""
    import torch
    import torch.distributed as dist
    from detectron2.engine import launch
    from detectron2.utils import comm

    if torch.cuda.is_available() or dist.is_initialized():
        return
    seen = []
    worker = importlib.import_module(launch.__module__)._distributed_worker
    with tempfile.TemporaryDirectory() as folder:
        try:
            worker(0, lambda: seen.append(comm.get_local_size()), 1, 1, 0, (Path(folder) / "meet").as_uri(), ())
        finally:
            comm._LOCAL_PROCESS_GROUP = None
            if dist.is_initialized():
                dist.destroy_process_group()
    assert seen == [1], f"local sizes {seen}"


def probe_skip() -> None:
    from detectron2.data import MapDataset

    assert MapDataset([0, 1], lambda number: number or None)[0] == 1, "another sample was expected"


def probe_model_zoo() -> None:
    from detectron2 import model_zoo

    assert Path(model_zoo.get_config_file("Base-RCNN-FPN.yaml")).is_file(), "Base-RCNN-FPN.yaml"


# (function, essential for ovdet2, problem if it raises). The last four are not essential: ovdet2 has its own launcher,
# scheduler, data loader and configurations.
PROBES = (
    (probe_modules, True, "its modules cannot be imported"),
    (probe_operators, True, "NMS or RoIAlign does not run"),
    (probe_images, True, "its image transforms do not run with this Pillow"),
    (probe_numpy, True, "it uses type names that numpy has removed"),
    (probe_scheduler, True, "the state of its learning-rate scheduler is not saved"),
    (probe_launch, False, "its launcher cannot start processes without CUDA"),
    (functools.partial(probe_scheduler, plain=True), False, "the state of plain torch schedulers is not saved"),
    (probe_skip, False, "its MapDataset cannot replace a skipped sample"),
    (probe_model_zoo, False, "detectron2.model_zoo does not find its configurations"),
)

CHECKS = {
    "python": check_python,
    "torch": check_torch_pair,
    "libraries": check_requirements,
    "open_clip": functools.partial(check_import, "open_clip", "teachers"),
    "pycocotools": functools.partial(check_import, "pycocotools.mask", "masks of Detectron2"),
    "faster_coco_eval": functools.partial(check_import, "faster_coco_eval", "evaluation"),
    "opencv": check_opencv,
    "detectron2": check_detectron2,
    "cuda": check_cuda,
    "shared_memory": check_shared_memory,
    "disk": check_disk,
    "embedded_teachers": check_embedded_teachers,
    "cached_teachers": check_cached_teachers,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the findings; return the exit code (0, or 4 if a problem was found)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if INSTALL in words:
        from ovdet2.programs import install_detectron2

        install_detectron2.main([word for word in words if word != INSTALL])
        return 0
    parser = command_parser("doctor", __doc__)
    parser.add_argument("--quiet", action="store_true", help="print only problems")
    parser.add_argument("--only", choices=sorted(CHECKS), action="append", help="one check; may be repeated")
    parser.add_argument(
        INSTALL,
        action="store_true",
        help="install Detectron2 0.6, unless a usable one is installed; for its options add --help",
    )
    options = parser.parse_args(words)
    wrong = 0
    for name in options.only or CHECKS:
        finding = CHECKS[name]()
        wrong += finding.status == WRONG
        if finding.status == WRONG or not options.quiet:
            print(f"{finding.status:>5}  {finding.sentence}", flush=True)
    if wrong:
        print(f"{wrong} problem{'s' * (wrong > 1)} to fix.", file=sys.stderr)
    return 4 if wrong else 0


def _version(distribution):
    """Version of an installed distribution, or None if it is not installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(distribution)
    return None


def _numbers(version):
    """The leading numbers of a version: "0.6+cu1" -> (0, 6)."""
    numbers = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def _reason(error):
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first[:200]}"


def _teacher_caches():
    """(folder, pattern) of the two folders where open_clip stores downloaded weights."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    hub = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or cache / "huggingface") / "hub"
    return ((Path(hub), "models--*"), (Path("~/.cache/clip").expanduser(), "*.pt"))


def _cached(folder, pattern):
    names = (path.name.removeprefix("models--").replace("--", "/") for path in Path(folder).glob(pattern))
    return [name for name in names if "clip" in name.lower() or pattern == "*.pt"]


if __name__ == "__main__":
    sys.exit(main())
