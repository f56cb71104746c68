"""docs/ZOO.md from the records: ``python tools/pin_zoo.py --page``."""

from __future__ import annotations

from collections.abc import Mapping

from ovdet2.zoo.records import Record

_HEAD = """<!-- Written by `python tools/pin_zoo.py --page` from ovdet2/assets/zoo/*.json. Change the records, not this page. -->
# The zoo: published detectors by name

```python
from ovdet2 import Detector

detector = Detector("detic-swinb-21k")  # downloads, checks and converts on the first use
found = detector.predict("photo.jpg")  # the default words: LVIS's 1,203 classes
detector.set_vocabulary("striped cat, teapot")  # own words: CLIP embeds them
```

```
ovdet2 zoo list                           # names, trust, licences, published figures
ovdet2 zoo fetch detic-swinb-21k          # download and convert
ovdet2 zoo import detic-swinb-21k FILE    # convert a file that you have downloaded
ovdet2 zoo verify                         # hashes, names and shapes of all that are here
ovdet2 predict --model detic-swinb-21k --input photo.jpg --output pictures
```

The converted weights are in `$OVDET2_HOME/zoo/NAME/` (default: `~/.cache/ovdet2/zoo/NAME/`), as safetensors with a manifest. The second use needs no
network. Without network, put the file to the path that the message names, or import it. No file was downloaded for this repository yet: the import
is tested with random weights in the published formats, and no figure below was measured here.

## Words

The files of Detic, CoDet and VLDet hold the embeddings of the classes that they detect. These are the default words, and no CLIP is needed
for them. The files of ImageNet-21k have 22,047 words, of which LVIS's 1,203 come first: only those are kept. Own words replace the default
ones. They are embedded by the CLIP of the record, which `open_clip` downloads on the first use. Without network, give its weight file:

```python
detector = Detector("detic-swinb-21k", overrides=["MODEL.TEACHER.PRETRAINED", "ViT-B-32.pt"])
detector.set_vocabulary("striped cat, teapot")
```

This CLIP must embed the default words as the file of the detector does. Another one is refused.

VLDet's words were embedded in OpenAI's 80 prompts and the bare word; here without the bare word (`openclip80`).

## Trust

Files are read without running code from them. HTML pages, truncated files, and pickles with more than tensors are refused.

| level | what was compared |
|---|---|
| structure | names and shapes of all tensors with the committed list (`ovdet2/assets/zoo/structures/`). Every file must reach it; one missing, unknown or differently shaped tensor is refused by its name |
| first use | besides, the file's SHA-256 is kept in the manifest. Another file of the same name is refused later |
| pinned | besides, the SHA-256 is that of the record. A maintainer with network writes it: `python tools/pin_zoo.py NAME` |

## Downloads

| what happens | outcome |
|---|---|
| the connection ends early | it is opened again where it ended; after three connections without a byte, exit code 4, and the same command continues later |
| the host's file has changed since the part was downloaded, or the host does not continue parts | the download starts over |
| another length than that of the record, or no stated length | refused, exit code 3; nothing is kept |
| a redirect to another scheme than https | refused, exit code 4 |
| 404 or no network | exit code 4; the message has the address, the path to put the file to, and the import command |
| fewer than 1,000 bytes per second for 30 seconds | exit code 4; the part is kept, and the same command continues later |
| the disk is full while the file is converted | exit code 4; the file is kept, and the same command converts it later |

## Other zero-shot detectors

OWL-ViT, OWLv2, Grounding DINO, MM-Grounding-DINO and OmDet-Turbo of `transformers` (`pip install "ovdet2[zero-shot]"`) have the interface of
`Detector`, and the same evaluator, so that all detectors stand in one table. `transformers` loads their weights, from a folder or from its hub.

```python
from ovdet2.zero_shot import ZeroShotDetector

detector = ZeroShotDetector.load("folder/of/owlv2-base-patch16-ensemble")
detector.set_vocabulary("striped moon, red star")
found = detector.predict("photo.jpg")  # pred_classes are indices into the words
```

```
ovdet2 zero-shot --model folder/of/owlv2-base-patch16-ensemble --dataset ov_coco_val_all --output output/owlv2
ovdet2 report compare output/ovcoco/vild_text_r50/inference/ov_coco_val_all output/owlv2
```

| detector | score of a word | words of one forward pass |
|---|---|---|
| OWL-ViT, OWLv2 | sigmoid of the word's logit, prompt "a photo of a {}"; the same whatever the other words are | 512 |
| Grounding DINO, MM-Grounding-DINO | mean over the word's tokens of the sigmoid of their logits; depends on the other words of the pass | as many as fit into its text, 256 tokens |
| OmDet-Turbo | sigmoid of the word's logit, NMS within a class at IoU 0.5; depends on the other words of the pass | 64 |

More words than that go in several passes, which is printed. Their training data often have boxes of the classes that are novel here: their
"novel" figures are then no open-vocabulary figures.

Their time and memory on a CPU beside Detic's: [RESULTS.md](RESULTS.md#latency-of-detectors-of-any-words), `ovdet2 bench zero-shot`.

## Records
"""


def zoo_page(records: Mapping[str, Record]) -> str:
    """The text of docs/ZOO.md."""
    lines = ["| name | detector | published, not run here | weights | file |", "|---|---|---|---|---|"]
    for name, record in records.items():
        figures = "; ".join(f"{figure.metric} {figure.value}" for figure in record.figures)
        lines.append(
            f"| [`{name}`](#{name}) | {record.title} | {figures} | {_weights_licence(record)} | {_trust(record)} |"
        )
    return "\n".join([_HEAD, *lines, "", *(_section(record) for record in records.values())])


def _weights_licence(record):
    return record.licence.weights + ", non-commercial" * record.licence.non_commercial


def _default_words(record):
    """The row of the words that a converted file holds."""
    name = record.options.get("words", "coco")
    columns = f", the first of {record.options['columns']:,} in the file" if "columns" in record.options else ""
    return "default words" if record.teacher else "classes", f"`{name}`{columns}"


def _trust(record):
    return "pinned" if record.pinned else "structure, first use"


def _section(record):
    """All entries of a record."""
    overrides = f", with `{' '.join(map(str, record.overrides))}`" if record.overrides else ""
    rows = [("configuration", f"`{record.config}`{overrides}")]
    if record.teacher:
        rows.append(("words", f"{record.teacher}, templates `{record.templates}`"))
    else:
        rows.append(("words", "a closed set: its classes cannot be changed"))
    rows.append(_default_words(record))
    for source in record.sources:
        pin = f", {source.bytes:,} bytes, SHA-256 `{source.sha256}`" if source.sha256 else ""
        rows.append(("download by hand, then import" if source.by_hand else "file", f"<{source.url}>{pin}"))
    rows += [("licences", str(record.licence)), ("boxes in training", record.training.boxes)]
    rows += [("image labels", record.training.image_labels), ("captions", record.training.captions)]
    rows.append(("novel classes", record.training.novel))
    rows += [
        ("published, not run here", f"{figure.metric} {figure.value} ({figure.source})") for figure in record.figures
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"### {record.name}\n\n{record.title}.\n\n| | |\n|---|---|\n{table}\n"
