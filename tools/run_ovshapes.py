"""Run rows of the OV-Shapes benchmark, one at a time, and write their table.

    python tools/run_ovshapes.py --rows vild_text closed_set --seeds 0 1 2      # train, evaluate, tabulate
    python tools/run_ovshapes.py --rows all --seeds 0 1 2 --table docs/RESULTS.md
    python tools/run_ovshapes.py --demo                                         # what `make demo` does

A row that is done is not run again unless its configuration changed; an interrupted one goes on where it stopped.
"""

import argparse
import contextlib
import hashlib
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

import ovdet2
from ovdet2.config import load_config
from ovdet2.data.datasets.ov_shapes import ensure_generated
from ovdet2.data.datasets.register import data_root
from ovdet2.errors import DataError, UsageError, exit_on_error
from ovdet2.io.files import read_json, sha256_file, write_json, write_text

ROOT = Path(__file__).resolve().parents[1]
DATASET = "ov_shapes_val_all"
TEACHER = "ovshapes-resnet"
ASSETS = Path(ovdet2.__file__).parent / "assets"
TEACHER_WEIGHTS = ASSETS / "open_clip" / f"{TEACHER}.safetensors"
TRAINING_SET = "ov_shapes_train_base"
REGIONS, REGION_NMS = 10, 0.5
# What rows read from disk, by the configuration key that names it: what it is, and where it is made.
ARTEFACTS = {
    "MODEL.VILD.REGION_CACHE": ("region cache", "region_cache"),
    "MODEL.CCKT.REGION_CACHE": ("cache of annotated boxes", "annotation_cache"),
    "MODEL.CCKT.PRIOR_FILE": ("concept prior", "priors/clip.safetensors"),
    "MODEL.TEACHER.PRETRAINED": ("training by CLIM", "clim/clim_a1.safetensors"),
}
CLIM_CONFIG = ROOT / "projects" / "CLIM" / "configs" / "ovshapes_vit.yaml"
BEGIN, END = "<!-- ov-shapes table: written by tools/run_ovshapes.py -->", "<!-- end of ov-shapes table -->"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        title: what the table calls it.
        config: yaml below configs/; empty for the teacher's row.
        weights_of: another row whose trained weights are evaluated; empty: the row is trained.
    """

    title: str
    config: str = ""
    weights_of: str = ""


ROWS = {
    "teacher": Row("CLIP on ground-truth boxes (upper bound of the teacher)"),
    "closed_set": Row("closed-set head (sanity: novel must be about 0)", "ovshapes/closed_set_r18.yaml"),
    "vild_text": Row("ViLD-text", "ovshapes/vild_text_r18.yaml"),
    "vild_image": Row("ViLD-image", "ovshapes/vild_image_r18.yaml"),
    "vild": Row("ViLD", "ovshapes/vild_r18.yaml"),
    "vild_ensemble": Row("ViLD-ensemble", "ovshapes/vild_ensemble_r18.yaml"),
    "clip_on_crops": Row("CLIP on cropped proposals", "ovshapes/clip_on_crops_r18.yaml", "vild_text"),
    "clip_on_crops_objectness": Row(
        "CLIP on cropped proposals, with objectness", "ovshapes/clip_on_crops_objectness_r18.yaml", "vild_text"
    ),
    "vild_text_clip": Row("ViLD-text + CLIP", "ovshapes/vild_text_clip_r18.yaml", "vild_text"),
    "detr_closed_set": Row("Deformable DETR, closed-set head (sanity)", "ovshapes/detr_closed_set_r18.yaml"),
    "detr_text": Row("Deformable DETR, text head", "ovshapes/detr_text_r18.yaml"),
    "cckt_similarity": Row("CCKT-Det: similarity alone (control)", "ovshapes/cckt_similarity_r18.yaml"),
    "cckt_priors": Row("CCKT-Det: priors", "ovshapes/cckt_priors_r18.yaml"),
    "cckt_contrast": Row("CCKT-Det: contrast, similarity", "ovshapes/cckt_contrast_r18.yaml"),
    "cckt_full": Row("CCKT-Det: priors, contrast, similarity", "ovshapes/cckt_full_r18.yaml"),
    "cckt_full_class": Row(
        "CCKT-Det: priors, contrast, class branch", "ovshapes/cckt_full_class_r18.yaml", "cckt_full"
    ),
    **{
        f"clip_detr_{part}_{head}": Row(f"CLIP-DETR: {title}, {of}", f"ovshapes/clip_detr_{part}_{head}_r18.yaml")
        for head, of in (("closed", "closed head"), ("text", "text head"), ("cckt", "on CCKT-Det"))
        for part, title in (("align", "AlignNet"), ("dynql", "DynQL"), ("both", "both"))
    },
    "fvlm": Row("F-VLM", "ovshapes/fvlm_resnet.yaml"),
    "fvlm_detector": Row("F-VLM without fusion", "ovshapes/fvlm_resnet_detector.yaml", "fvlm"),
    "fvlm_clip": Row("CLIP's map at the proposals of F-VLM, with objectness", "ovshapes/fvlm_resnet_clip.yaml", "fvlm"),
    "fvlm_vit": Row("F-VLM on the ViT", "ovshapes/fvlm_vit.yaml"),
    "fvlm_vit_clim": Row("F-VLM on the ViT after CLIM", "ovshapes/fvlm_vit_clim.yaml"),
}
COLUMNS = {
    "novel AP50": ("bbox", "AP50-novel"),
    "unseen nouns": ("bbox", "AP50-unseen_nouns"),
    "unseen combinations": ("bbox", "AP50-unseen_combinations"),
    "base AP50": ("bbox", "AP50-base"),
    "base AP": ("bbox", "AP-base"),
    "all AP50": ("bbox", "AP50-all"),
    "novel AR@100": ("proposals", "AR@100-novel"),
    "base AR@100": ("proposals", "AR@100-base"),
}


def main(argv=None):
    """Command line."""
    args = parse_args(argv)
    if args.demo:
        from ovshapes_demo import run_demo

        return run_demo(Path(args.output))
    names = list(ROWS) if args.rows == ["all"] else args.rows
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        raise UsageError(f"unknown rows {unknown}; there are {', '.join(ROWS)}.")
    output = Path(args.output)
    for seed in args.seeds if not args.tabulate else ():
        for name in names:
            run_row(name, seed, output)
    table = make_table(names, args.seeds, output)
    print(table)
    if args.table:
        insert_table(
            Path(args.table),
            table,
            f"python tools/run_ovshapes.py --rows {' '.join(args.rows)} --seeds {' '.join(map(str, args.seeds))}",
        )
    return table


def parse_args(argv):
    """The command line of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=["all"], help=f"of {', '.join(ROWS)}, or all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--output", default="output/ovshapes", help="folder of the runs")
    parser.add_argument("--table", help="markdown file whose OV-Shapes table is replaced")
    parser.add_argument("--tabulate", action="store_true", help="run nothing, write the table of what is done")
    parser.add_argument("--demo", action="store_true", help="train ViLD-text, ViLD and ViLD-ensemble, draw")
    return parser.parse_args(argv)


def run_row(name, seed, output):
    """Train and evaluate one row with one seed, unless it is done; returns its folder."""
    row, folder = ROWS[name], output / name / f"seed{seed}"
    if name == "teacher":
        folder = output / name / "seed0"  # nothing in it is random
    trained = run_row(row.weights_of, seed, output) if row.weights_of else None
    artefacts = {key: build_artefact(key, output) for key in artefacts_of(row)}
    made_of = ingredients(row, seed, trained, artefacts)
    state = read_json(folder / "row.json") if (folder / "row.json").is_file() else {"minutes": 0.0}
    different = [key for key, value in made_of.items() if state.get("made_of", made_of).get(key) != value]
    if different:
        raise DataError(
            f"{folder} holds a row made with another {', '.join(different)}: remove it, or choose another --output."
        )
    if is_done(folder):
        return folder
    print(f"== {name}, seed {seed}", flush=True)
    with timed(folder / "row.json", state, made_of):
        run(command_of(name, seed, folder, trained, artefacts))
    return folder


def artefacts_of(row):
    """The keys of :data:`ARTEFACTS` that a row reads."""
    if not row.config:
        return []
    model = load_config(row.config, []).MODEL
    needed = {
        "MODEL.VILD.REGION_CACHE": model.VILD.WEIGHT > 0,
        "MODEL.CCKT.REGION_CACHE": model.CCKT.ENABLED and model.CCKT.CONTRAST != "none" and not row.weights_of,
        "MODEL.CCKT.PRIOR_FILE": model.CCKT.ENABLED and model.CCKT.PRIORS,
        "MODEL.TEACHER.PRETRAINED": model.TEACHER.PRETRAINED.endswith(".safetensors"),
    }
    return [key for key, wanted in needed.items() if wanted]


def build_artefact(key, output):
    """The path of what a configuration key names, made once for all rows and seeds.

    The region cache is of the proposals of ViLD-text trained with seed 0. The paper proposes 300 regions per image;
    here the 10 best after a stricter NMS, which are embedded in minutes. A complete artefact is left as it is; one of
    another detector or teacher is refused.
    """
    path, made_of = output / ARTEFACTS[key][1], {"teacher": sha256_file(TEACHER_WEIGHTS)}
    if key == "MODEL.CCKT.PRIOR_FILE":
        teacher = ["--architecture", TEACHER, "--pretrained", "embedded", "--tiles", "3"]
        command = ["tools/build_concept_priors.py", "--backend", "clip", *teacher, "--dataset", DATASET]
        command += ["--output", str(path)]
    elif key == "MODEL.TEACHER.PRETRAINED":
        settings = yaml.safe_load(CLIM_CONFIG.read_text(encoding="utf-8"))
        made_of = {
            "teacher": sha256_file(ASSETS / "open_clip" / "ovshapes-vit.safetensors"),
            "configuration": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        }
        command = ["projects/CLIM/train.py", "--config-file", str(CLIM_CONFIG), "--resume"]
        command += ["OUTPUT_DIR", str(path.parent)]
    else:
        command = ["tools/build_region_cache.py", "--dataset", TRAINING_SET, "--output", str(path), "--config-file"]
        if key == "MODEL.CCKT.REGION_CACHE":
            command += [f"configs/{ROWS['detr_text'].config}", "--boxes", "annotations"]
        else:
            weights = run_row("vild_text", 0, output) / "model_final.pth"
            made_of["detector"] = sha256_file(weights)
            command += [f"configs/{ROWS['vild_text'].config}", "--top", str(REGIONS), "--nms", str(REGION_NMS)]
            command += ["MODEL.WEIGHTS", str(weights)]
    times = path.with_suffix(".json")
    state = read_json(times) if times.is_file() else {"minutes": 0.0}
    if state.get("made_of", made_of) != made_of:
        raise DataError(f"{path} was made with another {' or '.join(sorted(made_of))}: remove it and {times}.")
    if not (state.get("done") and (path.is_file() or (path / "manifest.json").is_file())):
        with timed(times, state, made_of):
            run(command)
    return path


@contextlib.contextmanager
def timed(path, state, made_of):
    """Record in ``path`` what a step is made of, its minutes, interrupted ones included, and whether it is done."""
    started = time.monotonic()
    try:
        yield
        state["done"] = True
    finally:
        minutes = state["minutes"] + (time.monotonic() - started) / 60
        write_json(path, state | {"made_of": made_of, "minutes": round(minutes, 2)})


def ingredients(row, seed, trained, artefacts):
    """Hashes of what decides a row's result: configuration, trunk, data set, teacher, trained weights, artefacts."""
    cfg = load_config(row.config, ["SEED", seed, "TEST.EXPECTED_RESULTS", []]) if row.config else None
    trunk = cfg.MODEL.WEIGHTS.removeprefix("ovdet2://") if cfg else ""
    teacher = ASSETS / "open_clip" / f"{cfg.MODEL.TEACHER.ARCHITECTURE if cfg else TEACHER}.safetensors"
    return {
        "configuration": hashlib.sha256(cfg.dump().encode()).hexdigest() if cfg else "",
        "trunk": sha256_file(ASSETS / trunk) if trunk else "",
        "OV-Shapes": ensure_generated(data_root())["pixels_sha256"]["train2017"],
        "teacher": sha256_file(teacher),
        "weights": sha256_file(trained / "model_final.pth") if trained else "",
        **{ARTEFACTS[key][0]: content_hash(path) for key, path in artefacts.items()},
    }


def content_hash(path):
    """Hash of the contents of a region cache, whatever command line made it, or of a file."""
    if path.is_file():
        return sha256_file(path)
    shards = [shard["sha256"] for shard in read_json(path / "manifest.json")["shards"]]
    return hashlib.sha256("".join(shards).encode()).hexdigest()


def command_of(name, seed, folder, trained, artefacts):
    """The command that makes a row: what a user would type."""
    row = ROWS[name]
    if name == "teacher":
        return [
            "tools/evaluate_teacher.py",
            "--dataset",
            DATASET,
            "--architecture",
            TEACHER,
            "--pretrained",
            "embedded",
            "--output",
            str(folder),
        ]
    command = ["train_net.py", "--config-file", f"configs/{row.config}", "--eval-only" if trained else "--resume"]
    command += ["SEED", str(seed), "OUTPUT_DIR", str(folder)]
    if trained:
        command += ["MODEL.WEIGHTS", str(trained / "model_final.pth")]
    return command + [part for key, path in artefacts.items() for part in (key, str(path))]


def run(command):
    """Run a program of the project; its failure ends this one with its exit code."""
    print("$ python " + " ".join(command), flush=True)
    done = subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def is_done(folder):
    """Whether a row was run to its end."""
    return (folder / "row.json").is_file() and read_json(folder / "row.json").get("done", False)


def report_path(name, folder):
    """Where the evaluator of a row writes."""
    return folder / "report.json" if name == "teacher" else folder / "inference" / DATASET / "report.json"


def make_table(names, seeds, output):
    """Markdown table of the rows and seeds that are done: mean, and standard deviation over two or more seeds."""
    lines = ["| row | " + " | ".join(COLUMNS) + " | minutes | seeds |", "|---|" + "---:|" * (len(COLUMNS) + 2)]
    for name in names:
        folders = [output / name / f"seed{seed}" for seed in ([0] if name == "teacher" else seeds)]
        folders = [folder for folder in folders if is_done(folder)]
        if not folders:
            continue
        reports = [json.loads(report_path(name, folder).read_text()) for folder in folders]
        cells = [mean_and_spread([report[task].get(key) for report in reports]) for task, key in COLUMNS.values()]
        minutes = mean_and_spread([read_json(folder / "row.json")["minutes"] for folder in folders])
        lines.append(f"| {ROWS[name].title} | " + " | ".join([*cells, minutes]) + f" | {len(folders)} |")
    used = {key for name in names for key in artefacts_of(ROWS[name])}
    for key, (title, path) in ARTEFACTS.items():
        times = (output / path).with_suffix(".json")
        if key in used and times.is_file():
            minutes = read_json(times)["minutes"]
            lines.append(f"\nThe {title}, made once for all rows and seeds, took {minutes:.1f} minutes.")
    return "\n".join(lines)


def mean_and_spread(values):
    """ "61.2 ± 1.3", "61.2" for one value, "-" where a figure does not exist."""
    if None in values:
        return "-"
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


def insert_table(path, table, command):
    """Replace the text between the two markers of a markdown file.

    Raises:
        DataError: the markers are not there.
    """
    text = path.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise DataError(f"{path} has no lines {BEGIN!r} and {END!r} to put the table between.")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    write_text(path, f"{before}{BEGIN}\n`{command}`\n\n{table}\n{END}{after}")


if __name__ == "__main__":
    with exit_on_error():
        main()
