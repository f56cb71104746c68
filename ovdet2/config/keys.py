"""Every configuration key that ovdet2 adds to Detectron2's, each with its documentation."""

from collections.abc import Iterable

from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg as detectron2_get_cfg

from ovdet2.config.methods import find_methods
from ovdet2.errors import UsageError

# Keys of earlier versions and their names of today; those that a method has taken over are declared by it.
OLD_KEYS = {
    "MODEL.OVD.SECOND_BRANCH": "MODEL.OVD.SECONDARY_SCORES",
    "MODEL.OVD.SECOND_BRANCH_USE": "MODEL.OVD.SECONDARY_USE",
}


def get_cfg(parts: Iterable[str] = ()) -> CN:
    """Detectron2's default configuration with the keys of ovdet2 added and the test-time defaults of OVD.

    Detectron2 drops detections below 0.05, which removes most novel ones: here the threshold is 0.

    Args:
        parts: MODEL.PARTS, methods whose keys are added beside those of ovdet2 and of installed packages.

    Raises:
        UsageError: see :func:`~ovdet2.config.methods.find_methods`.
    """
    cfg = detectron2_get_cfg()
    # Import paths of methods beside those that come with ovdet2 or are installed, such as "projects.Example.example";
    # their keys are known from then on. See docs/ARCHITECTURE.md.
    cfg.MODEL.PARTS = list(parts)
    cfg.MODEL.META_ARCHITECTURE = "OpenVocabularyRCNN"
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.TEST.DETECTIONS_PER_IMAGE = 100

    _add_words(cfg)
    _add_ovd(cfg)
    _add_detr(cfg)
    _add_swin(cfg)
    _add_input(cfg)
    _add_solver(cfg)
    _add_data_and_test(cfg)
    for method in find_methods(parts):
        _add_keys_of(method, cfg)
    return cfg


def _add_keys_of(method, cfg):
    """Add the keys of a method.

    Raises:
        UsageError: it replaces a group of keys that is there already.
    """
    before = {f"MODEL.{name}": node for name, node in cfg.MODEL.items()} | dict(cfg.items())
    method.add_keys(cfg)
    after = {f"MODEL.{name}": node for name, node in cfg.MODEL.items()} | dict(cfg.items())
    replaced = [name for name, node in before.items() if isinstance(node, CN) and after.get(name) is not node]
    if replaced:
        raise UsageError(
            f"the method {method.name} replaces the keys {', '.join(replaced)}, which are another's: add its own group, "
            f"such as MODEL.{method.name.upper()}."
        )


def _add_words(cfg):
    """The vision-language model and the words."""
    # The frozen vision-language model whose embedding space the detector learns.
    cfg.MODEL.TEACHER = CN()
    # open_clip architecture, such as "ViT-B-32"; "ovshapes-resnet" and "ovshapes-vit" are embedded in the package.
    cfg.MODEL.TEACHER.ARCHITECTURE = ""
    # open_clip pretrained tag ("openai"), "embedded", or a local weight file.
    cfg.MODEL.TEACHER.PRETRAINED = ""

    cfg.MODEL.VOCABULARY = CN()
    # A file of ovdet2 vocab; empty: the teacher embeds the class names of the data set at start-up.
    cfg.MODEL.VOCABULARY.FILE = ""
    # Prompt template set used when FILE is empty: "single", "vild63", "openclip80", "photo12", or a file of your own.
    cfg.MODEL.VOCABULARY.TEMPLATES = "vild63"


def _add_ovd(cfg):
    """Classification and secondary scores, whatever the host."""
    cfg.MODEL.OVD = CN()
    # "text": cosine to the vocabulary and a learned background; "text_background": the background is the embedding of
    # the word "background", and the temperature has a learned factor (F-VLM); "closed_set": a linear layer over fixed
    # classes (sanity row).
    cfg.MODEL.OVD.CLASSIFIER = "text"
    # tau of the softmax over cosines, in training and at test.
    cfg.MODEL.OVD.TEMPERATURE = 0.01
    # "softmax": cross-entropy over the base words and a background (ViLD). "sigmoid": each word for itself, without
    # background, with a learned bias.
    cfg.MODEL.OVD.CLS_LOSS = "softmax"
    # With "sigmoid": words that take part in the loss of a batch, those annotated in it and others drawn by the number
    # of their training images (federated loss, for LVIS); 0: all base words do.
    cfg.MODEL.OVD.FEDERATED_WORDS = 0
    # The power of the number of images that the draw goes by.
    cfg.MODEL.OVD.FEDERATED_POWER = 0.5
    # Weight of a background region in the softmax cross-entropy.
    cfg.MODEL.OVD.BACKGROUND_WEIGHT = 1.0
    # Weight of the classifier's loss; 0 leaves naming to distillation alone (ViLD-image).
    cfg.MODEL.OVD.CLS_LOSS_WEIGHT = 1.0
    # Secondary scores of every proposal at test, from a part of the detector: "none"; "image", the distilled embedding
    # against the words without background (ViLD-image, ViLD-ensemble); "crops", the teacher on cropped proposals, a
    # slow reference; "map", CLIP's embedding of the proposal, pooled from the last map of a frozen CLIP trunk
    # (F-VLM); or what a method of MODEL.PARTS provides.
    cfg.MODEL.OVD.SECONDARY_SCORES = "none"
    # How they are used: "fuse" (with the detector's scores by FUSION_*), "only" (they replace them), "only_objectness" (the
    # same, times objectness and square-rooted).
    cfg.MODEL.OVD.SECONDARY_USE = "fuse"
    # Exponent of the secondary scores on base classes; the detector's is one minus it.
    cfg.MODEL.OVD.FUSION_BASE = 1.0 / 3.0
    # The same on novel classes.
    cfg.MODEL.OVD.FUSION_NOVEL = 2.0 / 3.0
    # Divide the fused scores of a region by their sum, the detector's background included.
    cfg.MODEL.OVD.FUSION_RENORMALIZE = False


def _add_detr(cfg):
    """Deformable DETR."""
    # OpenVocabularyDeformableDETR. MODEL.OVD.CLASSIFIER is its class branch; with "text" MODEL.OVD.TEMPERATURE is where
    # a learned one starts (0.01 at least). The losses are focal, over the base words.
    cfg.MODEL.DETR = CN()
    # "one_stage"; "refine" (each decoder layer refines the boxes of the one before); "two_stage" (which also starts
    # from the encoder's proposals); "plus_plus" (two-stage, mixed query selection, look forward twice; set DROPOUT 0).
    cfg.MODEL.DETR.VARIANT = "refine"
    # Maps of the backbone, finest first.
    cfg.MODEL.DETR.IN_FEATURES = ["res3", "res4", "res5"]
    # Levels of attention; those beyond IN_FEATURES are made from the last map by convolutions of stride 2.
    cfg.MODEL.DETR.LEVELS = 4
    # Queries of an image.
    cfg.MODEL.DETR.NUM_QUERIES = 300
    # Channels of the transformer.
    cfg.MODEL.DETR.DIM = 256
    # Heads of attention.
    cfg.MODEL.DETR.HEADS = 8
    # Points that a head looks at on each level.
    cfg.MODEL.DETR.POINTS = 4
    # Kernel of deformable attention: "auto" (by device, said in the log), "bag", "grid_sample" or "triton".
    cfg.MODEL.DETR.ATTENTION_KERNEL = "auto"
    # Width of the feed-forward blocks.
    cfg.MODEL.DETR.FFN_DIM = 1024
    # In attention and in the feed-forward blocks.
    cfg.MODEL.DETR.DROPOUT = 0.1
    # Layers of the encoder.
    cfg.MODEL.DETR.ENCODER_LAYERS = 6
    # Layers of the decoder.
    cfg.MODEL.DETR.DECODER_LAYERS = 6
    # Losses on the decoder layers before the last, each with a matching of its own.
    cfg.MODEL.DETR.AUXILIARY_LOSSES = True
    # Weight of the focal class loss of every layer, and of the encoder's objectness.
    cfg.MODEL.DETR.CLASS_WEIGHT = 2.0
    # Weight of the L1 distance of matched boxes.
    cfg.MODEL.DETR.L1_WEIGHT = 5.0
    # Weight of their generalised IoU loss.
    cfg.MODEL.DETR.GIOU_WEIGHT = 2.0
    # The same three in the cost that queries are matched by.
    cfg.MODEL.DETR.CLASS_COST = 2.0
    # See CLASS_COST.
    cfg.MODEL.DETR.L1_COST = 5.0
    # See CLASS_COST.
    cfg.MODEL.DETR.GIOU_COST = 2.0
    # Share of positives in focal loss and cost; negatives have one minus it.
    cfg.MODEL.DETR.FOCAL_ALPHA = 0.25
    # Power by which focal loss and cost let the easy ones go.
    cfg.MODEL.DETR.FOCAL_GAMMA = 2.0
    # Detections below it are left out; 0 keeps the best TEST.DETECTIONS_PER_IMAGE whatever their scores.
    cfg.MODEL.DETR.SCORE_THRESH_TEST = 0.0


def _add_swin(cfg):
    """Other trunks than Detectron2's."""
    # MODEL.BACKBONE.NAME "build_clip_resnet_backbone" is the teacher's image tower, with MODEL.RESNETS.OUT_FEATURES and
    # MODEL.BACKBONE.FREEZE_AT (5 freezes all); "build_clip_fpn_backbone" is the FPN of MODEL.FPN on it, or on a ViT
    # (FREEZE_AT 0 or 5); "build_timm_swin_backbone" is the following one.
    cfg.MODEL.SWIN = CN()
    # timm name of a Swin Transformer.
    cfg.MODEL.SWIN.ARCHITECTURE = "swin_base_patch4_window7_224"
    # File of its classification weights (timm's or Microsoft's) that training starts from; not read where MODEL.WEIGHTS
    # names a file of the whole detector.
    cfg.MODEL.SWIN.WEIGHTS = ""
    # Stochastic depth of the last block, falling to 0 at the first.
    cfg.MODEL.SWIN.DROP_PATH = 0.2
    # Compute activations a second time in the backward pass instead of keeping them.
    cfg.MODEL.SWIN.CHECKPOINTING = False
    # Maps, of "res2" (stride 4) to "res5" (stride 32).
    cfg.MODEL.SWIN.OUT_FEATURES = ["res3", "res4", "res5"]


def _add_input(cfg):
    """Augmentation."""
    # DETR's augmentation: half of the training images are resized and cropped before INPUT.MIN_SIZE_TRAIN (with
    # MIN_SIZE_TRAIN_SAMPLING "choice") and RANDOM_FLIP apply, which the others go through alone.
    cfg.INPUT.DETR_CROP = CN()
    # Off for the other families.
    cfg.INPUT.DETR_CROP.ENABLED = False
    # Short sides before the crop, in pixels; one is drawn.
    cfg.INPUT.DETR_CROP.RESIZE = (400, 500, 600)
    # Least and most pixels of each side of the crop.
    cfg.INPUT.DETR_CROP.SIDES = (384, 600)

    # Large scale jitter in place of the ordinary resize: the image is made to fit into a square of a random size, and
    # cut to SIDE where it is larger.
    cfg.INPUT.LSJ = CN()
    # Not together with another crop.
    cfg.INPUT.LSJ.ENABLED = False
    # Least and most size of that square, as multiples of SIDE.
    cfg.INPUT.LSJ.SCALES = (0.1, 2.0)
    # Pixels.
    cfg.INPUT.LSJ.SIDE = 1024


def _add_solver(cfg):
    """Optimizer, precision, moving average, checkpoints."""
    # SOLVER.CLIP_GRADIENTS.CLIP_TYPE takes "full_model" (the norm of all gradients) beside Detectron2's two.
    # "SGD" (with MOMENTUM and NESTEROV) or "AdamW".
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Learning rates by name: a list of [pattern, factor], as [["backbone", 0.1]]. The pattern is a regular expression
    # looked for anywhere in a parameter's name; of several found the first counts, one found nowhere is an error.
    cfg.SOLVER.LR_FACTORS = []
    # The type that SOLVER.AMP.ENABLED runs the forward pass in: "bfloat16" (CPU or CUDA) or "float16" (CUDA alone, with
    # a scaler of the gradients).
    cfg.SOLVER.AMP.DTYPE = "bfloat16"
    cfg.SOLVER.EMA = CN()
    # Keep a moving average of the weights, which is evaluated and is the "model" of the checkpoints.
    cfg.SOLVER.EMA.ENABLED = False
    # Share of the average that a step keeps.
    cfg.SOLVER.EMA.DECAY = 0.9997
    # Periodic checkpoints kept: by default one to resume from and one to fall back to; 0 keeps all.
    cfg.SOLVER.CHECKPOINTS_TO_KEEP = 2


def _add_data_and_test(cfg):
    """Data sets, loading and evaluation."""
    # Data sets of your own, each {name, json, images, base: [class names], novel: [...], base_only: True for training,
    # masks, metric, pseudo_labels}; paths are below the data folder or absolute. Captions are {kind: captions, name,
    # captions, images, format}, image labels {kind: image_labels, name, labels, images, base}. See datasets/README.md.
    cfg.DATASETS.OWN = []

    # Sources of training images beside DATASETS.TRAIN, each {name, images}: a registered data set of boxes, captions or
    # image labels, and its images of a step over all processes. If needed: datasets (several, for a name that is none),
    # kind (as they are registered), sampler (empty: SAMPLER_TRAIN for boxes, else "TrainingSampler"), min_size and
    # max_size (of INPUT.*_SIZE_TRAIN), ratio (of MIX "alternate"). Each source has NUM_WORKERS loading processes.
    cfg.DATASETS.SOURCES = []
    # "parallel": every step has the images of all sources. "alternate": a step has those of one source; the others take
    # turns by their ratios (DATASETS.TRAIN has 1).
    cfg.DATALOADER.MIX = "parallel"

    # Unreadable images tolerated (each logged once) in one source by one training process before the run stops.
    cfg.DATALOADER.MAX_BAD_IMAGES = 10

    # Draw report.html (per-class figures, errors, confusions, images) beside each report.json.
    cfg.TEST.HTML_REPORT = True
    # Words the detector is asked for beside those of the test set, though no annotation has them: a list, or
    # ["coco_unused"] for the 15 COCO classes that OV-COCO leaves out. Their detections take part in the cut to
    # DETECTIONS_PER_IMAGE and are then dropped; the report names them.
    cfg.TEST.DISTRACTORS = []
    # Report AP of every decoder layer of OpenVocabularyDeformableDETR, too: with many words, the logits of the layers
    # before the last cost time.
    cfg.TEST.DECODER_LAYERS = False
    # Proposals kept per image to report recall (AR@100, AR@300, AR@1000, those up to this number) on base and on novel
    # boxes; 0 switches it off.
    cfg.TEST.PROPOSALS_PER_IMAGE = 300
