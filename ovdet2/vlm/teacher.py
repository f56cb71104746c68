"""The frozen vision-language model, loaded through open_clip.

Shapes: N images or texts, D embedding dimension, S side of the teacher's input in pixels.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ovdet2.errors import DataError, SetupError, UsageError, did_you_mean
from ovdet2.io.devices import require_device
from ovdet2.io.weights import require_finite, without_advice
from ovdet2.vlm.fingerprint import Fingerprint
from ovdet2.vlm.tokenizers import load_tokenizer, require_fitting_prompts
from ovdet2.vlm.weight_files import (
    check_resolution,
    check_stated_architecture,
    is_torchscript,
    needs_quick_gelu,
    readable_by_open_clip,
)

logger = logging.getLogger(__name__)
_CLIENTS = ("huggingface_hub", "httpx", "httpcore", "requests", "urllib3", "urllib")  # of model hubs
_EMBEDDED = Path(__file__).resolve().parent.parent / "assets" / "open_clip"


class Teacher(nn.Module):
    """A frozen CLIP with its tokenizer and fingerprint. All outputs are unit-norm float32.

    Build one with :meth:`load`. Outputs are on the module's device. Parameters never require gradients, and the module
    stays in evaluation mode, also after ``train()``.

    Attributes:
        image_size: S.
        interpolation: "bicubic" or "bilinear", the resize filter of its training.
        fingerprint: :class:`Fingerprint` of the weights.
    """

    def __init__(self, clip: Any, tokenizer: Any, fingerprint: Fingerprint) -> None:
        """
        Args:
            clip: open_clip model with ``encode_image``, ``encode_text`` and ``visual.preprocess_cfg``.
            tokenizer: callable, list of str -> token ids [N, T].
            fingerprint: :class:`Fingerprint` of the weights.
        """
        super().__init__()
        self.clip = clip.eval().requires_grad_(False)
        # On a CPU convolutions take about 0.7 of the time in this memory format; other layers are not affected.
        self.clip.visual.to(memory_format=torch.channels_last)
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint
        preprocess = clip.visual.preprocess_cfg
        size = preprocess["size"]
        self.image_size = size if isinstance(size, int) else size[-1]
        self.interpolation = _interpolation(fingerprint.architecture, preprocess)
        self.register_buffer("mean", torch.tensor(preprocess["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocess["std"]).view(3, 1, 1), persistent=False)

    @classmethod
    def load(cls, architecture: str, pretrained: str | Path, device: str | torch.device = "cpu") -> "Teacher":
        """Load an open_clip model.

        Args:
            architecture: open_clip architecture name; "ovshapes-resnet" and "ovshapes-vit" come with the package.
            pretrained: pretrained tag, "embedded" for the packaged models, or a local weight file. A file with
                OpenAI's weights needs an architecture with QuickGELU, such as "ViT-B-32-quickgelu".
            device: of the model.

        Raises:
            UsageError: unknown architecture, tag or device.
            DataError: the weights cannot be read, are not finite, or are of another architecture or resolution; or the
                tokenizer's files are not at hand.
            SetupError: the weights cannot be downloaded, or the device is not there.
        """
        import open_clip

        require_device(device, "the device of the teacher (--device)")
        register_embedded_models()
        if architecture not in open_clip.list_models():
            raise UsageError(
                f"open_clip has no architecture {architecture!r}{did_you_mean(architecture, open_clip.list_models())}: "
                f"choose one of open_clip.list_models(), or an embedded one: {', '.join(embedded_models())}."
            )
        source = stated = str(pretrained)
        preprocess, file = None, None
        if pretrained == "embedded":
            if architecture not in embedded_models():
                raise UsageError(f"{architecture} is not embedded; embedded ones: {', '.join(embedded_models())}.")
            source = str(_EMBEDDED / f"{architecture}.safetensors")
        elif Path(pretrained).is_file():
            file = Path(pretrained)
            check_stated_architecture(file, architecture)
            stated, preprocess = file.name, preprocessing_of(architecture)
        elif pretrained not in open_clip.list_pretrained_tags_by_model(architecture):
            known = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none"
            raise UsageError(
                f"{str(pretrained)!r} is neither a file nor a pretrained tag of {architecture}"
                f"{did_you_mean(str(pretrained), open_clip.list_pretrained_tags_by_model(architecture))} (tags: {known})."
            )
        tokenizer = load_tokenizer(architecture)  # first, since it takes less time than the weights
        with readable_by_open_clip(file, architecture) if file else contextlib.nullcontext(source) as source:
            clip = _load_clip(architecture, source, stated, preprocess, file)
        if file:
            check_resolution(file, architecture, clip.state_dict())
        require_finite(clip.state_dict(), stated)
        fingerprint = Fingerprint(architecture, stated, state_dict_sha256(clip.state_dict()))
        return cls(clip, tokenizer, fingerprint).to(device)

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in evaluation mode, so that the teacher's batch statistics do not change."""
        return super().train(False)

    @functools.cached_property
    def embed_dim(self) -> int:
        """D, the embedding dimension."""
        return self.encode_text(["a"]).shape[1]

    @functools.cached_property
    def mean_colour(self) -> list[float]:
        """The colour that the preprocessing maps to 0: three floats in [0, 1]."""
        return self.mean.flatten().tolist()

    @property
    def logit_scale(self) -> float:
        """The teacher's inverse temperature, a float (about 100 for OpenAI's models)."""
        return self.clip.logit_scale.exp().item()

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str], batch_size: int = 256) -> torch.Tensor:
        """Unit-norm text embeddings.

        Args:
            texts: list of N strings.
            batch_size: texts per forward pass.

        Returns:
            Tensor [N, D], float32, on the teacher's device.

        Raises:
            UsageError: a text has more tokens than the teacher's context; the message names the text.
        """
        require_fitting_prompts(self.tokenizer, texts, self.fingerprint.architecture)
        chunks = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
        encoded = [self.clip.encode_text(self.tokenizer(chunk).to(self.mean.device)).float() for chunk in chunks]
        return F.normalize(torch.cat(encoded), dim=-1)

    @torch.no_grad()
    def encode_image(
        self, pixels: torch.Tensor, batch_size: int = 256, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Unit-norm image embeddings.

        Args:
            pixels: Tensor [N, 3, S, S], RGB, floating point in [0, 1] or uint8.
            batch_size: images per forward pass.
            dtype: torch.float32, or torch.bfloat16 or torch.float16 for mixed precision.

        Returns:
            Tensor [N, D], float32; N = 0 gives [0, D].
        """
        if len(pixels) == 0:
            return pixels.new_zeros((0, self.embed_dim), dtype=torch.float32, device=self.mean.device)
        encoded = []
        for chunk in pixels.split(batch_size):
            chunk = chunk.to(self.mean) / 255 if chunk.dtype == torch.uint8 else chunk.to(self.mean)
            normalised = ((chunk - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
            with torch.autocast(self.mean.device.type, dtype=dtype, enabled=dtype != torch.float32):
                encoded.append(self.clip.encode_image(normalised).float())
        return F.normalize(torch.cat(encoded), dim=-1)

    def classify(self, embeddings: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """Zero-shot probabilities: softmax over the words of cosine times the teacher's logit scale.

        Args:
            embeddings: Tensor [R, D], unit rows, of images or regions.
            words: Tensor [K, D], unit rows.

        Returns:
            Tensor [R, K].
        """
        return (self.logit_scale * embeddings @ words.to(embeddings).T).softmax(dim=1)


def _load_clip(architecture, source, stated, preprocess, file):
    """open_clip's model of ``source``, a tag or file that messages name ``stated``; ``file`` is the user's file or None."""
    import open_clip

    try:
        with _one_message_of_the_hub():
            return open_clip.create_model(
                architecture,
                pretrained=str(source),
                precision="fp32",
                require_pretrained=True,
                force_quick_gelu=needs_quick_gelu(architecture, stated),
                force_preprocess_cfg=preprocess,
                weights_only=not (file and is_torchscript(file)),
            )
    except Exception as error:  # open_clip, the hub client and torch raise many kinds here
        reason = f"{type(error).__name__}: {without_advice(error)}"
        if file or not _is_of_network(error):
            raise DataError(
                f"the weights {stated!r} of {architecture} could not be loaded ({reason}). The architecture "
                "(MODEL.TEACHER.ARCHITECTURE, --architecture) must be that of the file, and the file complete."
            ) from error
        raise SetupError(
            f"the weights {stated!r} of {architecture} could not be downloaded ({reason}). Without a network, give the "
            "path of a weight file instead (MODEL.TEACHER.PRETRAINED, --pretrained)."
        ) from error


def preprocessing_of(architecture: str) -> dict[str, Any] | None:
    """Image preprocessing of an architecture whose weights come from a file, which does not state it.

    Returns:
        dict of "mean", "std", "interpolation", equal for all pretrained tags of the architecture. None, which means
        CLIP's preprocessing, if it has no tags or they differ (with a warning).
    """
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(architecture)
    stated = [open_clip.get_pretrained_cfg(architecture, tag) for tag in tags]
    known = [{key: cfg[key] for key in ("mean", "std", "interpolation") if cfg.get(key)} for cfg in stated]
    if any(other != known[0] for other in known[1:]):
        logger.warning(
            "the pretrained tags of %s differ in image mean, standard deviation or resize filter; CLIP's values are "
            "used for the weight file.",
            architecture,
        )
        return None
    return known[0] if known and known[0] else None


@contextlib.contextmanager
def _one_message_of_the_hub():
    """Let through the first message of the hub's client only: without a network it tells of a dozen attempts, twice each."""
    client, root = logging.getLogger("huggingface_hub.utils._http"), logging.getLogger()
    messages = itertools.count()

    def first(record):
        return next(messages) == 0

    def not_of_download(record):  # the error that is raised says it
        return not record.getMessage().startswith("Failed to download")

    propagates, client.propagate = client.propagate, False
    client.addFilter(first)
    root.addFilter(not_of_download)
    try:
        yield
    finally:
        client.propagate = propagates
        client.removeFilter(first)
        root.removeFilter(not_of_download)


def _is_of_network(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is one of a connection or of the client of a model hub."""
    while error is not None:
        if isinstance(error, ConnectionError) or type(error).__module__.split(".")[0] in _CLIENTS:
            return True
        error = error.__cause__ or error.__context__
    return False


def _interpolation(architecture, preprocess):
    """The resize filter: of a packaged model from its manifest, since open_clip's model configurations lack it."""
    manifest = _EMBEDDED / f"{architecture}.manifest.json"
    if manifest.is_file():
        return json.loads(manifest.read_text())["preprocess"]["interpolation"]
    return preprocess.get("interpolation", "bicubic")


def embedded_models() -> list[str]:
    """Names of the open_clip models whose weights come with the package."""
    return sorted(path.stem for path in _EMBEDDED.glob("*.safetensors"))


def register_embedded_models() -> None:
    """Register the packaged model configurations in open_clip (idempotent)."""
    import open_clip

    for config in sorted(_EMBEDDED.glob("*.json")):
        if "manifest" not in config.name and config.stem not in open_clip.list_models():
            open_clip.add_model_config(config)


def state_dict_sha256(state_dict: Mapping[str, torch.Tensor]) -> str:
    """Hash of named tensors, independent of file format and storage precision: names, shapes and float32 bytes."""
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().cpu().float().contiguous()
        digest.update(json.dumps([name, list(tensor.shape)]).encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()
