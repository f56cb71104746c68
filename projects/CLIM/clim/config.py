"""The configuration keys of CLIM, added to those of ovdet2; the defaults are the recipe of the authors' code for
ViT-B/16, but for SAME_TEXT."""

from detectron2.config import CfgNode as CN


def add_clim_config(cfg):
    """Add CLIM.* to a configuration, and set what differs from a detector's.

    The model is MODEL.TEACHER, the run OUTPUT_DIR, SOLVER.*, DATALOADER.NUM_WORKERS and MAX_BAD_IMAGES, and SEED.
    """
    cfg.CLIM = CN()
    # "coco": a COCO-captions json and a folder of images; "tsv": lines of caption<TAB>path; "tar": webdataset shards;
    # "ov_shapes": the captions of OV-Shapes, drawn below $DETECTRON2_DATASETS on first use.
    cfg.CLIM.SOURCE = "coco"
    # The json, the tsv file, or a glob pattern of the shards; relative to $DETECTRON2_DATASETS.
    cfg.CLIM.CAPTIONS = ""
    # The folder that image paths are relative to; likewise.
    cfg.CLIM.IMAGES = ""
    # With "ov_shapes": how many images, and captions of each, of which one is drawn at random.
    cfg.CLIM.PAIRS = 10000
    cfg.CLIM.CAPTIONS_EACH = 5
    # With "tar": samples among which the next one is drawn.
    cfg.CLIM.SHUFFLE_BUFFER = 10000
    # File of the captions' embeddings, made where it is missing; "": captions.safetensors in OUTPUT_DIR.
    cfg.CLIM.TEXT_TABLE = ""

    # Cells a side of the mosaics: each round of a batch makes one of each.
    cfg.CLIM.GRIDS = [2, 3, 4]
    # Images of a round that stay single, and go through the model as in classification.
    cfg.CLIM.SINGLES = 3
    # Side of the canvas in pixels, a multiple of the model's stride.
    cfg.CLIM.CANVAS = 1024
    # Two captions whose cosine is above this are no negatives of each other. 0.9999: equal captions; lower: those that
    # mean the same; 1.1: none, as in the authors' code.
    cfg.CLIM.SAME_TEXT = 0.9999
    # Area of the random crop of an image as a share of it, and the chance of its mirror image.
    cfg.CLIM.CROP_SCALE = [0.9, 1.0]
    cfg.CLIM.FLIP = 0.0

    # Last blocks of the image tower that are trained (of a ResNet: stages, with the attention pool); -1: all of the
    # tower, the embedding of patches and the projection included.
    cfg.CLIM.TRAINABLE_BLOCKS = 6
    # Of the trained part of a ResNet, freeze what maps into the joint space (value and output projections of the attention
    # pool) and the batch norms, as the authors do: convolutions, query and key projections and the positional embedding
    # are trained. False trains all of that part; the statistics of batch norms are always frozen.
    cfg.CLIM.FREEZE_OUTPUT_AND_NORMS = True
    cfg.CLIM.BETAS = [0.9, 0.98]
    cfg.CLIM.EPS = 1e-6
    # a of the published weights, a * trained + (1 - a) * original: 0.7 in the authors' code, 1 in the paper.
    cfg.CLIM.AVERAGE = 0.7

    # After training: data set whose ground-truth boxes the original and the new weights name; "": none.
    cfg.CLIM.EVALUATION = CN()
    cfg.CLIM.EVALUATION.DATASET = ""
    # Longest edge of the image for the dense map, in pixels.
    cfg.CLIM.EVALUATION.SIDE = 1024
    # Pad the image for the dense map to a square of that side, as the authors do.
    cfg.CLIM.EVALUATION.SQUARE = True

    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (), ()
    cfg.SOLVER.OPTIMIZER = "AdamW"
    cfg.SOLVER.IMS_PER_BATCH = 128
    cfg.SOLVER.BASE_LR = 1e-5
    cfg.SOLVER.WEIGHT_DECAY = 0.1
    cfg.SOLVER.LR_SCHEDULER_NAME = "WarmupCosineLR"
    cfg.SOLVER.WARMUP_ITERS = 1000
    cfg.SOLVER.WARMUP_FACTOR = 0.001
    cfg.OUTPUT_DIR = "output/clim"
