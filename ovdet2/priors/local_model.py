"""A vision-language model of `transformers` on this machine, which answers questions about an image.

Shapes: n questions about one image, T tokens of a question with its image, Z tokens of the model.
"""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ovdet2.errors import DataError, SetupError, UsageError
from ovdet2.io.devices import require_device
from ovdet2.io.files import sha256_file
from ovdet2.io.images import read_image
from ovdet2.priors.answers import Answer, yes_or_no

_READ = (".safetensors", ".json", ".jinja", ".txt", ".model")  # files that determine a model's answers


class LocalModel:
    """P(yes) from the logits of the next token, over all tokens that spell yes or no."""

    workers = 1

    def __init__(self, folder: str | Path, device: str = "cpu", batch_size: int = 8) -> None:
        """
        Args:
            folder: of a model and its processor (save_pretrained), weights in safetensors. Code in the folder is not
                run.
            device: of the model; the precision is that of the files.
            batch_size: questions of one image per forward pass.

        Raises:
            SetupError: `transformers` is not installed, or the device is not there.
            UsageError: an unknown device; no such folder; or the model's tokenizer has no token for yes or for no.
            DataError: the model or its processor cannot be loaded.
        """
        require_device(device, "--device")
        try:
            from transformers import AutoModelForImageTextToText, AutoProcessor
        except ImportError as error:
            raise SetupError(f"a local model needs transformers ({error}): pip install transformers.") from None
        if not Path(folder).is_dir():
            raise UsageError(f"{folder} is no folder: give the folder of a downloaded vision-language model.")
        try:
            self.processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
            self.network = AutoModelForImageTextToText.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, torch_dtype="auto"
            )
        except Exception as error:  # transformers raises many kinds here
            raise DataError(
                f"the vision-language model in {folder} could not be loaded ({type(error).__name__}: {error}): it "
                "needs a model for image-text-to-text with safetensors weights, and its processor."
            ) from error
        self.network = self.network.eval().requires_grad_(False).to(device)
        self.words_per_call = batch_size
        self.folder = Path(folder)
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = "left"  # the last position is then the next token of every question
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self._yes, self._no = answer_tokens(self.tokenizer)
        self.identity = {"model": self.folder.name, "model_sha256": folder_sha256(self.folder)}

    def stop(self) -> None:
        """Does nothing: this model has no waiting calls."""

    def prepare(self, path: str | Path) -> Image.Image:
        """The image, upright RGB. Raises DataError for an unreadable file."""
        return Image.fromarray(read_image(path, "RGB"))

    def ask(self, image: Image.Image, words: Sequence[str], questions: Sequence[str]) -> list[Answer]:
        """One :class:`Answer` per question, with an empty text; neither yes nor no if the model computes NaN."""
        return [
            Answer(yes, "") if math.isfinite(yes) else Answer(None, "not a number")
            for yes in self.probabilities(image, questions).tolist()
        ]

    @torch.inference_mode()
    def probabilities(self, image: Image.Image, questions: Sequence[str]) -> torch.Tensor:
        """P(yes): softmax over the two log-sum-exps of the logits of the tokens for yes and for no.

        Args:
            image: PIL image.
            questions: n texts.

        Returns:
            Tensor [n] float32.
        """
        inputs = self.processor(
            images=[image] * len(questions),
            text=[self._prompt(question) for question in questions],
            padding=True,
            return_tensors="pt",
        ).to(self.network.device, self.network.dtype)
        # One step of generate instead of a forward pass: it sets each model's position ids under padding.
        step = self.network.generate(
            **inputs,
            max_new_tokens=1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        logits = step.logits[0].float()  # [n, Z]
        both = torch.stack([logits[:, self._yes].logsumexp(1), logits[:, self._no].logsumexp(1)], dim=1)
        return both.softmax(dim=1)[:, 0].cpu()

    def _prompt(self, question):
        """The prompt of a question: in the model's chat format if it has one, else after its image token if any."""
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": question}]
            return self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
        token = getattr(self.processor, "image_token", None)
        return f"{token}\n{question}" if token else question


def answer_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """(ids that spell yes, ids that spell no) in a tokenizer's vocabulary.

    Raises:
        UsageError: there are none.
    """
    ids = {"yes": [], "no": []}
    for token, index in tokenizer.get_vocab().items():
        spelled = yes_or_no(token)
        if spelled:
            ids[spelled].append(index)
    if not (ids["yes"] and ids["no"]):
        raise UsageError("the model's tokenizer has no single token for yes or for no: choose another model.")
    return sorted(ids["yes"]), sorted(ids["no"])


def folder_sha256(folder: Path) -> str:
    """SHA-256 of names and contents of the files of a model."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in _READ and path.is_file()):
        digest.update(f"{path.name} {sha256_file(path)}\n".encode())
    return digest.hexdigest()
