"""Package definition. Detectron2, which is not on PyPI under its own name, comes from `ovdet2 doctor --install-detectron2`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

_INIT = (Path(__file__).parent / "ovdet2" / "__init__.py").read_text(encoding="utf-8")

setup(
    name="ovdet2",
    version=re.search(r'^__version__ = "(.+)"$', _INIT, re.M)[1],
    description="Open-vocabulary object detection on Detectron2",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    entry_points={"console_scripts": ["ovdet2 = ovdet2.cli:main"]},
    # configs/ is installed as ovdet2/configs, where ovdet2.config looks first.
    packages=[*find_packages(include=["ovdet2", "ovdet2.*"], exclude=["*.tests", "*.tests.*"]), "ovdet2.configs"],
    package_dir={"ovdet2.configs": "configs"},
    package_data={"ovdet2": ["assets/**/*"], "ovdet2.configs": ["**/*.yaml"]},
    install_requires=[
        # torch and torchvision must be the pair of one release: constraints.txt names the tested one.
        "torch>=2.6,<2.16",
        "torchvision>=0.21,<0.30",
        "open_clip_torch>=3.0,<4",
        "timm>=1.0.15,<2",
        "faster-coco-eval>=1.8,<1.9",  # coco_ap.py replaces two steps of its engine, which are no public interface
        "pycocotools>=2.0.8,<3",
        "safetensors>=0.4.5,<1",
        "scipy>=1.13,<2",
        "numpy>=1.26,<3",
        "Pillow>=10.1,<14",
        "tqdm>=4.66,<5",
        "typing_extensions>=4.10,<5",
        # What Detectron2 imports.
        "cloudpickle>=3.0,<4",
        "fvcore>=0.1.5.post20221221,<0.1.6",
        "future>=1.0,<2",
        "hydra-core>=1.3,<1.4",
        "iopath>=0.1.9,<0.2",
        "matplotlib>=3.8,<4",
        "omegaconf>=2.3,<2.4",
        "opencv-python-headless>=4.9,<6",
        "packaging>=23",
        "pydot>=2.0,<5",
        "shapely>=2.0,<3",  # to crop polygons (large-scale jitter with masks)
        "tabulate>=0.9,<1",
        "tensorboard>=2.16,<3",
        "termcolor>=2.4,<4",
        "yacs>=0.1.8,<0.2",
    ],
    extras_require={
        # A vision-language model on this machine as a source of concept priors (ovdet2 prior).
        "mllm": ["transformers>=4.53,<6"],
        # The zero-shot detectors of transformers (ovdet2 zero-shot); MM-Grounding-DINO came with 4.55.
        "zero-shot": ["transformers>=4.55,<6"],
        # transformers is a reference for Deformable DETR, too.
        "test": ["pytest>=8,<10", "pytest-xdist>=3.6,<4", "hypothesis>=6.100,<7", "transformers>=4.53,<6"],
        # What `make lint` runs. Other versions find other things, so they are exact.
        "dev": ["pyrefly==1.5.0", "ruff==0.17.6"],
    },
)
