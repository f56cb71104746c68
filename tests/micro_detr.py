"""Small Deformable DETRs for tests, and the same ones of ``transformers``."""

import torch

from ovdet2.modeling.detr.heads import ClosedSetBranch
from ovdet2.modeling.detr.import_weights import import_weights, trunk_of
from ovdet2.modeling.detr.model import DeformableDETR
from ovdet2.modeling.detr.neck import MultiScaleNeck
from ovdet2.modeling.detr.transformer import DeformableTransformer

CLASSES, QUERIES = 7, 12
SIZES = dict(dim=32, heads=4, levels=4, points=2, ffn_dim=24, encoder_layers=2, decoder_layers=3)


def published(variant, seed=0, classes=CLASSES):
    """``transformers``' DeformableDetrForObjectDetection with an R50 and random weights, none of them zero; float64."""
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection

    torch.manual_seed(seed)
    config = DeformableDetrConfig(
        d_model=SIZES["dim"],
        encoder_attention_heads=SIZES["heads"],
        decoder_attention_heads=SIZES["heads"],
        encoder_n_points=SIZES["points"],
        decoder_n_points=SIZES["points"],
        encoder_ffn_dim=SIZES["ffn_dim"],
        decoder_ffn_dim=SIZES["ffn_dim"],
        encoder_layers=SIZES["encoder_layers"],
        decoder_layers=SIZES["decoder_layers"],
        num_labels=classes,
        num_queries=QUERIES,
        two_stage_num_proposals=QUERIES,
        with_box_refine=variant != "one_stage",
        two_stage=variant == "two_stage",
    )
    model = DeformableDetrForObjectDetection(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "backbone" not in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def imported(model):
    """Our model with the weights of a :func:`published` one."""
    weights, variant = import_weights(model.state_dict())
    ours = detector(variant, weights).double().eval()
    ours.load_state_dict(weights)
    return ours


def detector(variant, weights, **changes):
    """Detectron2's R50 and the small transformer of a variant, with closed-set branches."""
    transformer = small_transformer(variant, **changes)
    branches = [ClosedSetBranch(SIZES["dim"], CLASSES) for _ in range(transformer.num_branches)]
    neck = MultiScaleNeck([512, 1024, 2048], SIZES["dim"])
    return DeformableDETR(trunk_of(weights), neck, transformer, branches, ["res3", "res4", "res5"])


def small_transformer(variant, **changes):
    """A transformer of :data:`SIZES` without dropout."""
    return DeformableTransformer(variant, **{**SIZES, "dropout": 0.0, "num_queries": QUERIES, **changes})
