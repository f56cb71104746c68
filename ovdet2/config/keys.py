"""Every configuration key that ovdet2 adds to Detectron2's, each with its documentation."""

from collections.abc import Iterable

from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg as detectron2_get_cfg

from ovdet2.config.methods import find_methods
from ovdet2.errors import UsageError

# {key of an earlier version: current key}. A method declares the keys that have moved to it.
OLD_KEYS = {
    "MODEL.OVD.SECOND_BRANCH": "MODEL.OVD.SECONDARY_SCORES",
    "MODEL.OVD.SECOND_BRANCH_USE": "MODEL.OVD.SECONDARY_USE",
    "MODEL.OVD.SECOND_BRANCH_BACKGROUND": "MODEL.OVD.SECONDARY_BACKGROUND",
}


def get_cfg(parts: Iterable[str] = ()) -> CN:
    """Detectron2's default configuration with the keys of ovdet2 added and the test-time defaults of OVD.

    Detectron2 drops detections with scores below 0.05, which removes most novel ones. Here the threshold is 0.

    Args:
        parts: MODEL.PARTS, methods whose keys are added to those of ovdet2 and of installed packages.

    Raises:
        UsageError: see :func:`~ovdet2.config.methods.find_methods`.
    """
    cfg = detectron2_get_cfg()
    # Import paths of further methods, neither part of ovdet2 nor installed, such as "projects.Example.example"; their
    # keys are added to the defaults. See docs/ARCHITECTURE.md.
    cfg.MODEL.PARTS = list(parts)
    cfg.MODEL.META_ARCHITECTURE = "OpenVocabularyRCNN"
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.TEST.DETECTIONS_PER_IMAGE = 100

    _add_words(cfg)
    _add_ovd(cfg)
    _add_rpn(cfg)
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
    # Prompt template set used when FILE is empty: "single", "vild63", "openclip80", "photo12", "detic", or a template file.
    cfg.MODEL.VOCABULARY.TEMPLATES = "vild63"


def _add_ovd(cfg):
    """Classification and secondary scores, for all meta-architectures."""
    cfg.MODEL.OVD = CN()
    # "text": cosine to the vocabulary and a learned background; "text_background": the background is the embedding of
    # the word "background", and the temperature has a learned factor (F-VLM); "closed_set": a linear layer over fixed
    # classes (sanity check).
    cfg.MODEL.OVD.CLASSIFIER = "text"
    # tau of the softmax over cosines, in training and at test.
    cfg.MODEL.OVD.TEMPERATURE = 0.01
    # "softmax": cross-entropy over the base words and a background (ViLD). "sigmoid": binary cross-entropy per word,
    # without background, with a learned bias.
    cfg.MODEL.OVD.CLS_LOSS = "softmax"
    # With "sigmoid": number of words in the loss of a batch: the words annotated in it, and others sampled by the
    # number of their training images (federated loss, for LVIS). 0: all base words.
    cfg.MODEL.OVD.FEDERATED_WORDS = 0
    # Words are sampled in proportion to their number of training images to this power.
    cfg.MODEL.OVD.FEDERATED_POWER = 0.5
    # Weight of a background region in the softmax cross-entropy.
    cfg.MODEL.OVD.BACKGROUND_WEIGHT = 1.0
    # Weight of the classification loss; 0 trains classification by distillation only (ViLD-image).
    cfg.MODEL.OVD.CLS_LOSS_WEIGHT = 1.0
    # Secondary scores of every proposal at test, from a part of the detector: "none"; "image", softmax over words
    # without background of the distilled embedding (ViLD-image, ViLD-ensemble); "crops", of the teacher's embedding of
    # the cropped proposal, a slow reference; "map", of CLIP's embedding of the proposal, pooled from the last feature
    # map of a frozen CLIP backbone (F-VLM); or a value that a method of MODEL.PARTS provides.
    cfg.MODEL.OVD.SECONDARY_SCORES = "none"
    # Use of the secondary scores: "fuse" (with the detector's scores by FUSION_*), "only" (they replace the detector's
    # scores), "only_objectness" (square root of secondary score times objectness).
    cfg.MODEL.OVD.SECONDARY_USE = "fuse"
    # Background of secondary scores that have none ("image", "crops"): "none" (as ViLD published); "text" (times 1 minus
    # the text branch's probability of background); "objectness" (times the RPN's objectness).
    cfg.MODEL.OVD.SECONDARY_BACKGROUND = "none"
    # Exponent e of the secondary scores on base classes; the exponent of the detector's scores is 1 - e.
    cfg.MODEL.OVD.FUSION_BASE = 1.0 / 3.0
    # Exponent of the secondary scores on novel classes.
    cfg.MODEL.OVD.FUSION_NOVEL = 2.0 / 3.0
    # Divide the fused scores of a region by their sum, the detector's background included.
    cfg.MODEL.OVD.FUSION_RENORMALIZE = False


def _add_rpn(cfg):
    """Pyramid, RPN and box head of the two-stage detectors."""
    # Norms and level p6 of the FPN of "build_clip_fpn_backbone" and "build_resnet_pyramid_backbone". "detectron2": a norm after every convolution, p6 is p5
    # subsampled. "output_norm": norms on the outputs only, p6 is a 3x3 convolution of stride 2 on p5 before its norm (the
    # releases of ViLD and F-VLM).
    cfg.MODEL.FPN.FORM = "detectron2"
    cfg.MODEL.CLIP_VIT = CN()
    # The convolutions that upsample the tokens of a CLIP ViT halve the channels. False keeps them (CLIM, CLIPSelf).
    cfg.MODEL.CLIP_VIT.HALVE_CHANNELS = False
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "OpenVocabularyRPN"
    # The box loss of the RPN is divided by the number of "sampled" anchors (Detectron2's "RPN"), or is the mean over the
    # coordinates of "positives_per_level", summed over the levels (the releases of ViLD and F-VLM).
    cfg.MODEL.RPN.BBOX_REG_AVERAGE = "sampled"
    # "NormalizedRPNHead" reads the two keys below; without a norm it is Detectron2's "StandardRPNHead".
    cfg.MODEL.RPN.HEAD_NAME = "NormalizedRPNHead"
    # Norm after each of MODEL.RPN.CONV_DIMS, before the ReLU: "" for none, "BN", "SyncBN", "GN", ...
    cfg.MODEL.RPN.NORM = ""
    # Separate norms for each level of the pyramid; False shares one norm.
    cfg.MODEL.RPN.NORM_PER_LEVEL = True
    # Norm after each FC of "NormalizedBoxHead": "" for none. MODEL.ROI_BOX_HEAD.NORM is that of the convolutions.
    cfg.MODEL.ROI_BOX_HEAD.FC_NORM = ""
    # The box loss of regions is divided by the number of "sampled" regions (Detectron2), or by that of the coordinates of
    # "positives", four for each (the release of ViLD). They are equal if a quarter of the sampled regions is positive.
    cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_AVERAGE = "sampled"


def _add_detr(cfg):
    """Deformable DETR."""
    # OpenVocabularyDeformableDETR. MODEL.OVD.CLASSIFIER is its class branch; with "text" MODEL.OVD.TEMPERATURE is the
    # initial value of a learned temperature (at least 0.01). The class losses are focal, over the base words.
    cfg.MODEL.DETR = CN()
    # "one_stage"; "refine" (each decoder layer refines the boxes of the previous layer); "two_stage" (refine, and the
    # first boxes are proposals of the encoder); "plus_plus" (two-stage with mixed query selection and look forward
    # twice; set DROPOUT to 0).
    cfg.MODEL.DETR.VARIANT = "refine"
    # Feature maps of the backbone, finest first.
    cfg.MODEL.DETR.IN_FEATURES = ["res3", "res4", "res5"]
    # Feature levels of the attention; levels beyond IN_FEATURES come from the last map by convolutions of stride 2.
    cfg.MODEL.DETR.LEVELS = 4
    # Number of object queries per image.
    cfg.MODEL.DETR.NUM_QUERIES = 300
    # Channels of the transformer.
    cfg.MODEL.DETR.DIM = 256
    # Attention heads.
    cfg.MODEL.DETR.HEADS = 8
    # Sampling points per head and level.
    cfg.MODEL.DETR.POINTS = 4
    # Kernel of deformable attention: "auto" (by device; the log names it), "bag", "grid_sample" or "triton".
    cfg.MODEL.DETR.ATTENTION_KERNEL = "auto"
    # plus_plus: positions are the first half of a layer norm over 2 DIM channels, as in H-Deformable-DETR, whose
    # weights need it; False: a layer norm over DIM channels.
    cfg.MODEL.DETR.WIDE_POSITION = False
    # Hidden width of the feed-forward blocks.
    cfg.MODEL.DETR.FFN_DIM = 1024
    # Dropout in attention and in the feed-forward blocks.
    cfg.MODEL.DETR.DROPOUT = 0.1
    # Layers of the encoder.
    cfg.MODEL.DETR.ENCODER_LAYERS = 6
    # Layers of the decoder.
    cfg.MODEL.DETR.DECODER_LAYERS = 6
    # Losses on all decoder layers before the last, each with a separate matching.
    cfg.MODEL.DETR.AUXILIARY_LOSSES = True
    # Weight of the focal class loss of every layer, and of the encoder's objectness.
    cfg.MODEL.DETR.CLASS_WEIGHT = 2.0
    # Weight of the L1 distance of matched boxes.
    cfg.MODEL.DETR.L1_WEIGHT = 5.0
    # Weight of the generalised IoU loss of matched boxes.
    cfg.MODEL.DETR.GIOU_WEIGHT = 2.0
    # Weight of the focal class cost in the matching of queries to ground truth.
    cfg.MODEL.DETR.CLASS_COST = 2.0
    # Weight of the L1 distance of boxes in the matching.
    cfg.MODEL.DETR.L1_COST = 5.0
    # Weight of the generalised IoU cost in the matching.
    cfg.MODEL.DETR.GIOU_COST = 2.0
    # Weight of positives in focal loss and cost; the weight of negatives is 1 - FOCAL_ALPHA.
    cfg.MODEL.DETR.FOCAL_ALPHA = 0.25
    # Focusing exponent of focal loss and cost: a larger one reduces the weight of easy examples more.
    cfg.MODEL.DETR.FOCAL_GAMMA = 2.0
    # Detections with lower scores are dropped; 0 keeps the TEST.DETECTIONS_PER_IMAGE highest scores.
    cfg.MODEL.DETR.SCORE_THRESH_TEST = 0.0


def _add_swin(cfg):
    """Backbones that Detectron2 does not have."""
    # MODEL.BACKBONE.NAME "build_clip_resnet_backbone" is the teacher's image tower, with MODEL.RESNETS.OUT_FEATURES and
    # MODEL.BACKBONE.FREEZE_AT (5 freezes all); "build_clip_fpn_backbone" is the FPN of MODEL.FPN on it, or on a ViT
    # (FREEZE_AT 0 or 5); "build_timm_swin_backbone" is the Swin Transformer of MODEL.SWIN.
    cfg.MODEL.SWIN = CN()
    # timm name of a Swin Transformer.
    cfg.MODEL.SWIN.ARCHITECTURE = "swin_base_patch4_window7_224"
    # File of classification weights (timm's or Microsoft's) that training starts from; not read if MODEL.WEIGHTS names
    # a file with weights of a complete detector.
    cfg.MODEL.SWIN.WEIGHTS = ""
    # Stochastic depth rate of the last block; it decreases linearly to 0 at the first block.
    cfg.MODEL.SWIN.DROP_PATH = 0.2
    # Activation checkpointing: recompute activations in the backward pass instead of storing them.
    cfg.MODEL.SWIN.CHECKPOINTING = False
    # Output feature maps, from "res2" (stride 4) to "res5" (stride 32).
    cfg.MODEL.SWIN.OUT_FEATURES = ["res3", "res4", "res5"]


def _add_input(cfg):
    """Augmentation."""
    # DETR's augmentation: half of the training images are resized and cropped first. Then INPUT.MIN_SIZE_TRAIN (with
    # MIN_SIZE_TRAIN_SAMPLING "choice") and RANDOM_FLIP apply to all images.
    cfg.INPUT.DETR_CROP = CN()
    # Switch on the crop; used by the DETR configurations.
    cfg.INPUT.DETR_CROP.ENABLED = False
    # Short sides before the crop, in pixels; one is drawn.
    cfg.INPUT.DETR_CROP.RESIZE = (400, 500, 600)
    # Minimum and maximum pixels of each side of the crop.
    cfg.INPUT.DETR_CROP.SIDES = (384, 600)

    # Large scale jitter instead of the ordinary resize: the image is resized to fit into a square of random size, and
    # cropped to SIDE if it is larger.
    cfg.INPUT.LSJ = CN()
    # Switch on large scale jitter; it excludes INPUT.CROP and INPUT.DETR_CROP.
    cfg.INPUT.LSJ.ENABLED = False
    # Minimum and maximum size of that square, as multiples of SIDE.
    cfg.INPUT.LSJ.SCALES = (0.1, 2.0)
    # Side of the crop in pixels.
    cfg.INPUT.LSJ.SIDE = 1024

    # Side in pixels of the square that images are padded to, at the right and bottom, in training and at test; 0 pads a
    # batch to its largest image. It must be at least MAX_SIZE_TEST and LSJ.SIDE. A CLIP ViT has other positional
    # embeddings on a square than on the image. For two-stage detectors.
    cfg.INPUT.SQUARE = 0


def _add_solver(cfg):
    """Optimizer, precision, moving average, checkpoints."""
    # SOLVER.CLIP_GRADIENTS.CLIP_TYPE also takes "full_model" (the norm of all gradients).
    # Optimizer: "SGD" (with MOMENTUM and NESTEROV) or "AdamW".
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Factors of the learning rate by parameter name: a list of [pattern, factor], such as [["backbone", 0.1]]. The
    # pattern is a regular expression that is searched in the name. The first pattern that matches a parameter applies;
    # a pattern that matches no parameter is an error.
    cfg.SOLVER.LR_FACTORS = []
    # Data type of the forward pass with SOLVER.AMP.ENABLED: "bfloat16" (CPU or CUDA) or "float16" (CUDA only, with
    # gradient scaling).
    cfg.SOLVER.AMP.DTYPE = "bfloat16"
    cfg.SOLVER.EMA = CN()
    # Compute a moving average of the weights, which is evaluated and saved as the "model" of the checkpoints.
    cfg.SOLVER.EMA.ENABLED = False
    # Decay of the moving average per step.
    cfg.SOLVER.EMA.DECAY = 0.9997
    # Number of periodic checkpoints that are kept; 0 keeps all. The second one is a backup in case the last is damaged.
    cfg.SOLVER.CHECKPOINTS_TO_KEEP = 2


def _add_data_and_test(cfg):
    """Data sets, loading and evaluation."""
    # Data sets to register, each {name, json, images, base: [class names], novel: [...], base_only: True for training,
    # masks, metric, pseudo_labels}; paths are below the data folder or absolute. Captions are {kind: captions, name,
    # captions, images, format}, image labels {kind: image_labels, name, labels, images, base}. See datasets/README.md.
    cfg.DATASETS.OWN = []

    # Sources of training images in addition to DATASETS.TRAIN, each {name, images}: a registered data set of boxes,
    # captions or image labels, and its images per step over all processes. Optional keys: datasets (a list of data
    # sets, if the name is not one), kind (default: as registered), sampler (empty: SAMPLER_TRAIN for boxes, else
    # "TrainingSampler"), min_size and max_size (default: INPUT.*_SIZE_TRAIN), ratio (for MIX "alternate"). Each source
    # has NUM_WORKERS loading workers.
    cfg.DATASETS.SOURCES = []
    # File of ovdet2 cache captions of the captioned images in SOURCES, for methods that read caption embeddings; several
    # files, of different data sets, are separated by commas.
    cfg.DATASETS.CAPTION_CACHE = ""
    # "parallel": every step has images of all sources. "alternate": every step has images of one source; the sources
    # alternate in proportion to their ratios (DATASETS.TRAIN has 1).
    cfg.DATALOADER.MIX = "parallel"

    # Unreadable images tolerated (each logged once) in one source by one training process before the run stops.
    cfg.DATALOADER.MAX_BAD_IMAGES = 10

    # Write report.html (per-class results, errors, confusions, images) next to each report.json.
    cfg.TEST.HTML_REPORT = True
    # Distractors: words added to the vocabulary at test that no annotation has: a list, or ["coco_unused"] for the 15
    # COCO classes that OV-COCO does not use. Their detections count towards DETECTIONS_PER_IMAGE and are then dropped;
    # the report lists the words.
    cfg.TEST.DISTRACTORS = []
    # What the training saw, in the report ("setting"): each replaces what the configuration or the zoo record states; "" keeps
    # that. Texts, "none" or "unknown"; NOVEL_NAMES (of the evaluation, used in training) is "yes", "no" or "unknown".
    cfg.TEST.SETTING = CN()
    # Data sets and classes whose boxes were used.
    cfg.TEST.SETTING.BOXES = ""
    # Data sets whose labels of images were used.
    cfg.TEST.SETTING.IMAGE_LABELS = ""
    # Data sets whose captions were used.
    cfg.TEST.SETTING.CAPTIONS = ""
    # Whether the names of the novel classes were used.
    cfg.TEST.SETTING.NOVEL_NAMES = ""
    # The vision-language model.
    cfg.TEST.SETTING.TEACHER = ""
    # What the vision-language model was trained on.
    cfg.TEST.SETTING.TEACHER_DATA = ""
    # Resamples of the images for the intervals of AP in the report; 0: no intervals. A data set with more than 3,000,000
    # detections has intervals only by ovdet2 report make --bootstrap.
    cfg.TEST.BOOTSTRAP = 200
    # Report AP of every decoder layer of OpenVocabularyDeformableDETR. With many words, the logits of all layers are
    # slow to compute.
    cfg.TEST.DECODER_LAYERS = False
    # Number of proposals per image for the report of recall (AR@100, AR@300, AR@1000, up to this number) on base and on
    # novel boxes; 0 switches it off.
    cfg.TEST.PROPOSALS_PER_IMAGE = 300
