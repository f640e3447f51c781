"""Visual tokenizers: an image becomes a grid of codes, the labels that BEiT predicts.

Two of them behind one protocol: the encoder of OpenAI's DALL-E (Ramesh et al., ICML 2021), read from its file
`encoder.pkl` without running what is in it; and a discrete VAE trained here by train_tokenizer.py. The tokenizer
gets its own view of the crop, `stride` pixels for each patch (112 px for 14x14 codes).

B batch   H, W code grid   P = H*stride, Q = W*stride pixels   V codes in the vocabulary   C width of a code's vector
"""

from __future__ import annotations

import hashlib
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.training.checkpoint import check_finite, read_checkpoint
from common.training.errors import BadInput

OWN_FILE = "pytorch_model.bin"
"""File name of our tokenizer's weights, the one the official `customized` type looks for."""

DALLE_FILE = "encoder.pkl"


class Tokenizer(Protocol):
    """What the trainer asks of a tokenizer."""

    stride: int
    vocabulary: int
    usage: dict[str, float] | None

    def codes(self, images: Tensor) -> Tensor:
        """Colours in 0..1, float [B, 3, P, Q] -> codes, int64 [B, H, W] in 0..V-1."""
        ...

    def to(self, device: torch.device) -> Any:
        """The tokenizer moved to `device`."""
        ...


# --- Our discrete VAE --------------------------------------------------------------------------------------------


class ResidualUnit(nn.Module):
    """Two 3x3 convolutions and a 1x1 one beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        wide = [nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
        self.net = nn.Sequential(*wide, nn.Conv2d(width, width, 1))

    def forward(self, features: Tensor) -> Tensor:
        return features + self.net(features)


class DiscreteVAE(nn.Module):
    """Discrete VAE with a Gumbel-softmax bottleneck; state-dict keys and shapes of the official `DiscreteVAE`.

    The official code's `customized` type builds it with V = 8192, C = 512, 3 layers, 256 wide (the defaults here).

    Attributes:
        usage: :func:`codebook_usage` over the last epoch of its training, where its file says it.

    Args:
        vocabulary: V.
        code_width: C.
        layers: each halves the image; stride is 2^layers.
        width: channels between.
    """

    usage: dict[str, float] | None = None

    def __init__(self, vocabulary: int = 8192, code_width: int = 512, layers: int = 3, width: int = 256) -> None:
        super().__init__()
        self.vocabulary, self.stride = vocabulary, 2**layers
        self.codebook = nn.Embedding(vocabulary, code_width)
        down: list[nn.Module] = []
        up: list[nn.Module] = []
        for layer in range(layers):
            shrink = nn.Conv2d(width if layer else 3, width, 4, stride=2, padding=1)
            enlarge = nn.ConvTranspose2d(width if layer else code_width, width, 4, stride=2, padding=1)
            down += [nn.Sequential(shrink, nn.ReLU()), ResidualUnit(width)]
            up += [nn.Sequential(enlarge, nn.ReLU()), ResidualUnit(width)]
        self.encoder = nn.Sequential(*down, nn.Conv2d(width, vocabulary, 1))
        self.decoder = nn.Sequential(*up, nn.Conv2d(width, 3, 1))

    def logits(self, images: Tensor) -> Tensor:
        """Colours in 0..1, [B, 3, P, Q] -> scores of the codes [B, V, H, W]."""
        return self.encoder(to_plus_minus_one(images))

    def forward(self, images: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Relaxed codes and back.

        Args:
            temperature: of the Gumbel softmax; towards 0 the mixture of codes becomes one code.

        Returns:
            The reconstruction in -1..1, [B, 3, P, Q], and the scores of the codes [B, V, H, W].
        """
        logits = self.logits(images)
        chosen = functional.gumbel_softmax(logits, tau=temperature, dim=1)  # [B, V, H, W]
        return self.decoder(torch.einsum("bvhw,vc->bchw", chosen, self.codebook.weight)), logits

    @torch.no_grad()
    def codes(self, images: Tensor) -> Tensor:
        """Most probable code of each place: int64 [B, H, W]."""
        return self.logits(images).argmax(dim=1)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Images from their most probable codes, colours in 0..1: [B, 3, P, Q]."""
        vectors = self.codebook(self.codes(images)).permute(0, 3, 1, 2)  # [B, C, H, W]
        return ((self.decoder(vectors) + 1) / 2).clamp(0, 1)

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> DiscreteVAE:
        """The tokenizer of a state dict; its sizes are read from the shapes.

        Raises:
            KeyError, RuntimeError: keys or shapes of something else.
        """
        vocabulary, code_width = state["codebook.weight"].shape
        layers = sum(key.startswith("encoder.") and key.endswith(".0.weight") and key.count(".") == 3 for key in state)
        made = cls(vocabulary, code_width, layers, state["encoder.0.0.weight"].shape[0])
        made.load_state_dict(state)
        return made


def to_plus_minus_one(colours: Tensor) -> Tensor:
    """0..1 -> -1..1, the range that our tokenizer (and the official `customized` type) works in."""
    return colours * 2 - 1


# --- The encoder of DALL-E ---------------------------------------------------------------------------------------


class DalleConv(nn.Module):
    """Convolution that keeps the size; its tensors are named `w` and `b` as in OpenAI's file."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.empty(shape)), nn.Parameter(torch.empty(shape[0]))

    def forward(self, features: Tensor) -> Tensor:
        return functional.conv2d(features, self.w, self.b, padding=self.w.shape[-1] // 2)


class DalleBlock(nn.Module):
    """Residual block: four convolutions with a ReLU before each, scaled by `gain`, beside the identity or a 1x1 one."""

    def __init__(self, shapes: dict[str, torch.Size], prefix: str, gain: float) -> None:
        super().__init__()
        self.gain = gain
        entry = f"{prefix}.id_path.w"
        self.id_path: nn.Module = DalleConv(shapes[entry]) if entry in shapes else nn.Identity()
        steps: OrderedDict[str, nn.Module] = OrderedDict()
        for number in range(1, 5):
            steps[f"relu_{number}"] = nn.ReLU()
            steps[f"conv_{number}"] = DalleConv(shapes[f"{prefix}.res_path.conv_{number}.w"])
        self.res_path = nn.Sequential(steps)

    def forward(self, features: Tensor) -> Tensor:
        return self.id_path(features) + self.gain * self.res_path(features)


class DalleEncoder(nn.Module):
    """Encoder of OpenAI's discrete VAE: four groups of residual blocks, halved three times, 8192 codes.

    Runs in float32 everywhere; OpenAI's own module computes in half precision on a GPU, where codes of nearly
    equal score can differ.

    Args:
        state: tensors by name, as in OpenAI's module; all sizes are read from them.

    Raises:
        KeyError, RuntimeError: keys or shapes of something else.
    """

    GROUPS = 4
    stride = 8
    usage: dict[str, float] | None = None  # OpenAI's file does not say it

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        shapes = {name: value.shape for name, value in state.items()}
        depth = len({name.split(".")[2] for name in shapes if name.startswith("blocks.group_1.")})
        gain = 1 / (self.GROUPS * depth) ** 2
        stages: OrderedDict[str, nn.Module] = OrderedDict(input=DalleConv(shapes["blocks.input.w"]))
        for group in range(1, self.GROUPS + 1):
            names = [f"block_{block}" for block in range(1, depth + 1)]
            steps: OrderedDict[str, nn.Module] = OrderedDict()
            for name in names:
                steps[name] = DalleBlock(shapes, f"blocks.group_{group}.{name}", gain)
            if group < self.GROUPS:
                steps["pool"] = nn.MaxPool2d(2)
            stages[f"group_{group}"] = nn.Sequential(steps)
        output = OrderedDict[str, nn.Module](relu=nn.ReLU(), conv=DalleConv(shapes["blocks.output.conv.w"]))
        stages["output"] = nn.Sequential(output)
        self.blocks = nn.Sequential(stages)
        self.load_state_dict(state)
        self.vocabulary = shapes["blocks.output.conv.w"][0]

    @torch.no_grad()
    def codes(self, images: Tensor) -> Tensor:
        """Most probable code of each place: int64 [B, H, W]. Colours are squeezed from 0..1 to 0.1..0.9, as it was trained."""
        return self.blocks(0.8 * images + 0.1).argmax(dim=1)


class InertModule:
    """Stands in for every class of a pickled module: keeps its attributes, and can do nothing."""

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        self.__dict__.update(attributes)


PICKLED_CLASSES = (
    "dall_e.encoder.Encoder",
    "dall_e.encoder.EncoderBlock",
    "dall_e.utils.Conv2d",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.activation.ReLU",
    "torch.nn.modules.pooling.MaxPool2d",
    "torch.nn.modules.linear.Identity",
)
"""The classes that OpenAI's file names; each is read as an :class:`InertModule`."""


def read_pickled_module(path: Path) -> dict[str, Tensor]:
    """Tensors by name of the module pickled in OpenAI's file. No code in the file, and none that it names, is run.

    torch's own restricted unpickler reads it: besides the inert stand-ins it knows how to rebuild tensors and
    plain containers, and refuses everything else.

    Raises:
        BadInput: not such a file, or one that names anything else.
    """
    stand_ins: list[Any] = [(InertModule, name) for name in PICKLED_CLASSES]
    try:
        with torch.serialization.safe_globals(stand_ins):
            root = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise BadInput(f"--tokenizer {path}: no such file") from None
    except (OSError, RuntimeError, EOFError, AttributeError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise BadInput(f"--tokenizer {path}: not the DALL-E encoder, refused: {_refusal(error)}") from None
    if not isinstance(root, InertModule):
        raise BadInput(f"--tokenizer {path}: holds a {type(root).__name__}, not the DALL-E encoder")
    return dict(_tensors(root))


def _refusal(error: Exception) -> str:
    """The line of torch's message that names what was refused."""
    if "persistent_load of storage" in str(error):
        return "a whole module in the format before torch 1.6 (save it again with a newer torch, where you trust the file)"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    naming = [line for line in lines if "Unsupported" in line or "GLOBAL" in line]
    return (naming or lines or [type(error).__name__])[0].split(". ")[0]


def _tensors(module: InertModule, prefix: str = "") -> list[tuple[str, Tensor]]:
    """Parameters of an inert module and of all inside it, by dotted name."""
    content = vars(module)
    tensors = [(prefix + name, value.detach()) for name, value in content.get("_parameters", {}).items() if value is not None]
    for name, inner in content.get("_modules", {}).items():
        if isinstance(inner, InertModule):
            tensors += _tensors(inner, f"{prefix}{name}.")
    return tensors


# --- Either, from a path -----------------------------------------------------------------------------------------


def load_tokenizer(place: str) -> DiscreteVAE | DalleEncoder:
    """The tokenizer at `place`: OpenAI's encoder.pkl, our pytorch_model.bin, or a folder that holds one of them.

    Raises:
        BadInput: nothing usable there.
    """
    path = find_tokenizer(Path(place))
    made: DiscreteVAE | DalleEncoder
    try:
        if path.suffix == ".pkl":
            made = DalleEncoder(read_pickled_module(path))
        else:
            state = read_checkpoint(path)
            made = DiscreteVAE.from_state(state.get("weights", state))
            made.usage = state.get("usage")
    except (KeyError, RuntimeError, AttributeError, ValueError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise BadInput(f"--tokenizer {path}: does not fit a tokenizer: {reason}") from None
    check_finite(made.state_dict(), path)
    return made.eval().requires_grad_(False)


# --- Whether its codes say anything -------------------------------------------------------------------------------

COLLAPSED_SHARE = 0.02
"""A tokenizer whose perplexity is below this share of its vocabulary (or below 2 codes) has collapsed."""


def codebook_usage(counts: Tensor) -> dict[str, float]:
    """How much of the vocabulary is in use, from counts of the codes [V]: share used at all, and perplexity."""
    shares = counts.double() / counts.sum()
    entropy = -(shares * shares.clamp(min=1e-12).log()).sum()
    return {"codes_used": float((counts > 0).double().mean()), "perplexity": float(entropy.exp())}


def collapse_warning(usage: dict[str, float] | None, vocabulary: int) -> str:
    """One line where most places have one of a handful of codes, so that predicting them teaches little; else empty.

    Args:
        usage: :func:`codebook_usage`; None: not known.
        vocabulary: V.
    """
    limit = max(2.0, COLLAPSED_SHARE * vocabulary)
    if usage is None or usage["perplexity"] >= limit:
        return ""
    return (
        f"warning: the tokenizer has collapsed: {round(usage['codes_used'] * vocabulary)} of {vocabulary} codes in use, "
        f"perplexity {usage['perplexity']:.1f} where {limit:.0f} would be little; as labels they say next to nothing "
        "(train it longer, on more images, with more --usage_weight or a smaller --vocabulary)"
    )


def find_tokenizer(place: Path) -> Path:
    """The file of a tokenizer: `place` itself, or the one that the folder `place` holds."""
    if not place.is_dir():
        return place
    files = [place / name for name in (OWN_FILE, DALLE_FILE) if (place / name).is_file()]
    if len(files) != 1:
        names = " and ".join(path.name for path in files) or f"neither {OWN_FILE} nor {DALLE_FILE}"
        raise BadInput(f"--tokenizer {place}: the folder holds {names}; name one file")
    return files[0]


def fingerprint(place: str) -> str:
    """SHA-256 of the tokenizer's file, for the record of a run."""
    return hashlib.sha256(find_tokenizer(Path(place)).read_bytes()).hexdigest()
