"""Train one of the two embedded CLIP models on the captions of OV-Shapes, and measure it.

    python -m ovdet2.ov_shapes.teachers --model ovshapes-resnet --output ovdet2/assets/open_clip

Only image-level captions are used: no box, no detection image. Most steps run on small images, which are cheap, the
last ones at the model's own size, where the weights are averaged. The output is ``<model>.safetensors`` (float16
weights, loadable by ``open_clip.create_model(model, pretrained=path)``) and ``<model>.manifest.json`` (arguments, data
hash, zero-shot accuracies of the weights as written). An interrupted run continues from ``<model>.resume.pt``.

With ``--distil ovshapes-resnet`` the image tower also learns the image embeddings of that embedded model, and starts
with its text tower (feature distillation of CLIP, as in CLIP-KD).
"""

import argparse
import hashlib
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import open_clip
import torch
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ovdet2.errors import NumericalError, UsageError, exit_on_error
from ovdet2.io.files import atomic_path, write_json
from ovdet2.io.progress import progress_bar
from ovdet2.ov_shapes.augment import INTERPOLATION, augment
from ovdet2.ov_shapes.caption_batches import BatchPlan
from ovdet2.ov_shapes.world.captions import CAPTION_COUNT, render_captions
from ovdet2.ov_shapes.zero_shot import measure
from ovdet2.vlm.teacher import Teacher, register_embedded_models

SCHEMA = "ovdet2/embedded-teacher/1"
_SAVE_EVERY = 100


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    args = _parse(arguments)
    torch.set_num_threads(args.threads)
    register_embedded_models()
    if args.model not in open_clip.list_models():
        raise UsageError(f"there is no model configuration {args.model}: add it to ovdet2/assets/open_clip/.")
    print(f"Rendering {args.pairs} image-caption pairs", flush=True)
    images, captions = render_captions(args.seed, args.pairs, workers=args.threads, progress=progress_bar)
    data_hash = hashlib.sha256(images.tobytes() + "\n".join(captions).encode()).hexdigest()
    start = time.monotonic()
    model = train(args, torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), captions)
    seconds = time.monotonic() - start
    weights = args.output / f"{args.model}.safetensors"
    _save_half(model, weights)
    teacher = Teacher.load(args.model, str(weights))
    teacher.interpolation = INTERPOLATION
    manifest = {
        "schema": SCHEMA,
        "script": "python -m ovdet2.ov_shapes.teachers",
        "arguments": {key: value for key, value in sorted(vars(args).items()) if key not in ("output", "threads")},
        "weights_sha256": teacher.fingerprint.weights_sha256,
        "captions_sha256": data_hash,
        "train_seconds": round(seconds),
        "threads": args.threads,
        "preprocess": {key: _visual(model).preprocess_cfg[key] for key in ("size", "mean", "std")}
        | {"interpolation": INTERPOLATION},
        "accuracy_percent": measure(teacher, args.seed),
    }
    write_json(args.output / f"{args.model}.manifest.json", manifest, indent=1)
    (args.output / f"{args.model}.resume.pt").unlink(missing_ok=True)
    print(json.dumps(manifest["accuracy_percent"], indent=1))


def train(args: argparse.Namespace, images: torch.Tensor, captions: list[str]) -> torch.nn.Module:
    """Symmetric contrastive training with AdamW, linear warm-up and cosine decay.

    Args:
        args: of :func:`_parse`.
        images: uint8 Tensor [N, 3, H, W], RGB.
        captions: list of N str.

    Returns:
        The trained open_clip model in evaluation mode.

    Raises:
        NumericalError: the loss is not finite.
    """
    resume = args.output / f"{args.model}.resume.pt"
    first, saved = _read_resume(resume, args)
    torch.manual_seed(args.seed)
    model = _new_model(args)
    guide = Guide(args.distil, model) if args.distil else None
    if first > args.small_steps:
        model = grow(model, args.model)
    optimizer, average = _optimizer(model, args), _average(model, args)
    if saved:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        average.load_state_dict(saved["average"])
    tokens = open_clip.get_tokenizer(args.model)(captions)
    mean = torch.tensor(_visual(model).preprocess_cfg["mean"]).view(3, 1, 1)
    std = torch.tensor(_visual(model).preprocess_cfg["std"]).view(3, 1, 1)
    loss_of = open_clip.loss.ClipLoss()
    batches = BatchPlan(captions, args.batch, args.seed)
    progress = progress_bar(range(first, args.steps), initial=first, total=args.steps, desc="training")
    _fast_layout(model)
    for step in progress:
        if step == args.small_steps:
            model = _fast_layout(grow(model, args.model))
            optimizer, average = _optimizer(model, args), _average(model, args)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * _schedule(step, args)
        chosen = batches.batch(step)
        random = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        side = guide.side if guide else _side(model)
        pixels = (augment(images[chosen].float() / 255.0, side, random, coarsen=step >= args.small_steps) - mean) / std
        image_features, text_features, scale = model(resized(pixels, _side(model)), tokens[chosen])[:3]
        loss = loss_of(image_features, text_features, scale)
        if guide:
            loss = loss + args.distil_weight * guide.loss(image_features, pixels)
        if not torch.isfinite(loss):
            raise NumericalError(f"the loss is {loss.item()} at step {step}: lower --lr.")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            cast(torch.Tensor, model.logit_scale).clamp_(0.0, math.log(100.0))
        average.update_parameters(model)
        progress.set_postfix(loss=f"{loss.item():.3f}", scale=f"{scale.item():.1f}", refresh=False)
        if (step + 1) % _SAVE_EVERY == 0 and step + 1 < args.steps:
            _save_resume(resume, model, optimizer, average, step + 1, args)
    return average.module.eval()


class Guide:
    """An embedded model whose image embeddings another one learns.

    Args:
        name: of the embedded model.
        model: the open_clip model that learns; the weights of its text tower become those of the guide.

    Attributes:
        side: of the guide's images.
    """

    def __init__(self, name: str, model: torch.nn.Module) -> None:
        teacher = Teacher.load(name, "embedded")
        self._clip, self.side = teacher.clip, teacher.image_size
        text = {key: value for key, value in self._clip.state_dict().items() if not key.startswith("visual.")}
        missing, unknown = model.load_state_dict(text, strict=False)
        if unknown or any(not key.startswith("visual.") for key in missing):
            raise UsageError(f"--distil {name}: its text tower is not that of --model.")

    def loss(self, features: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """Squared distance of unit embeddings ``features`` [N, D] from those of ``pixels`` [N, 3, side, side]."""
        with torch.no_grad():
            goal = F.normalize(self._clip.encode_image(pixels), dim=1)
        return (features - goal).square().sum(dim=1).mean()


def resized(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """Images [N, 3, H, H] at another side, smoothed before they shrink."""
    if pixels.shape[-1] == side:
        return pixels
    return F.interpolate(pixels, size=(side, side), mode=INTERPOLATION, antialias=True, align_corners=False)


def _average(model, args):
    """The moving average of the weights and of the batch norms' statistics."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.average), use_buffers=True)


def _new_model(args):
    """The model at the side of the small images."""
    model = open_clip.create_model(args.model, force_image_size=args.small_side).train()
    for name, parameter in _visual(model).named_parameters():
        # open_clip initialises residual branches at zero, too slow to train from in a short run.
        if name.endswith("bn3.weight"):
            torch.nn.init.constant_(parameter, 0.5)
    return model


def grow(model: torch.nn.Module, name: str) -> torch.nn.Module:
    """The model of configuration ``name`` at its own image size, with the weights of a smaller-sized ``model``."""
    grown = open_clip.create_model(name).train()
    state, target = model.state_dict(), grown.state_dict()
    for key in ("visual.attnpool.positional_embedding", "visual.positional_embedding"):
        if key in state:
            first, grid = state[key][:1], state[key][1:]
            old, new = math.isqrt(len(grid)), math.isqrt(len(target[key]) - 1)
            grid = grid.T.reshape(1, -1, old, old)
            grid = F.interpolate(grid, size=(new, new), mode="bilinear", align_corners=False)
            state[key] = torch.cat([first, grid.flatten(2)[0].T])
    grown.load_state_dict(state)
    return grown


def _visual(model: torch.nn.Module) -> Any:
    """The image tower; its attributes from open_clip are not in a type, hence Any."""
    return model.visual


def _fast_layout(model):
    """Convolutions of the image tower in channels-last order: about 0.7 of the time on a CPU."""
    model.visual.to(memory_format=torch.channels_last)
    return model


def _optimizer(model, args):
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))


def _schedule(step, args, warm_up=40):
    """Cosine decay with a linear warm-up at the start of either phase (the second one has a new optimizer)."""
    since = step - args.small_steps if step >= args.small_steps else step
    return min(1.0, (since + 1) / warm_up) * 0.5 * (1.0 + math.cos(math.pi * step / args.steps))


def _side(model):
    side = model.visual.image_size
    return side if isinstance(side, int) else side[0]


def _save_half(model, path):
    from safetensors.torch import save_file

    state = {name: t.detach().half() if t.is_floating_point() else t for name, t in model.state_dict().items()}
    with atomic_path(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, str(temporary))


def _run_of(args):
    return json.dumps({key: value for key, value in sorted(vars(args).items()) if key not in ("output", "threads")})


def _save_resume(path, model, optimizer, average, step, args):
    parts = {"model": model, "optimizer": optimizer, "average": average}
    state = {name: part.state_dict() for name, part in parts.items()} | {"step": step, "run": _run_of(args)}
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def _read_resume(path, args):
    """(first step to do, saved state): (0, None) without the file; it must be of a run with the same arguments."""
    if not path.is_file():
        return 0, None
    saved = torch.load(path, weights_only=True)
    if saved["run"] != _run_of(args):
        raise UsageError(f"{path} is of a run with other arguments ({saved['run']}): delete it or give the same ones.")
    return saved["step"], saved


def _parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="name of a configuration in ovdet2/assets/open_clip")
    parser.add_argument("--output", required=True, type=Path, help="folder of the weights and manifests")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--small-steps", type=int, default=550, help="of the steps, how many on small images")
    parser.add_argument("--small-side", type=int, default=64, help="side of the small images, a multiple of the stride")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--average", type=float, default=0.998, help="decay of the average of the weights")
    parser.add_argument("--distil", metavar="NAME", help="embedded model whose image embeddings are learned")
    parser.add_argument("--distil-weight", type=float, default=4.0)
    parser.add_argument("--pairs", type=int, default=CAPTION_COUNT)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="changes the last digits of the result")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    with exit_on_error():
        main()
