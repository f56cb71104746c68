"""Deformable DETR whose classes are an input: wiring only.

Shapes: B images, L decoder layers, N queries, K words.
"""

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.structures import ImageList
from torch import nn

from ovdet2.errors import UsageError
from ovdet2.modeling.build import build_vocabulary
from ovdet2.modeling.detr.criterion import mean_box_count, weighted
from ovdet2.modeling.detr.targets import Targets
from ovdet2.vocabulary.bank import WordBank


@META_ARCH_REGISTRY.register()
class OpenVocabularyDeformableDETR(nn.Module):
    """Deformable DETR (Zhu et al., ICLR 2021) that scores its queries against words.

    At test each image gives {"instances"}: detections whose ``pred_classes`` index the vocabulary, in pixels of the
    original image, best first. With ``every_layer`` also "decoder_layers", those of the layers before the last, from
    the first on. With semantic priors the instances have ``prior_words``, the word that the query of each detection
    carried (an index into the vocabulary, -1 for none).
    """

    training_only = ("clip_detr",)  # parts that a checkpoint may have and the model not, or the other way round

    @configurable
    def __init__(
        self,
        *,
        network,
        vocabulary,
        criterion,
        postprocessor,
        loss_weights,
        pixel_mean,
        pixel_std,
        every_layer=False,
        cckt=None,
        clip_detr=None,
    ):
        """
        Args:
            network: :class:`~ovdet2.modeling.detr.model.DeformableDETR`, whose ``backbone`` says by what the sides of a
                batch must be divisible.
            vocabulary: :class:`~ovdet2.layers.WordBank` that the network reads, too.
            criterion: (outputs, :class:`Targets`) -> (dict of losses, matches).
            postprocessor: (outputs, B (height, width), layer) -> list of :class:`Instances`.
            loss_weights: dict by kind of loss.
            pixel_mean, pixel_std: three values per channel, 0 to 255, in the order of INPUT.FORMAT.
            every_layer: at test, give the detections of all decoder layers.
            cckt: :class:`~ovdet2.methods.cckt.part.CCKT`, or None.
            clip_detr: :class:`~ovdet2.methods.clip_detr.part.CLIPDETR`, which takes part in training alone, or None.
        """
        super().__init__()
        self.network = network
        self.vocabulary = vocabulary
        self.criterion = criterion
        self.postprocessor = postprocessor
        self.loss_weights = dict(loss_weights)
        self.every_layer = every_layer
        self.cckt = cckt
        self.clip_detr = clip_detr
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg, vocabulary=None):
        """Arguments by configuration; ``vocabulary`` replaces the one that MODEL.VOCABULARY and DATASETS.TEST give."""
        from ovdet2.methods.cckt.build import build_cckt, cckt_weights
        from ovdet2.methods.clip_detr.build import build_clip_detr, clip_detr_weights
        from ovdet2.modeling.detr.build import (
            build_criterion,
            build_detr,
            build_postprocessor,
            loss_weights,
            refuse_unused,
        )

        refuse_unused(cfg)
        vocabulary = WordBank(build_vocabulary(cfg) if vocabulary is None else vocabulary)
        network = build_detr(cfg, build_backbone(cfg), vocabulary)
        cckt, extra_costs = build_cckt(cfg, network, vocabulary)
        return {
            "network": network,
            "vocabulary": vocabulary,
            "criterion": build_criterion(cfg, extra_costs),
            "postprocessor": build_postprocessor(cfg),
            "loss_weights": loss_weights(cfg) | cckt_weights(cfg) | clip_detr_weights(cfg),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "every_layer": cfg.TEST.DECODER_LAYERS,
            "cckt": cckt,
            "clip_detr": build_clip_detr(cfg, network, vocabulary),
        }

    @property
    def device(self):
        """Where the pixels are taken to."""
        return self.pixel_mean.device

    def forward(self, batched_inputs):
        """
        Args:
            batched_inputs: B records with "image", Tensor [3, H, W] uint8 or float, 0 to 255; in training "instances"
                with ``gt_boxes`` and ``gt_classes``; at test "height" and "width" of the image that boxes are wanted
                in (its own if absent); with CCKT what its parts need.

        Returns:
            In training the weighted losses, a dict of scalar Tensors; at test a list of B dicts, see the class.

        Raises:
            UsageError: a closed set of classes is asked for another number of words, or see
                :class:`~ovdet2.methods.cckt.part.CCKT`.
            NumericalError: a matching cost is not finite; it names the image.
        """
        if self.training:
            return weighted(self.losses(batched_inputs), self.loss_weights)
        images, outputs = self.infer(batched_inputs, all_layers=self.every_layer)
        sizes = [
            (record.get("height", size[0]), record.get("width", size[1]))
            for record, size in zip(batched_inputs, images.image_sizes)
        ]
        results = [{"instances": found} for found in self.postprocessor(outputs, sizes)]
        if outputs.get("words") is not None:
            for result, carried in zip(results, outputs["words"]):
                result["instances"].prior_words = carried[result["instances"].queries]
        if self.every_layer:
            layers = [self.postprocessor(outputs, sizes, layer) for layer in range(len(outputs["pred_logits"]) - 1)]
            for image, result in enumerate(results):
                result["decoder_layers"] = [of_layer[image] for of_layer in layers]
        return results

    def prepare_training(self, dataset):
        """Let the parts take what they need of the training set, a :class:`~ovdet2.data.loader.MappedRecords`.

        Raises:
            UsageError, CacheError: see :meth:`~ovdet2.methods.cckt.part.CCKT.prepare_training`.
        """
        if self.cckt is not None:
            self.cckt.prepare_training(dataset)

    def losses(self, batched_inputs):
        """Unweighted losses of a training batch, a dict of scalar Tensors."""
        _, memory, queries = self.encode(batched_inputs)
        targets = Targets.of_records(batched_inputs, self.device)

        def decode(queries, **mask):
            outputs = self.network.decode(memory, queries, all_layers=True, **mask)
            return outputs if self.cckt is None else self.cckt.training_outputs(outputs)

        if self.clip_detr is None:
            outputs, added = decode(queries), {}
        else:
            transformer = self.network.transformer
            outputs, added = self.clip_detr(transformer, decode, memory, queries, targets, self.criterion)
        if self.cckt is None:
            return self.criterion(outputs, targets)[0] | added
        # Before the criterion, which may stop this process alone: a count over all processes would wait for it.
        num_boxes = mean_box_count(len(targets), self.device)
        losses, matches = self.criterion(outputs, targets)
        return losses | self.cckt.losses(outputs, targets, matches, num_boxes) | added

    def infer(self, batched_inputs, all_layers=False, keep_sampling=False):
        """What the network says of images at test.

        Returns:
            (:class:`ImageList`, outputs as of :meth:`~ovdet2.modeling.detr.model.DeformableDETR.decode`, with CCKT
            those of :meth:`~ovdet2.methods.cckt.part.CCKT.scored`).
        """
        images, memory, queries = self.encode(batched_inputs)
        outputs = self.network.decode(memory, queries, all_layers=all_layers, keep_sampling=keep_sampling)
        words = outputs["pred_logits"].shape[-1]
        if words != len(self.vocabulary.words):
            raise UsageError(
                f"a closed-set head of {words} classes cannot take {len(self.vocabulary.words)} words: use "
                'MODEL.OVD.CLASSIFIER "text".'
            )
        return images, outputs if self.cckt is None else self.cckt.scored(outputs, queries)

    def encode(self, batched_inputs):
        """(the padded :class:`ImageList`, the :class:`Memory`, the :class:`Queries` that the decoder starts from)."""
        images = self.preprocess(batched_inputs)
        memory = self.network.encode(images.tensor, images.image_sizes)
        queries = self.network.transformer.queries(memory)
        return images, memory, queries if self.cckt is None else self.cckt.add_priors(queries, batched_inputs)

    def preprocess(self, batched_inputs):
        """The normalised images, padded with zeros at the right and the bottom, and their sizes: :class:`ImageList`."""
        images = [(record["image"].to(self.device) - self.pixel_mean) / self.pixel_std for record in batched_inputs]
        return ImageList.from_tensors(images, self.network.backbone.size_divisibility)
