"""The captioned images that CLIM.* names: a reader of the library."""

from detectron2.config import CfgNode

from ovdet2.data.datasets.ov_shapes_captions import ensure_captions
from ovdet2.data.datasets.register import data_root
from ovdet2.data.readers.coco_captions import CocoCaptions
from ovdet2.data.readers.reader import CaptionReader
from ovdet2.data.readers.tar_shards import TarShards
from ovdet2.data.readers.tsv_captions import TsvCaptions
from ovdet2.errors import UsageError

SOURCES = ("coco", "tsv", "tar", "ov_shapes")


def build_source(cfg: CfgNode) -> CaptionReader:
    """The source of a configuration (CLIM.SOURCE, CAPTIONS, IMAGES, PAIRS, CAPTIONS_EACH; DATALOADER.MAX_BAD_IMAGES).

    Raises:
        UsageError: unknown kind, or no file named.
        DataError: a missing or damaged file, more faulty captions than tolerated, or nothing left.
    """
    kind, captions = cfg.CLIM.SOURCE, data_root() / cfg.CLIM.CAPTIONS
    if kind not in SOURCES:
        raise UsageError(f"CLIM.SOURCE is {kind!r}: choose one of {', '.join(SOURCES)}.")
    if not cfg.CLIM.CAPTIONS and kind != "ov_shapes":
        raise UsageError(f"CLIM.SOURCE is {kind!r} and CLIM.CAPTIONS is empty: name the file, or the shards.")
    folder, max_bad = data_root() / cfg.CLIM.IMAGES, cfg.DATALOADER.MAX_BAD_IMAGES
    if kind == "coco":
        return CocoCaptions(captions, folder, max_bad)
    if kind == "tsv":
        return TsvCaptions(captions, folder, max_bad)
    if kind == "tar":
        return TarShards(captions, f"{cfg.OUTPUT_DIR}/shards.safetensors", max_bad)
    return CocoCaptions(*ensure_captions(data_root(), cfg.CLIM.PAIRS, cfg.CLIM.CAPTIONS_EACH), max_bad)
