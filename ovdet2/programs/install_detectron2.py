"""Install Detectron2 0.6, built in pure Python for current libraries.

    ovdet2 doctor --install-detectron2
    # without a package index: give the source archive of pb1-detectron2 0.6
    ovdet2 doctor --install-detectron2 --sdist pb1-detectron2-0.6.tar.gz

Detectron2 has no release on PyPI under its own name. An installed Detectron2 >= 0.6 that passes the checks of
``ovdet2 doctor`` is kept unchanged. Otherwise the source of release 0.6, published on PyPI as ``pb1-detectron2``, is
downloaded (or read from ``--sdist``) and compared with its SHA-256. It is changed by the table EDITS of this program,
packed as a pure-Python wheel and installed without changing any other package.

The wheel has no compiled operators (rotated boxes, deformable convolution, Detectron2's fast COCO evaluation). A
stand-in module raises an error with the reason if one of them is called. NMS and RoIAlign come from torchvision.

Exit codes: 2 usage, 4 environment.
"""

import base64
import hashlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ovdet2.command_line import command_parser
from ovdet2.errors import SetupError, exit_on_error

SDIST = "pb1-detectron2==0.6"
SDIST_SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"
WHEEL_VERSION = "0.6+ovdet2.1"

# What Detectron2 0.6 imports at run time. Its own pins (black==21.4b2, iopath<0.1.10) no longer install.
REQUIREMENTS = (
    "Pillow>=7.1", "cloudpickle", "fvcore>=0.1.5,<0.1.6", "hydra-core>=1.1", "iopath>=0.1.7", "matplotlib", "numpy",
    "omegaconf>=2.1", "pycocotools>=2.0.2", "tabulate", "tensorboard", "termcolor>=1.1", "torch>=2.6", "torchvision",
    "tqdm>4.29.0", "yacs>=0.1.8",
)  # fmt: skip

# Folders of the source -> folders of the wheel, as in Detectron2's own setup.py.
PACKAGES = {
    "detectron2": "detectron2",
    "projects/PointRend/point_rend": "detectron2/projects/point_rend",
    "projects/DeepLab/deeplab": "detectron2/projects/deeplab",
    "projects/Panoptic-DeepLab/panoptic_deeplab": "detectron2/projects/panoptic_deeplab",
}


class Edit(NamedTuple):
    """Replace ``old`` by ``new`` in ``file`` (below ``detectron2/``), where it must occur exactly ``count`` times."""

    file: str
    count: int
    old: str
    new: str
    why: str


NUMPY = "numpy 1.24 removed its aliases of the Python builtins"
SCHEDULER = "torch 2 renamed the base class; a plain torch scheduler is no _LRScheduler, so its state was not saved"
GLOO = "more than one process also without CUDA, over gloo"
NO_FAST_COCO = "without the compiled evaluation, COCOEvaluator uses pycocotools and says so"
NO_BLACK = "black only makes LazyConfig.to_py prettier"

EDITS = (
    Edit("data/transforms/transform.py", 1, "Image.LINEAR", "Image.BILINEAR", "Pillow 10 removed this name"),
    Edit("data/build.py", 2, "dtype=np.int", "dtype=int", NUMPY),
    Edit("data/datasets/pascal_voc.py", 1, "dtype=np.str", "dtype=str", NUMPY),
    Edit("evaluation/pascal_voc_evaluation.py", 2, "np.bool)", "bool)", NUMPY),
    Edit("evaluation/sem_seg_evaluation.py", 2, "dtype=np.int)", "dtype=int)", NUMPY),
    Edit("evaluation/sem_seg_evaluation.py", 5, "np.float)", "float)", NUMPY),
    Edit("structures/masks.py", 3, "np.bool)", "bool)", NUMPY),
    Edit("utils/video_visualizer.py", 1, "np.bool)", "bool)", NUMPY),
    Edit("utils/visualizer.py", 3, "np.bool)", "bool)", NUMPY),
    Edit("engine/hooks.py", 2, "lr_scheduler._LRScheduler", "lr_scheduler.LRScheduler", SCHEDULER),
    Edit("solver/build.py", 1, "lr_scheduler._LRScheduler", "lr_scheduler.LRScheduler", SCHEDULER),
    Edit("solver/lr_scheduler.py", 4, "lr_scheduler._LRScheduler", "lr_scheduler.LRScheduler", SCHEDULER),
    Edit(
        "data/common.py", 1,
        "self._rng.sample(self._fallback_candidates, k=1)", "self._rng.sample(sorted(self._fallback_candidates), k=1)",
        "Python 3.11 no longer samples from a set",
    ),
    Edit(
        "modeling/anchor_generator.py", 1,
        "torch.meshgrid(shifts_y, shifts_x)", 'torch.meshgrid(shifts_y, shifts_x, indexing="ij")',
        "torch warns, at every first batch, that the default will change",
    ),
    Edit(
        "model_zoo/model_zoo.py", 1, "import pkg_resources\n", "from importlib import resources\n",
        "setuptools 82 removed pkg_resources",
    ),
    Edit(
        "model_zoo/model_zoo.py", 1,
        'pkg_resources.resource_filename(\n        "detectron2.model_zoo", os.path.join("configs", config_path)\n    )',
        'str(\n        resources.files("detectron2.model_zoo").joinpath(os.path.join("configs", config_path))\n    )',
        "setuptools 82 removed pkg_resources",
    ),
    Edit(
        "export/__init__.py", 1, "from .api import *\n",
        "try:\n    import caffe2.python\nexcept ImportError:\n    pass\nelse:\n    from .api import *\n",
        "torch 2.4 removed caffe2; the tracing and scripting half of this package does not need it",
    ),
    Edit(
        "engine/launch.py", 1,
        '    assert torch.cuda.is_available(), "cuda is not available. Please check your installation."\n',
        "    has_gpu = torch.cuda.is_available()\n", GLOO,
    ),
    Edit("engine/launch.py", 1, 'backend="NCCL"', 'backend="NCCL" if has_gpu else "GLOO"', GLOO),
    Edit(
        "engine/launch.py", 1,
        "    assert num_gpus_per_machine <= torch.cuda.device_count()\n    torch.cuda.set_device(local_rank)\n",
        "    if has_gpu:\n        assert num_gpus_per_machine <= torch.cuda.device_count()\n"
        "        torch.cuda.set_device(local_rank)\n", GLOO,
    ),
    Edit(
        "engine/defaults.py", 1, 'kwargs["device_ids"] = [comm.get_local_rank()]',
        'kwargs["device_ids"] = [comm.get_local_rank()] if next(model.parameters()).is_cuda else None', GLOO,
    ),
    Edit(
        "evaluation/coco_evaluation.py", 1, "from detectron2.config import CfgNode\n",
        "from detectron2 import _C\nfrom detectron2.config import CfgNode\n", NO_FAST_COCO,
    ),
    Edit(
        "evaluation/coco_evaluation.py", 1, "self._use_fast_impl = use_fast_impl\n",
        "self._use_fast_impl = use_fast_impl and not _C.STAND_IN\n", NO_FAST_COCO,
    ),
    Edit(
        "evaluation/coco_evaluation.py", 1, "(COCOeval_opt if use_fast_impl else COCOeval)",
        "(COCOeval_opt if use_fast_impl and not _C.STAND_IN else COCOeval)", NO_FAST_COCO,
    ),
    Edit(
        "config/lazy.py", 1, "        import black\n",
        "        try:\n            import black\n        except ImportError:\n            black = None\n", NO_BLACK,
    ),
    Edit(
        "config/lazy.py", 1, "            return black.format_str(py_str, mode=black.Mode())\n",
        "            return black.format_str(py_str, mode=black.Mode()) if black else py_str\n", NO_BLACK,
    ),
)  # fmt: skip

STAND_IN = '''"""A stand-in for the compiled operators of Detectron2: each raises an error that says what is missing."""

STAND_IN = True


def get_compiler_version():
    return "none: this Detectron2 is pure Python"


def get_cuda_version():
    return "none: this Detectron2 is pure Python"


def has_cuda():
    return False


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args, **kwargs):
        raise NotImplementedError(
            f"detectron2._C.{name} is a compiled operator; this Detectron2 is the pure-Python build of release 0.6. "
            "Rotated boxes, deformable convolution and COCOeval_opt need Detectron2 compiled from its source: "
            "see INSTALL.md of facebookresearch/detectron2."
        )

    return missing
'''


def apply_edits(root: str | Path, edits: Sequence[Edit] = EDITS) -> None:
    """Change the source in ``root`` (the folder that holds ``detectron2/``) and add the stand-in ``_C.py``.

    Raises:
        SetupError: a text does not occur exactly as often as the table says; the file is named and nothing is written.
    """
    changed: dict[Path, str] = {}
    for edit in edits:
        path = Path(root) / "detectron2" / edit.file
        text = changed.get(path)
        if text is None:
            text = path.read_text(encoding="utf-8") if path.is_file() else ""
        count = text.count(edit.old)
        if count != edit.count:
            raise SetupError(
                f"{path} has {count} times {edit.old!r}, expected {edit.count}: this is not the source of release 0.6. "
                f"Give the source archive of {SDIST} with --sdist."
            )
        changed[path] = text.replace(edit.old, edit.new)
    for path, text in changed.items():
        path.write_text(text, encoding="utf-8")
    (Path(root) / "detectron2" / "_C.py").write_text(STAND_IN, encoding="utf-8")


def fetch_sdist(folder: str | Path) -> Path:
    """Download the source archive with pip to ``folder``; pip compares its hash before it runs any code of it.

    Raises:
        SetupError: pip failed; its output is quoted.
    """
    requirement = Path(folder) / "requirement.txt"
    requirement.write_text(f"{SDIST} --hash=sha256:{SDIST_SHA256}\n", encoding="utf-8")
    options = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--require-hashes", "--dest", str(folder)]
    done = _pip("download", *options, "--requirement", str(requirement))
    archives = sorted(Path(folder).glob("*.tar.gz"))
    if done.returncode or len(archives) != 1:
        raise SetupError(
            f"pip could not download {SDIST}:\n{done.stdout}{done.stderr}\nThis requires torch and setuptools in "
            "this Python and a package index. Without an index, copy the archive here and give it with --sdist."
        )
    return archives[0]


def unpack(archive: str | Path, folder: str | Path) -> Path:
    """Check the SHA-256 of the source archive and unpack it to ``folder``; returns the folder of the source.

    Raises:
        SetupError: there is no such file, or it has another SHA-256.
    """
    archive = Path(archive)
    if not archive.is_file():
        raise SetupError(f"there is no file {archive}. Give the source archive of {SDIST} with --sdist.")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != SDIST_SHA256:
        raise SetupError(
            f"{archive} has the SHA-256 {digest}, expected {SDIST_SHA256}. Remove it and fetch {SDIST} again."
        )
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return next(path for path in sorted(Path(folder).iterdir()) if (path / "detectron2").is_dir())


def build_wheel(source: str | Path, folder: str | Path) -> Path:
    """Pack the edited source as ``detectron2-0.6+ovdet2.1-py3-none-any.whl`` in ``folder``; returns its path.

    A pure-Python wheel is a zip archive with three small text files (METADATA, WHEEL, RECORD). It is written directly,
    because the setup.py of the package requires a compiler.
    """
    source = Path(source)
    info = f"detectron2-{WHEEL_VERSION}.dist-info"
    files = {f"{info}/licenses/LICENSE": (source / "LICENSE").read_bytes()}
    for origin, target in PACKAGES.items():
        for path in sorted((source / origin).rglob("*")):
            if path.suffix in (".py", ".yaml") and "__pycache__" not in path.parts:
                files[f"{target}/{path.relative_to(source / origin).as_posix()}"] = path.read_bytes()
    metadata = [
        "Metadata-Version: 2.4",
        "Name: detectron2",
        f"Version: {WHEEL_VERSION}",
        "Summary: Detectron2 release 0.6 without compiled operators, edited for current libraries by ovdet2",
        "License-Expression: Apache-2.0",
        "License-File: LICENSE",
        "Requires-Python: >=3.11",
        *(f"Requires-Dist: {requirement}" for requirement in REQUIREMENTS),
    ]
    files[f"{info}/METADATA"] = ("\n".join(metadata) + "\n").encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: ovdet2\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = [f"{name},sha256={_record_hash(data)},{len(data)}" for name, data in files.items()]
    files[f"{info}/RECORD"] = ("\n".join([*record, f"{info}/RECORD,,"]) + "\n").encode()
    wheel = Path(folder) / f"detectron2-{WHEEL_VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return wheel


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: install Detectron2, or write its wheel.

    Raises:
        SetupError: the archive is missing or wrong, pip failed, or the result does not pass its checks.
    """
    parser = command_parser("doctor --install-detectron2", __doc__)
    parser.add_argument("--sdist", help=f"source archive of {SDIST}; default: download it")
    parser.add_argument("--force", action="store_true", help="install even if a usable Detectron2 is installed")
    parser.add_argument("--wheel-only", metavar="FOLDER", help="write the wheel to this folder and install nothing")
    options = parser.parse_args(arguments)
    if not (options.force or options.wheel_only):
        usable, sentences = _doctor()
        if usable:
            print(f"{sentences}\nUsed unchanged.")
            return
        print(f"{sentences}\nBuilding release 0.6 as a pure-Python wheel ...")
    with tempfile.TemporaryDirectory() as scratch:
        archive = options.sdist or fetch_sdist(scratch)
        source = unpack(archive, Path(scratch) / "source")
        apply_edits(source)
        wheel = build_wheel(source, options.wheel_only or scratch)
        if options.wheel_only:
            print(f"Wrote {wheel}.")
            return
        done = _pip("install", "--no-deps", "--force-reinstall", str(wheel))
        if done.returncode:
            raise SetupError(f"pip could not install {wheel.name}:\n{done.stdout}{done.stderr}")
    usable, sentences = _doctor()
    if not usable:
        raise SetupError(f"the installed Detectron2 does not pass its checks. {sentences}")
    print(sentences)


def _doctor():
    """(whether Detectron2 passes the checks of the doctor in a new process, what it printed)."""
    command = [sys.executable, "-m", "ovdet2.doctor", "--only", "detectron2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode == 0, (done.stdout + done.stderr).strip()


def _pip(*arguments):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _record_hash(data):
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


if __name__ == "__main__":
    with exit_on_error():
        main()
