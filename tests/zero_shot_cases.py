"""Tiny zero-shot detectors of ``transformers`` with random weights, and their processors."""

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

WORDS = "a photo of detect , cat dog red star moon striped blue car".split()
CLIP = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {**CLIP, "vocab_size": 32, "eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 0}
MAX_TEXT = 16  # tokens of a text of Grounding DINO


def tokenizer(tokens, start, end, length):
    """A word-level tokenizer; ``tokens`` by id, the first the padding, and one of them unknown."""
    unknown = "[UNK]"
    made = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token=unknown))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    special = [(start, tokens.index(start)), (end, tokens.index(end))]
    made.post_processor = TemplateProcessing(single=f"{start} $A {end}", special_tokens=special)
    names = {"cls_token": start, "sep_token": end, "bos_token": start, "eos_token": end}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=tokens[0], unk_token=unknown, model_max_length=length, **names
    )


def bert_tokenizer():
    """The ids of BERT for the tokens that Grounding DINO has in its code."""
    tokens = [f"[unused{number}]" for number in range(1100)]
    for number, token in {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 1012: ".", 1029: "?"}.items():
        tokens[number] = token
    tokens[500 : 500 + len(WORDS)] = WORDS
    return tokenizer(tokens, "[CLS]", "[SEP]", 512)


def clip_tokenizer(length):
    return tokenizer(["[PAD]", "[UNK]", "<s>", "</s>", *WORDS, "."], "<s>", "</s>", length)


def swin():
    sizes = {"embed_dim": 8, "depths": [1] * 4, "num_heads": [1, 1, 2, 2], "window_size": 4}
    return transformers.SwinConfig(image_size=64, patch_size=4, out_features=["stage2", "stage3", "stage4"], **sizes)


def owl(kind):
    sizes = {"text_config": {**TEXT, "max_position_embeddings": 16}, "projection_dim": 16}
    vision = {**CLIP, "image_size": 64, "patch_size": 16}
    size = {"height": 64, "width": 64}
    if kind == "owlv2":
        config = transformers.Owlv2Config(vision_config=vision, **sizes)
        return config, transformers.Owlv2Processor(transformers.Owlv2ImageProcessor(size=size), clip_tokenizer(16))
    config = transformers.OwlViTConfig(vision_config=vision, **sizes)
    images = transformers.OwlViTImageProcessor(size=size, crop_size=size)
    return config, transformers.OwlViTProcessor(images, clip_tokenizer(16))


def grounding(kind):
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = transformers.BertConfig(vocab_size=1100, max_position_embeddings=64, **text)
    sizes = {"num_queries": 20, "encoder_layers": 1, "decoder_layers": 2, "d_model": 32, "max_text_len": MAX_TEXT}
    sizes |= {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in
              (("ffn_dim", 16), ("attention_heads", 2))}  # fmt: skip
    made = {"grounding-dino": "GroundingDinoConfig", "mm-grounding-dino": "MMGroundingDinoConfig"}[kind]
    config = getattr(transformers, made)(backbone_config=swin(), text_config=text, **sizes)
    images = transformers.GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    return config, transformers.GroundingDinoProcessor(images, bert_tokenizer())


def omdet(kind):
    text = transformers.CLIPTextConfig(**TEXT, max_position_embeddings=77, projection_dim=16)
    sizes = {
        "text_projection_in_dim": 16,
        "text_projection_out_dim": 16,
        "task_encoder_hidden_dim": 16,
        "class_embed_dim": 16,
        "num_queries": 20,
        "encoder_hidden_dim": 32,
        "vision_features_channels": [32] * 3,
        "encoder_in_channels": [16, 32, 64],
        "encoder_attention_heads": 2,
        "encoder_dim_feedforward": 16,
        "decoder_num_heads": 2,
        "decoder_hidden_dim": 32,
        "decoder_num_layers": 2,
        "decoder_dim_feedforward": 16,
    }
    config = transformers.OmDetTurboConfig(
        # Its norm takes channels last, as timm's Swin gives them; that of transformers gives channels first.
        apply_layernorm_after_vision_backbone=False,
        backbone_config=swin(),
        text_config=text,
        image_size=64,
        **sizes,
    )
    images = transformers.DetrImageProcessor(size={"height": 64, "width": 64}, do_pad=False)
    return config, transformers.OmDetTurboProcessor(images, clip_tokenizer(77))


MAKERS = {
    "owlv2": owl,
    "owlvit": owl,
    "grounding-dino": grounding,
    "mm-grounding-dino": grounding,
    "omdet-turbo": omdet,
}


def tiny(kind):
    """(network, processor) of a kind, its weights large enough that words and boxes differ, but no score is 1."""
    config, processor = MAKERS[kind](kind)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = transformers.AutoModelForZeroShotObjectDetection.from_config(config).eval()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            for name, parameter in network.named_parameters():
                if "class_head.logit_" in name:
                    parameter.mul_(0.1)
                if "decoder_bbox_head" in name and name.endswith("layers.2.bias"):
                    parameter[2:] += 2  # boxes that overlap
    return network, processor
