r"""List the words present in each image of a data set, as semantic priors of a detector (CCKT-Det).

    # CLIP: sigmoid of the cosine between the image and a word, divided by 0.07
    ovdet2 prior --backend clip --dataset ov_coco_val_all \
        --architecture ViT-L-14 --pretrained laion2b_s32b_b82k --output output/priors/clip.safetensors
    # the ground truth; the ground truth with a given precision and recall (a simulation); random words
    ovdet2 prior --backend oracle --dataset ov_coco_val_all --output oracle.safetensors
    ovdet2 prior --backend noisy-oracle --precision 0.8 --recall 0.7 --dataset ov_coco_val_all --output noisy.safetensors
    ovdet2 prior --backend random --dataset ov_coco_val_all --output random.safetensors
    # priors made elsewhere: JSON {image id: [[category id or word, score], ...]}
    ovdet2 prior --backend file --input priors.json --dataset ov_coco_val_all --output priors.safetensors
    # a vision-language model, which is asked about each word: behind a URL, or in a folder
    ovdet2 prior --backend mllm --url http://localhost:8000/v1 --model NAME \
        --candidates output/priors/clip.safetensors --top 20 --dataset ov_coco_val_all --output mllm.safetensors
    ovdet2 prior --backend mllm --local FOLDER --dataset ov_coco_val_all --output mllm.safetensors

Prints precision and recall over base and novel classes at --rho and --top-l. The file holds the --keep best words of each
image, so that other thresholds and lengths need no new file. Answers of a model are saved beside the output as they
arrive: after an interruption the same command continues.

Exit codes: 2 usage, 3 data, 4 environment.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.data import MetadataCatalog

from ovdet2.command_line import command_parser, dataset_files, keep_inputs, options_but
from ovdet2.config import get_cfg
from ovdet2.data.datasets import split_of
from ovdet2.data.datasets.coco_json import Split
from ovdet2.data.datasets.register import validation_set_of
from ovdet2.data.records import load_records
from ovdet2.errors import DataError, UsageError, exit_on_error
from ovdet2.io.files import sha256_file
from ovdet2.io.progress import progress_bar
from ovdet2.priors.chat_server import ChatServer
from ovdet2.priors.clip import RESIZE, ClipBackend
from ovdet2.priors.concept_prior import ConceptPriors, PriorWriter
from ovdet2.priors.from_file import FromFile
from ovdet2.priors.local_model import LocalModel
from ovdet2.priors.mllm import PROMPT, MllmBackend
from ovdet2.priors.quality import as_table, quality
from ovdet2.priors.simulated import Chance, NoisyOracle, Oracle
from ovdet2.priors.truth import Truth, truth_of
from ovdet2.vlm.teacher import Teacher
from ovdet2.vocabulary import Vocabulary, parse_words

# Options that only some backends read, with their defaults (None: none).
_OPTIONS = {
    "clip": {
        "architecture": None,
        "pretrained": None,
        "templates": "vild63",
        "tiles": 1,
        "resize": "crop",
        "temperature": 0.07,
        "batch_size": 64,
        "num_workers": 2,
        "device": None,
    },
    "mllm": {
        "url": None,
        "model": None,
        "api_key_env": None,
        "request": None,
        "workers": 4,
        "timeout": 120.0,
        "local": None,
        "batch_size": 8,
        "device": None,
        "prompt": PROMPT,
        "answers": None,
        "candidates": None,
        "top": None,
        "max_queries": None,
    },
    "oracle": {},
    "noisy-oracle": {"precision": None, "recall": None, "seed": 0},
    "random": {"seed": 0},
    "file": {"input": None},
}
Backend = ClipBackend | MllmBackend | FromFile | Chance | Oracle
_OF_SERVER = ("url", "model", "api_key_env", "request", "workers", "timeout")
_NEEDED = {"clip": ("architecture", "pretrained"), "noisy-oracle": ("precision", "recall"), "file": ("input",)}


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Command line; returns the rows of the printed table."""
    args = parse_args(argv)
    records = sorted(load_records([args.dataset], "--dataset", False), key=lambda record: record["image_id"])
    images = (record["file_name"] for record in records)
    keep_inputs("--output", [args.output], options_but(args, "output"), dataset_files(args.dataset), images)
    split = split_of(args.dataset)
    if split is None:
        raise UsageError(f"{args.dataset!r} is not a registered open-vocabulary data set: see datasets/README.md.")
    words, vocabulary = wanted_words(args, split)
    truth = truth_of(records, split)
    backend = make_backend(args, words, vocabulary, split, truth)
    if backend.kind == "simulation":
        print(f"SIMULATION: {backend.source}. Results of a detector with this prior are no results of a method.")
    writer = PriorWriter(words, [record["image_id"] for record in records], args.keep)
    skipped = Skipped(args.max_bad_images)
    lists = backend.lists(records, skipped)
    for image_id, index, score in progress_bar(
        lists, total=len(records), desc="images", disable=backend.kind != "prediction"
    ):
        writer.add(image_id, index, score)
    if not writer.entries:
        raise DataError(
            f"no word is present in any of the {len(records)} images of {args.dataset}, so no prior is written: check "
            "the words, and that the lists are of these images."
        )
    json_file = MetadataCatalog.get(args.dataset).ov_files()[0]
    writer.save(args.output, args.dataset, sha256_file(json_file), backend.source, backend.kind)
    return report(args, backend, split, truth, skipped)


def report(
    args: argparse.Namespace, backend: Backend, split: Split, truth: dict[int, Truth], skipped: Skipped
) -> list[dict[str, Any]]:
    """Print what was written and how good it is; returns the rows of the table, which a held-out test set has not."""
    priors = ConceptPriors(args.output)
    entries = priors.manifest["entries"]
    print(f"{priors}; {entries} entries, {entries / max(1, len(priors)):.1f} per image")
    if isinstance(backend, MllmBackend):
        print(f"Questions: {backend.asked} put, {backend.known} known; answers that say neither: {backend.unparsable}")
    if skipped.messages:
        print("Without priors, since they cannot be used:\n  " + "\n  ".join(skipped.messages))
    if isinstance(backend, FromFile) and (backend.other_images or backend.other_words):
        print(
            f"Skipped in {args.input}: {backend.other_images} images that {args.dataset} does not have, and "
            f"{sum(backend.other_words.values())} entries of {len(backend.other_words)} words that are not in the list."
        )
    coverage = priors.coverage(split.names)
    if coverage.dropped or coverage.unknown:
        print(
            f"Of the {len(split.names)} classes of {args.dataset}, {len(coverage.unknown)} are not among the words; "
            f"{len(coverage.dropped)} words are no class of it and are not judged."
        )
    if validation_set := validation_set_of(args.dataset):
        print(
            f"{args.dataset} is held out for final tables, so rho and L are not compared on it: use {validation_set}."
        )
        return []
    rows = quality(priors, truth, split, args.rho, args.top_l)
    print(f"Precision P and recall R, percent, over {len(truth)} images of {args.dataset}:\n{as_table(rows)}")
    return rows


class Skipped:
    """Collects what is wrong with images that are skipped, up to a limit."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.messages: list[str] = []

    def __call__(self, message: str) -> None:
        self.messages.append(message)
        if len(self.messages) > self.limit:
            raise DataError(
                f"{len(self.messages)} images cannot be used, --max-bad-images is {self.limit}:\n  "
                + "\n  ".join(self.messages)
                + "\nRepair them or raise --max-bad-images."
            )


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line of this program."""
    parser = command_parser("prior", __doc__)
    parser.add_argument("--backend", required=True, choices=sorted(_OPTIONS))
    parser.add_argument("--dataset", required=True, help="registered data set with a base/novel split")
    parser.add_argument("--output", required=True, help="file to write (.safetensors)")
    parser.add_argument("--words", help='"cat, red mug", or a text file with a word per line; default: the classes')
    parser.add_argument("--vocabulary", help="vocabulary file of ovdet2 vocab, instead of --words")
    parser.add_argument("--keep", type=int, default=100, help="words kept per image")
    parser.add_argument("--rho", type=_numbers(float), default=[0.0, 0.7, 0.9], help="thresholds of the table, 0.7,0.9")
    parser.add_argument("--top-l", type=_numbers(_length), default=[6, 12, None], help="lengths of it, 6,12,all")
    bad = get_cfg().DATALOADER.MAX_BAD_IMAGES
    parser.add_argument("--max-bad-images", type=int, default=bad, help="images that may be skipped")
    own = parser.add_argument_group("options of a backend")
    own.add_argument("--architecture", help="clip: open_clip architecture")
    own.add_argument("--pretrained", help="clip: pretrained tag, 'embedded' or a weight file")
    own.add_argument("--templates", help="clip: template set (vild63)")
    own.add_argument(
        "--tiles", type=int, help="clip: n x n cells in addition to the image, of which the best counts (1)"
    )
    own.add_argument("--resize", choices=RESIZE, help="clip: its own transform, or the image warped (crop)")
    own.add_argument("--temperature", type=float, help="clip: tau (0.07)")
    own.add_argument("--batch-size", type=int, help="clip: views per forward pass (64); mllm --local: questions (8)")
    own.add_argument("--num-workers", type=int, help="clip: processes that decode (2)")
    own.add_argument("--url", help="mllm: chat-completions server, such as http://localhost:8000/v1")
    own.add_argument("--model", help="mllm: its name there")
    own.add_argument("--api-key-env", help="mllm: environment variable with the key to send; default: none is sent")
    own.add_argument("--request", type=json.loads, help='mllm: changes of the request, {"logprobs": null}')
    own.add_argument("--workers", type=int, help="mllm: requests at the same time (4)")
    own.add_argument("--timeout", type=float, help="mllm: seconds for a complete reply (120)")
    own.add_argument("--local", help="mllm: folder of a transformers model, instead of --url")
    own.add_argument("--prompt", help=f"mllm: question, [OBJ] for the word ({PROMPT})")
    own.add_argument("--answers", help="mllm: folder of the answers (the output's name with .answers)")
    own.add_argument("--candidates", help="mllm: another prior of the data set: ask about its --top words only")
    own.add_argument("--top", type=int, help="mllm: see --candidates")
    own.add_argument("--max-queries", type=int, help="mllm: stop after so many questions, writing no prior")
    own.add_argument("--device", help="clip, mllm --local: default: cuda if available, otherwise cpu")
    own.add_argument("--precision", type=float, help="noisy-oracle: share of its words that are present, (0, 1]")
    own.add_argument("--recall", type=float, help="noisy-oracle: share of the present classes it lists, (0, 1]")
    own.add_argument("--seed", type=int, help="noisy-oracle, random (0)")
    own.add_argument("--input", help="file: the JSON")
    return _checked(parser, parser.parse_args(argv))


def _checked(parser, args):
    """Fill in the defaults of the chosen backend and refuse the options of others."""
    mine = _OPTIONS[args.backend]
    elsewhere = [name for name in _OF_SERVER if args.local and getattr(args, name) is not None]
    elsewhere += [name for name in ("batch_size", "device") if args.url and getattr(args, name) is not None]
    if elsewhere:
        parser.error(
            f"--{elsewhere[0].replace('_', '-')} is no option of --backend mllm {'--local' if args.local else '--url'}"
        )
    for name in sorted({name for options in _OPTIONS.values() for name in options}):
        option = "--" + name.replace("_", "-")
        if getattr(args, name) is None:
            setattr(args, name, mine.get(name))
        elif name not in mine:
            parser.error(f"{option} is no option of --backend {args.backend}")
        if name in _NEEDED.get(args.backend, ()) and getattr(args, name) is None:
            parser.error(f"--backend {args.backend} needs {option}")
    if args.backend == "mllm":
        if bool(args.url) == bool(args.local) or bool(args.url) != bool(args.model):
            parser.error("--backend mllm needs --url and --model, or --local")
        if bool(args.candidates) != bool(args.top):
            parser.error("--candidates and --top go together")
        if args.request is not None and not isinstance(args.request, dict):
            parser.error("--request is a JSON object")
    if args.words and args.vocabulary:
        parser.error("give --words or --vocabulary, not both")
    for name in ("keep", "tiles", "batch_size", "workers", "top", "max_queries"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is at least 1")
    for name in ("temperature", "timeout"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            parser.error(f"--{name} is above 0")
    return args


def _numbers(kind):
    return lambda text: [kind(number) for number in text.split(",")]


def _length(text):
    return None if text == "all" else int(text)


def wanted_words(args: argparse.Namespace, split: Split) -> tuple[Sequence[str], Vocabulary | None]:
    """(words, the vocabulary of --vocabulary or None)."""
    if args.vocabulary:
        vocabulary = Vocabulary.load(args.vocabulary)
        return vocabulary.names, vocabulary
    return (parse_words(args.words) if args.words else split.names), None


def make_backend(
    args: argparse.Namespace,
    words: Sequence[str],
    vocabulary: Vocabulary | None,
    split: Split,
    truth: dict[int, Truth],
) -> Backend:
    """The backend of the command line."""
    if args.backend == "clip":
        return clip_backend(args, words, vocabulary)
    if args.backend == "mllm":
        return mllm_backend(args, words)
    if args.backend == "file":
        return FromFile(args.input, words, split.category_ids, split.names)
    if args.backend == "random":
        return Chance(words, args.seed)
    if args.backend == "noisy-oracle":
        return NoisyOracle(truth, split.names, words, args.precision, args.recall, args.seed)
    return Oracle(truth, split.names, words)


def clip_backend(args: argparse.Namespace, words: Sequence[str], vocabulary: Vocabulary | None) -> ClipBackend:
    """CLIP with the words of a vocabulary file as they are, if it is of the same teacher, or embedded here."""
    teacher = Teacher.load(args.architecture, args.pretrained, _device(args))
    if vocabulary is None or vocabulary.teacher != teacher.fingerprint:
        if vocabulary is not None:
            print(f"{args.vocabulary} is of teacher {vocabulary.teacher}: its words are embedded anew.")
        vocabulary = Vocabulary.build(words, teacher, args.templates, progress=True)
    print(f"Teacher {teacher.fingerprint}. A detector of another teacher may use this prior, too: it is about words.")
    return ClipBackend(
        teacher, vocabulary, args.tiles, args.resize, args.temperature, args.batch_size, args.num_workers
    )


def mllm_backend(args: argparse.Namespace, words: Sequence[str]) -> MllmBackend:
    """The model of --url or --local, asked about every word or about the candidates."""
    if args.local:
        model = LocalModel(args.local, _device(args), args.batch_size)
    else:
        model = ChatServer(args.url, args.model, _key(args), args.workers, args.timeout, extra=args.request)
        if model.proxy:
            print(f"Requests go through the proxy {model.proxy}.")
    candidates = None
    if args.candidates:
        candidates = ConceptPriors(args.candidates)
        candidates.require_dataset(args.dataset, MetadataCatalog.get(args.dataset).ov_files()[0])
    folder = args.answers or Path(args.output).with_suffix(".answers")
    return MllmBackend(model, folder, words, args.prompt, candidates, args.top, args.max_queries)


def _key(args):
    """The key of --api-key-env. Only the usual form of a name is printed: it may be the key itself, given by mistake."""
    if not args.api_key_env:
        return None
    key = os.environ.get(args.api_key_env)
    if not key:
        named = re.fullmatch(r"[A-Z][A-Z0-9_]{0,40}", args.api_key_env)
        which = f"{args.api_key_env} of --api-key-env" if named else "that --api-key-env names"
        raise UsageError(
            f"the environment variable {which} is not set: set it. The option takes the name of the variable, not the key."
        )
    return key


def _device(args):
    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    with exit_on_error():
        main()
