"""Installation: the edits of Detectron2, the wheel of ovdet2, and the doctor's sentences for faked failures."""

import importlib.metadata
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest

import ovdet2
from ovdet2 import doctor
from ovdet2.errors import SetupError
from ovdet2.programs import install_detectron2 as installer

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def source(tmp_path):
    """A tree with, for each edited file, the texts the table replaces, as often as it says, and nothing else."""
    for edit in installer.EDITS:
        path = tmp_path / "source" / "detectron2" / edit.file
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as stream:
            stream.write((edit.old + "\n") * edit.count)
    for origin in installer.PACKAGES:
        (tmp_path / "source" / origin).mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / origin / "__init__.py").write_text('__version__ = "0.6"\n')
    configs = tmp_path / "source" / "detectron2" / "model_zoo" / "configs"
    configs.mkdir(parents=True)
    (configs / "Base-RCNN-FPN.yaml").write_text("MODEL: {}\n")
    (tmp_path / "source" / "LICENSE").write_text("Apache License\n")
    return tmp_path / "source"


def test_edits_replace_every_text_and_add_the_stand_in(source):
    installer.apply_edits(source)
    for edit in installer.EDITS:
        text = (source / "detectron2" / edit.file).read_text()
        assert edit.new in text
        if edit.old not in edit.new:
            assert edit.old not in text
    assert (source / "detectron2" / "_C.py").is_file()


@pytest.mark.parametrize("damage", ["once more", "missing"])
def test_each_edit_insists_on_its_count_and_writes_nothing_otherwise(source, damage):
    for edit in installer.EDITS:
        path = source / "detectron2" / edit.file
        intact = path.read_text()
        path.write_text(intact + edit.old if damage == "once more" else intact.replace(edit.old, "", 1))
        before = {path: path.read_bytes() for path in sorted(source.rglob("*.py"))}
        with pytest.raises(SetupError, match=path.name):
            installer.apply_edits(source)
        assert {path: path.read_bytes() for path in sorted(source.rglob("*.py"))} == before, edit
        path.write_text(intact)


def test_wheel_of_detectron2_is_one_pip_would_install(source, tmp_path):
    installer.apply_edits(source)
    wheel = installer.build_wheel(source, tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = f"detectron2-{installer.WHEEL_VERSION}.dist-info"
        record = archive.read(f"{info}/RECORD").decode().splitlines()
        metadata = archive.read(f"{info}/METADATA").decode()
    assert {line.split(",")[0] for line in record} == set(names)
    assert {"detectron2/_C.py", "detectron2/model_zoo/configs/Base-RCNN-FPN.yaml"} <= set(names)
    assert "detectron2/projects/point_rend/__init__.py" in names and f"{info}/licenses/LICENSE" in names
    assert f"Version: {installer.WHEEL_VERSION}\n" in metadata and "Name: detectron2\n" in metadata


def test_another_archive_than_the_pinned_one_is_refused(tmp_path):
    archive = tmp_path / "pb1-detectron2-0.6.tar.gz"
    archive.write_bytes(b"something else")
    with pytest.raises(SetupError, match="SHA-256"):
        installer.unpack(archive, tmp_path / "source")
    with pytest.raises(SetupError, match="--sdist"):
        installer.unpack(tmp_path / "absent.tar.gz", tmp_path / "source")


def test_stand_in_says_which_operator_is_missing_and_what_to_do():
    stand_in = types.ModuleType("detectron2._C")
    exec(installer.STAND_IN, stand_in.__dict__)
    with pytest.raises(NotImplementedError, match="box_iou_rotated.*compiled from its source"):
        stand_in.box_iou_rotated(None, None)
    assert not hasattr(stand_in, "__path__")
    assert "pure Python" in stand_in.get_compiler_version()


def test_installer_keeps_a_usable_detectron2(monkeypatch, capsys):
    monkeypatch.setattr(installer, "_doctor", lambda: (True, "ok  Detectron2 0.6 of the user."))
    monkeypatch.setattr(installer, "_pip", lambda *arguments: pytest.fail("nothing may be installed"))
    installer.main([])
    assert "Used unchanged" in capsys.readouterr().out


def test_installed_detectron2_passes_its_probes():
    assert doctor.run_probes() == ([], [])


def test_scheduler_state_survives_a_round_trip():
    torch = pytest.importorskip("torch")
    from detectron2.engine import hooks

    def scheduler():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        return hooks.LRScheduler(optimizer, torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.1))

    first, second = scheduler(), scheduler()
    for _ in range(3):
        first.scheduler.optimizer.step()
        first.scheduler.step()
    second.load_state_dict(first.state_dict())
    assert second.scheduler.last_epoch == 3
    assert second.scheduler.get_last_lr() == pytest.approx([0.1])


def test_coco_evaluator_does_not_ask_for_the_compiled_evaluation():
    from detectron2 import _C
    from detectron2.evaluation.coco_evaluation import COCOEvaluator

    if not getattr(_C, "STAND_IN", False):
        pytest.skip("this Detectron2 is not the one of tools/install_detectron2.py")
    evaluator = COCOEvaluator.__new__(COCOEvaluator)
    metadata = types.SimpleNamespace(json_file=__file__)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("detectron2.evaluation.coco_evaluation.MetadataCatalog.get", lambda name: metadata)
        patch.setattr("detectron2.evaluation.coco_evaluation.COCO", lambda path: types.SimpleNamespace(dataset={}))
        evaluator.__init__("unused", tasks=("bbox",), distributed=False, use_fast_impl=True)
    assert evaluator._use_fast_impl is False


def test_model_zoo_finds_its_configurations_and_names_an_unknown_one():
    from detectron2 import model_zoo

    assert Path(model_zoo.get_config_file("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")).is_file()
    with pytest.raises(RuntimeError, match=r"nothing\.yaml"):
        model_zoo.get_config_file("nothing.yaml")


# The doctor: every failure it knows, faked, ends in "wrong" and in a remedy.


def _importing(monkeypatch, replaced):
    """Let ``importlib.import_module`` return, or raise, what ``replaced`` has for a name."""
    original = doctor.importlib.import_module

    def import_module(name):
        thing = replaced.get(name)
        if isinstance(thing, Exception):
            raise thing
        return original(name) if thing is None else thing

    monkeypatch.setattr(doctor.importlib, "import_module", import_module)


def _wrong(finding, *words):
    assert finding.status == doctor.WRONG
    for word in words:
        assert word in finding.sentence
    assert finding.sentence.endswith(".") and "\n" not in finding.sentence


def test_doctor_old_python():
    _wrong(doctor.check_python((3, 10, 2)), "3.10.2", "make PYTHON=")


def test_doctor_torch_pair_that_does_not_fit(monkeypatch):
    def nms(*arguments):
        raise RuntimeError("operator torchvision::nms does not exist")

    _importing(monkeypatch, {"torchvision.ops": types.SimpleNamespace(nms=nms)})
    _wrong(doctor.check_torch_pair(), "nms does not exist", "pip install --force-reinstall -c constraints.txt")
    _importing(monkeypatch, {"torch": ImportError("no torch")})
    _wrong(doctor.check_torch_pair(), "no torch", "pip install")


def test_doctor_nms_with_a_wrong_answer(monkeypatch):
    import torch

    _importing(monkeypatch, {"torchvision.ops": types.SimpleNamespace(nms=lambda *_: torch.tensor([0, 1, 2]))})
    _wrong(doctor.check_torch_pair(), "[0, 1, 2]", "Reinstall")


def test_doctor_missing_and_mismatched_libraries(monkeypatch):
    requirements = ["not-there-at-all>=1", "pytest<0.1", "only-for-tests; extra == 'test'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: requirements)
    _wrong(doctor.check_requirements(), "not-there-at-all is missing", "allowed is <0.1", "pip install")


def test_doctor_two_owners_of_cv2():
    owners = ["opencv-python", "opencv-python-headless", "opencv-python"]
    _wrong(doctor.check_opencv(owners), "opencv-python and opencv-python-headless", "pip uninstall -y")
    _wrong(doctor.check_opencv([]), "missing", "pip install")


@pytest.mark.parametrize("name", ["open_clip", "pycocotools", "faster_coco_eval"])
def test_doctor_library_that_cannot_be_imported(monkeypatch, name):
    module = doctor.CHECKS[name].args[0]
    _importing(monkeypatch, {module: OSError("broken binary")})
    _wrong(doctor.CHECKS[name](), module, "broken binary", "pip install")


def test_doctor_detectron2_missing_or_old(monkeypatch):
    _importing(monkeypatch, {"detectron2": ImportError("No module named 'detectron2'")})
    _wrong(doctor.check_detectron2(), "cannot be imported", "ovdet2 doctor --install-detectron2")
    _importing(monkeypatch, {"detectron2": types.SimpleNamespace(__version__="0.5", __file__=__file__)})
    _wrong(doctor.check_detectron2(), "0.5", "too old", "ovdet2 doctor --install-detectron2")


def test_doctor_detectron2_without_an_edit(monkeypatch):
    from detectron2.structures import masks

    def unedited(polygons, height, width):
        raise AttributeError("module 'numpy' has no attribute 'bool'")

    monkeypatch.setattr(masks, "polygons_to_bitmask", unedited)
    _wrong(doctor.check_detectron2(), "numpy has removed", "ovdet2 doctor --install-detectron2")


def test_doctor_only_notes_what_ovdet2_can_do_without(monkeypatch):
    monkeypatch.setattr("detectron2.data.MapDataset.__getitem__", lambda self, index: random_sample_of_a_set())
    finding = doctor.check_detectron2()
    assert finding.status == doctor.NOTE and "MapDataset" in finding.sentence


def random_sample_of_a_set():
    raise TypeError("Population must be a sequence. For dicts or sets, use sorted(d).")


def test_doctor_disk_and_teachers(tmp_path):
    _wrong(doctor.check_disk(tmp_path, free_bytes=2**29), "0.5 GiB", "Free at least")
    assert doctor.check_disk(tmp_path, free_bytes=2 * 2**30).status == doctor.NOTE
    assert doctor.check_disk(tmp_path, free_bytes=50 * 2**30).status == doctor.OK
    _wrong(doctor.check_embedded_teachers(tmp_path), str(tmp_path), "Install ovdet2 again")
    (tmp_path / "a-teacher.safetensors").touch()
    assert "a-teacher" in doctor.check_embedded_teachers(tmp_path).sentence
    (tmp_path / "b-teacher.json").touch()
    _wrong(doctor.check_embedded_teachers(tmp_path), "weights of b-teacher", "Install ovdet2 again")
    (tmp_path / "models--org--CLIP-ViT").mkdir()
    assert "org/CLIP-ViT" in doctor.check_cached_teachers([(tmp_path, "models--*")]).sentence


def test_doctor_exit_codes(monkeypatch, capsys):
    good, bad = doctor.Finding(doctor.OK, "Fine."), doctor.Finding(doctor.WRONG, "Broken. Mend it.")
    monkeypatch.setattr(doctor, "CHECKS", {"a": lambda: good, "b": lambda: bad})
    assert doctor.main(["--quiet"]) == 4
    assert capsys.readouterr().out == "wrong  Broken. Mend it.\n"
    assert doctor.main(["--only", "a"]) == 0


def test_installed_package_finds_configs_and_assets_from_any_folder(tmp_path):
    """`pip install .` into an empty folder, imported from elsewhere, away from the checkout."""
    site = tmp_path / "site"
    copy = tmp_path / "checkout"
    _copy_checkout(copy)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", str(site), str(copy)], check=True, capture_output=True, text=True)
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import ovdet2.config as config, pathlib\n"
        "root = pathlib.Path(config.__file__).parents[1]\n"
        "names = sorted(str(p.relative_to(root / 'configs')) for p in (root / 'configs').rglob('*.yaml'))\n"
        "assert all(config.find_config(name).is_file() for name in names)\n"
        "assets = sorted(str(p.relative_to(root)) for p in (root / 'assets').rglob('*') if p.is_file())\n"
        "print(root); print(names); print(assets)"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    root, names, assets = done.stdout.strip().splitlines()
    assert root == str(site / "ovdet2")
    assert names == str(sorted(str(path.relative_to(ROOT / "configs")) for path in (ROOT / "configs").rglob("*.yaml")))
    shipped = [path for path in (ROOT / "ovdet2" / "assets").rglob("*") if path.is_file()]
    assert assets == str(sorted(str(path.relative_to(ROOT / "ovdet2")) for path in shipped)) and shipped


def _copy_checkout(target):
    """The part of the checkout that a package is built from, so that the build leaves nothing behind in it."""
    import shutil

    for name in ("ovdet2", "configs"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, target / name)


def test_a_detector_without_detectron2_names_the_remedy(monkeypatch):
    def refuse(missing):
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr(ovdet2.importlib, "import_module", lambda _: refuse("detectron2"))
    with pytest.raises(ModuleNotFoundError, match="ovdet2.Detector needs Detectron2.*ovdet2 doctor --install-detect"):
        ovdet2.__getattr__("Detector")
    monkeypatch.setattr(ovdet2.importlib, "import_module", lambda _: refuse("torch"))
    with pytest.raises(ModuleNotFoundError, match="No module named 'torch'"):
        ovdet2.__getattr__("Detector")
