"""Fixtures of several files."""

import clim_cases
import pytest
from safetensors.torch import save_file

from tests.caption_cases import write_coco
from tests.conftest import quick_launch  # noqa: F401


@pytest.fixture(scope="session", autouse=True)
def models(tmp_path_factory):
    clim_cases.register_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def weights(tmp_path_factory, models):
    """A weight file of "clim-vit"."""
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file({name: t.contiguous() for name, t in clim_cases.clip_of("clim-vit").state_dict().items()}, str(path))
    return path


@pytest.fixture(scope="session")
def captioned(tmp_path_factory):
    """Folder of 12 images with two captions each, as COCO's."""
    folder = tmp_path_factory.mktemp("captioned")
    write_coco(folder, 12)
    return folder
