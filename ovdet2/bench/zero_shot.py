"""Latency of detectors of any words: Detic's networks against OWLv2 and Grounding DINO of ``transformers``.

    ovdet2 bench zero-shot --words 5 1203 --detectors detic-r18 detic-swinb owlv2-b16 --turns 3

All have their published sizes and random weights, which take the same time as trained ones. Each detects the 100 best
boxes in one image of noise of its usual size, from pixels to boxes. The words are the first ones of LVIS; exchanging them
is not timed. Detic has embeddings of its words and no masks, and every pair of a proposal and a word takes part in its
NMS. The detectors of ``transformers`` read the words as text with every image, and many words in several forward passes,
whose number is printed. Ratios are to the first detector.

Grounding DINO needs minutes for 1,203 words. ``--words 5 1203 --turns 1 --warm-up 0 --no-memory`` detects with them once,
after a pass with 5 words.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.structures import Instances

from ovdet2.bench.detectors import build_detector, noise_samples, random_words
from ovdet2.bench.harness import Benchmark, Candidate, Case, Comparison, positive, size_text
from ovdet2.bench.turns import Clock, Elapsed
from ovdet2.config import load_config
from ovdet2.errors import SetupError, UsageError
from ovdet2.vocabulary.word_lists import named_words
from ovdet2.zero_shot import ZeroShotDetector

BOXES = 100  # of an image
# Tokens that Grounding DINO's code knows by their ids in BERT's vocabulary.
_OF_BERT = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 1012: ".", 1029: "?"}


@dataclass
class Timed:
    """A detector with one image.

    Attributes:
        set_words: replaces the words.
        detect: detections of the image.
        passes: forward passes of an image, for the present words.
        names: the present words.
    """

    set_words: Callable[[Sequence[str]], None]
    detect: Callable[[], Instances]
    passes: Callable[[], int] = lambda: 1
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Setup:
    """How a detector is built: ``build`` from (size, device), and the size of its image, (height, width) in pixels."""

    build: Callable[[tuple[int, int], str], Timed]
    size: tuple[int, int]


def detic(config: str, size: tuple[int, int], device: str, overrides: Sequence[Any] = ()) -> Timed:
    """A network of Detic of a shipped configuration."""
    every_pair = ["MODEL.MASK_ON", False, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "TEST.DETECTIONS_PER_IMAGE", BOXES]
    cfg = load_config(config, [*every_pair, "MODEL.DEVICE", device, *overrides])
    model: Any = build_detector(cfg, random_words(["word"], [False])).eval()
    samples = noise_samples(size, objects=0)

    def set_words(names):
        model.vocabulary.set(random_words(names, [False] * len(names)))

    @torch.inference_mode()
    def detect():
        return model(samples)[0]["instances"].to("cpu")

    return Timed(set_words, detect)


def of_transformers(network_and_processor: Callable[[], tuple[Any, Any]], size: tuple[int, int], device: str) -> Timed:
    """A detector of ``transformers`` with random weights, behind our interface."""
    torch.manual_seed(0)
    network, processor = network_and_processor()
    # Without "a photo of a": OWLv2 pads all texts to 16 tokens, which some names of LVIS then exceed.
    detector = ZeroShotDetector(network.to(device), processor, detections=BOXES, template="{}")
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)

    def set_words(names):
        with contextlib.redirect_stdout(io.StringIO()):  # the number of passes, which is printed below the table
            detector.set_vocabulary(list(names))

    def detect():
        found = detector.predict(pixels)
        assert isinstance(found, Instances)  # of one image
        return found

    return Timed(set_words, detect, lambda: detector.facts["forward_passes"])


def owlv2() -> tuple[Any, Any]:
    """(network, processor) of OWLv2 B/16 with its input of 960 x 960 pixels and CLIP's vocabulary."""
    transformers = _transformers()
    # The other sizes are those of B/16 by default.
    config = transformers.Owlv2Config(vision_config={"image_size": 960, "patch_size": 16}, text_config={})
    images = transformers.Owlv2ImageProcessor(size={"height": 960, "width": 960})
    return _network(config), transformers.Owlv2Processor(images, clip_tokenizer())


def grounding_dino() -> tuple[Any, Any]:
    """(network, processor) of Grounding DINO-T: Swin-T, BERT-base, 900 queries, texts of 256 tokens.

    BERT's vocabulary is not at hand: words are split by as many pieces of CLIP's.
    """
    transformers = _transformers()
    images = transformers.GroundingDinoImageProcessor()  # short side 800, at most 1333
    config: Any = transformers.GroundingDinoConfig()  # by default the one with Swin-T and BERT-base
    return _network(config), transformers.GroundingDinoProcessor(images, piece_tokenizer(config.text_config.vocab_size))


def _transformers():
    try:
        import transformers
    except ImportError as error:
        raise SetupError(f"this benchmark needs transformers ({error}): pip install transformers.") from None
    return transformers


def _network(config):
    return _transformers().AutoModelForZeroShotObjectDetection.from_config(config)


def clip_tokenizer() -> Any:
    """CLIP's tokenizer for OWLv2's 16 tokens of a word."""
    from open_clip.tokenizer import SimpleTokenizer

    source = SimpleTokenizer()
    start, end = list(source.encoder)[-2:]
    names = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": "!"}  # its id is 0
    merges: Any = list(source.bpe_ranks)  # pairs
    return _transformers().CLIPTokenizer(vocab=source.encoder, merges=merges, model_max_length=16, **names)


def piece_tokenizer(size: int) -> Any:
    """A tokenizer of ``size`` tokens with BERT's ids of special ones; the others are the first pieces of CLIP's."""
    from open_clip.tokenizer import SimpleTokenizer
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    source = SimpleTokenizer()
    added = [token for token in _OF_BERT.values() if token not in source.encoder]
    pieces = [piece for piece in list(source.encoder)[: size - len(added)] if piece not in _OF_BERT.values()]
    places = (place for place in range(size) if place not in _OF_BERT)
    vocab = {token: place for place, token in _OF_BERT.items()} | dict(zip(pieces, places))
    merges: Any = [pair for pair in source.bpe_ranks if "".join(pair) in vocab]
    made = Tokenizer(models.BPE(vocab, merges, unk_token="[UNK]", end_of_word_suffix="</w>"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    return _transformers().PreTrainedTokenizerFast(tokenizer_object=made, **names)


DETECTORS = {
    "detic-r18": Setup(functools.partial(detic, "lvis/detic_r18_21k.yaml"), (480, 640)),
    "detic-swinb": Setup(functools.partial(detic, "lvis/detic_swinb_21k.yaml"), (800, 1066)),
    "owlv2-b16": Setup(functools.partial(of_transformers, owlv2), (960, 960)),
    "grounding-dino-t": Setup(functools.partial(of_transformers, grounding_dino), (800, 1066)),
}
OPTIONS = {
    "--words": {"nargs": "+", "type": positive, "default": [5, 1203], "help": "numbers of words, each a case"},
    "--detectors": {"nargs": "+", "choices": list(DETECTORS), "default": list(DETECTORS)},
}


def plan(args: argparse.Namespace) -> Iterator[Comparison]:
    """Every number of words.

    Raises:
        UsageError: LVIS has fewer words.
    """
    names, clock = named_words("lvis").names, Clock(args.device, args.cpu_time)
    if max(args.words) > len(names):
        raise UsageError(f"--words {max(args.words)} are more than the {len(names)} of LVIS: give fewer.")

    def run(timed, words):
        if timed.names != words:
            timed.set_words(words)
            timed.names = words
        started = clock()
        found = timed.detect()
        return Elapsed(clock() - started, (len(found), timed.passes()))

    def report(times):
        for title, place in (("boxes", 0), ("forward passes", 1)):
            print(f"{title}: " + ", ".join(f"{name} {mine[-1].value[place]}" for name, mine in times.items()))

    candidates = [
        Candidate(name, functools.partial(DETECTORS[name].build, DETECTORS[name].size, args.device), run)
        for name in dict.fromkeys(args.detectors)
    ]
    cases = [Case({"words": str(count)}, names[:count]) for count in args.words]
    images = ", ".join(f"{name} {size_text(DETECTORS[name].size)}" for name in dict.fromkeys(args.detectors))
    yield Comparison(candidates, cases, title=images, report=report)


main = Benchmark("ovdet2.bench.zero_shot", __doc__, OPTIONS, plan, turns=3).main

if __name__ == "__main__":
    main()
