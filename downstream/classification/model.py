"""The classifier that fine-tuning trains, and its start from a checkpoint.

B images   P prefix tokens   N patches   D width   C classes
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from common.training.checkpoint import find_resume, read_checkpoint
from common.training.errors import BadInput
from downstream.classification.config import FinetuneConfig
from downstream.training import make_encoder
from downstream.vit import MODELS, BackboneViT
from downstream.weights import find_encoder


class Classifier(nn.Module):
    """Encoder, pooling, norm, linear layer.

    Args:
        encoder: with a class token where `pool` is "cls".
        classes: C.
        pool: "mean" or "cls".
        norm: for "cls", the last norm of pre-training; for "mean" a new one is made.
    """

    def __init__(self, encoder: BackboneViT, classes: int, pool: str, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.encoder, self.pool = encoder, pool
        self.fc_norm = norm
        self.head = nn.Linear(encoder.width, classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)  # the first steps then change the encoder little
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, height, width] -> logits [B, C]."""
        (tokens,) = self.encoder(images, [-1])
        return self.head(self.fc_norm(pooled(tokens, self.encoder.num_prefix_tokens, self.pool)))


def pooled(tokens: Tensor, prefix: int, pool: str) -> Tensor:
    """The class token (`pool` "cls") or the mean of the patch tokens ("mean"): [B, P+N, D] -> [B, D], P = `prefix`."""
    return tokens[:, prefix:].mean(dim=1) if pool == "mean" else tokens[:, 0]


def make_classifier(config: FinetuneConfig, classes: int, say: Callable[[str], None]) -> Classifier:
    """The model with the weights of --init_from; under --eval_only its head too, unless --resume finds a run's.

    Raises:
        BadInput: a checkpoint that does not fit, or that has no head of `classes` classes under --eval_only; or under
            --eval_only two checkpoints that could be meant.
    """
    norm = nn.LayerNorm(MODELS[config.model].keywords["width"], eps=1e-6)
    resumed = find_resume(config) if config.eval_only else None
    path = Path(config.init_from) if config.init_from and resumed is None else None
    if resumed is not None and config.init_from and config.resume == "auto" and _has_head(Path(config.init_from)):
        raise BadInput(f"--eval_only: {resumed} or --init_from {config.init_from}? Give --resume none, or --resume PATH")
    pretrained = path is not None and config.pool == "cls" and not config.eval_only
    encoder = make_encoder(config, say, norm if pretrained else None, weights=str(path or ""))
    model = Classifier(encoder, classes, config.pool, norm)
    if config.eval_only and path is not None:
        load_head(model, path)
        say(f"loaded {path}: head and norm")
    return model


def _has_head(path: Path) -> bool:
    return find_encoder(read_checkpoint(path), path).named("head.weight") is not None


def load_head(model: Classifier, path: Path) -> None:
    """Norm and head of a fine-tuned checkpoint, ours or official (there the norm is `fc_norm` or, for the class token, `norm`).

    Raises:
        BadInput: not in the checkpoint, of other shapes, or trained with another --pool.
    """
    state = read_checkpoint(path)
    weights, flags = find_encoder(state, path), state.get("config")
    name = "fc_norm" if weights.named("fc_norm.weight") is not None else "norm"
    recorded = flags.get("pool") if isinstance(flags, dict) else None
    pool = recorded or ("mean" if name == "fc_norm" else "cls")
    if weights.named("head.weight") is not None and pool != model.pool:
        raise BadInput(f"--init_from {path}: was fine-tuned with --pool {pool}, not {model.pool}")
    for module, key in ((model.fc_norm, name), (model.head, "head")):
        tensors = {part: weights.named(f"{key}.{part}") for part in ("weight", "bias")}
        for part, own in module.state_dict().items():
            value = tensors[part]
            if value is None:
                raise BadInput(f"--init_from {path}: has no {key}.{part}; --eval_only needs a fine-tuned checkpoint")
            if value.shape != own.shape:
                raise BadInput(f"--init_from {path}: {key}.{part} is {list(value.shape)} instead of {list(own.shape)}")
        module.load_state_dict(tensors)
