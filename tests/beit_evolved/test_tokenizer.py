"""Tokenizers: the pickled DALL-E encoder is read without running it; our VAE's layout; errors."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from beit_evolved.tokenizer import DalleEncoder, DiscreteVAE, fingerprint, load_tokenizer, read_pickled_module
from common.training.errors import BadInput

WIDTH, BLOCKS, CODES = 4, 2, 24


class Conv2d(nn.Module):
    """A convolution with OpenAI's attribute names."""

    def __init__(self, into: int, out: int, size: int) -> None:
        super().__init__()
        self.n_in, self.n_out, self.kw = into, out, size
        self.use_float16, self.device, self.requires_grad = True, torch.device("cpu"), False
        self.w = nn.Parameter(torch.randn(out, into, size, size) * 0.6)
        self.b = nn.Parameter(torch.randn(out) * 0.6)

    def forward(self, features: Tensor) -> Tensor:
        return nn.functional.conv2d(features, self.w, self.b, padding=(self.kw - 1) // 2)


class EncoderBlock(nn.Module):
    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.post_gain = 1 / (4 * BLOCKS) ** 2
        self.id_path = Conv2d(into, out, 1) if into != out else nn.Identity()
        inner = out // 4
        self.res_path = nn.Sequential()
        sizes = [(into, inner, 3), (inner, inner, 3), (inner, inner, 3), (inner, out, 1)]
        for number, size in enumerate(sizes, start=1):
            self.res_path.add_module(f"relu_{number}", nn.ReLU())
            self.res_path.add_module(f"conv_{number}", Conv2d(*size))

    def forward(self, features: Tensor) -> Tensor:
        return self.id_path(features) + self.post_gain * self.res_path(features)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vocab_size = CODES
        self.blocks = nn.Sequential()
        self.blocks.add_module("input", Conv2d(3, WIDTH, 7))
        into = WIDTH
        for group in range(1, 5):
            stage = nn.Sequential()
            for block in range(1, BLOCKS + 1):
                stage.add_module(f"block_{block}", EncoderBlock(into, WIDTH * 2 ** (group - 1)))
                into = WIDTH * 2 ** (group - 1)
            if group < 4:
                stage.add_module("pool", nn.MaxPool2d(kernel_size=2))
            self.blocks.add_module(f"group_{group}", stage)
        output = nn.Sequential()
        output.add_module("relu", nn.ReLU())
        output.add_module("conv", Conv2d(into, CODES, 1))
        self.blocks.add_module("output", output)

    def forward(self, images: Tensor) -> Tensor:
        return self.blocks(images)


@pytest.fixture
def dalle(monkeypatch: pytest.MonkeyPatch) -> Encoder:
    """An encoder whose classes are known to pickle as dall_e.encoder.Encoder and so on, while the test runs."""
    for module, classes in (("dall_e", ()), ("dall_e.utils", (Conv2d,)), ("dall_e.encoder", (Encoder, EncoderBlock))):
        made = ModuleType(module)
        monkeypatch.setitem(sys.modules, module, made)
        for one in classes:
            setattr(made, one.__name__, one)
            monkeypatch.setattr(one, "__module__", module)
    torch.manual_seed(0)
    return Encoder()


def test_dalle_codes_without_its_code(dalle: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file alone gives the codes of the module that was pickled; `dall_e` need not be installed."""
    images = torch.rand(2, 3, 24, 40)
    with torch.no_grad():
        scores = dalle(0.8 * images + 0.1)
    torch.save(dalle, tmp_path / "encoder.pkl")
    for module in ("dall_e", "dall_e.utils", "dall_e.encoder"):
        monkeypatch.delitem(sys.modules, module)
    tokenizer = load_tokenizer(str(tmp_path))
    assert isinstance(tokenizer, DalleEncoder)
    assert (tokenizer.vocabulary, tokenizer.stride) == (CODES, 8)
    codes = tokenizer.codes(images)
    assert codes.dtype == torch.int64
    assert codes.shape == (2, 3, 5)
    assert torch.equal(codes, scores.argmax(dim=1))
    assert codes.unique().numel() > 1
    torch.testing.assert_close(tokenizer.blocks(0.8 * images + 0.1), scores)
    assert not any(value.requires_grad for value in tokenizer.parameters())


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_the_oldest_format_is_refused_with_advice(dalle: Encoder, tmp_path: Path) -> None:
    torch.save(dalle, tmp_path / "encoder.pkl", _use_new_zipfile_serialization=False)
    with pytest.raises(BadInput, match=r"refused: a whole module in the format before torch 1.6"):
        load_tokenizer(str(tmp_path))


class Touch:
    """Pickles as a call that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code", "ignore:Detected pickle protocol 4")
def test_evil_pickles_are_refused_and_not_run(dalle: Encoder, tmp_path: Path) -> None:
    """Alone, hidden in a module's attributes, or as a plain pickle: one line names what was asked for; nothing runs."""
    trace = tmp_path / "was-here"
    hidden = dalle
    hidden.blocks.extra = Touch(trace)
    for number, (content, save) in enumerate(
        (
            (Touch(trace), lambda content, path: torch.save(content, path)),
            (hidden, lambda content, path: torch.save(content, path)),
            (hidden, lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False)),
            (Touch(trace), lambda content, path: path.write_bytes(pickle.dumps(content))),
        )
    ):
        path = tmp_path / f"evil_{number}.pkl"
        save(content, path)
        with pytest.raises(BadInput, match=r"evil_\d.pkl: not the DALL-E encoder, refused: ") as refusal:
            load_tokenizer(str(path))
        assert "\n" not in str(refusal.value)
        if number in (0, 1):
            assert "system" in str(refusal.value)
    assert not trace.exists()


def test_other_classes_are_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "linear.pkl")
    with pytest.raises(BadInput, match=r"refused: .*torch.nn.modules.linear.Linear"):
        load_tokenizer(str(tmp_path / "linear.pkl"))
    torch.save({"weights": torch.zeros(2)}, tmp_path / "dict.pkl")
    with pytest.raises(BadInput, match="holds a dict, not the DALL-E encoder"):
        read_pickled_module(tmp_path / "dict.pkl")


def test_our_layout_is_the_official_customized_one() -> None:
    """Keys and shapes of the official DiscreteVAE at the sizes its loader builds: 8192 codes, 3 layers, 512, 256."""
    with torch.device("meta"):
        state = DiscreteVAE().state_dict()
    table = {key: tuple(value.shape) for key, value in state.items()}
    wanted: dict[str, tuple[int, ...]] = {"codebook.weight": (8192, 512)}
    for layer in range(3):
        wanted[f"encoder.{2 * layer}.0.weight"] = (256, 256 if layer else 3, 4, 4)
        wanted[f"decoder.{2 * layer}.0.weight"] = (256 if layer else 512, 256, 4, 4)
        for side in ("encoder", "decoder"):
            wanted[f"{side}.{2 * layer}.0.bias"] = (256,)
            for place, size in ((0, 3), (2, 3), (4, 1)):
                wanted[f"{side}.{2 * layer + 1}.net.{place}.weight"] = (256, 256, size, size)
                wanted[f"{side}.{2 * layer + 1}.net.{place}.bias"] = (256,)
    wanted |= {"encoder.6.weight": (8192, 256, 1, 1), "encoder.6.bias": (8192,)}
    wanted |= {"decoder.6.weight": (3, 256, 1, 1), "decoder.6.bias": (3,)}
    assert table == wanted


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_our_tokenizer_from_its_file(tmp_path: Path, layers: int) -> None:
    """Sizes are read from the shapes; codes and reconstructions on a non-square image."""
    torch.manual_seed(0)
    made = DiscreteVAE(12, 6, layers, 5).eval()
    torch.save({"weights": made.state_dict()}, tmp_path / "pytorch_model.bin")
    read = load_tokenizer(str(tmp_path))
    assert isinstance(read, DiscreteVAE)
    assert (read.vocabulary, read.stride) == (12, 2**layers)
    images = torch.rand(2, 3, 16, 24)
    assert torch.equal(read.codes(images), made.codes(images))
    assert read.codes(images).shape == (2, 16 >> layers, 24 >> layers)
    colours = read.reconstruct(images)
    assert colours.shape == images.shape
    assert (colours.min() >= 0, colours.max() <= 1) == (True, True)
    assert len(fingerprint(str(tmp_path))) == 64
    assert fingerprint(str(tmp_path)) == fingerprint(str(tmp_path / "pytorch_model.bin"))


def test_relaxed_codes_become_hard_as_the_temperature_falls() -> None:
    torch.manual_seed(0)
    model = DiscreteVAE(12, 6, 2, 5)
    images = torch.rand(2, 3, 8, 8)
    torch.manual_seed(1)
    soft, logits = model(images, 5.0)
    torch.manual_seed(1)
    hard, _ = model(images, 1e-4)
    assert soft.shape == images.shape
    assert logits.shape == (2, 12, 2, 2)
    torch.manual_seed(1)
    winner = (logits - torch.empty_like(logits).exponential_().log()).argmax(dim=1)
    from_winner = model.decoder(model.codebook(winner).permute(0, 3, 1, 2))
    torch.testing.assert_close(hard, from_winner, atol=1e-4, rtol=0)
    assert not torch.allclose(soft, hard, atol=1e-3)


def test_places_without_a_tokenizer_are_named(tmp_path: Path) -> None:
    for place, message in (
        (tmp_path, "the folder holds neither pytorch_model.bin nor encoder.pkl"),
        (tmp_path / "none.bin", "none.bin: no such file"),
        (tmp_path / "none.pkl", "none.pkl: no such file"),
    ):
        with pytest.raises(BadInput, match=message):
            load_tokenizer(str(place))
    torch.save({"model": {"x": torch.zeros(1)}}, tmp_path / "other.bin")
    with pytest.raises(BadInput, match=r"other.bin: does not fit a tokenizer"):
        load_tokenizer(str(tmp_path / "other.bin"))
    weights = DiscreteVAE(12, 6, 1, 5).state_dict()
    weights["codebook.weight"][3] = float("nan")
    torch.save({"weights": weights}, tmp_path / "nan.bin")
    with pytest.raises(BadInput, match=r"nan.bin: holds weights that are NaN or infinite: codebook.weight$"):
        load_tokenizer(str(tmp_path / "nan.bin"))
    (tmp_path / "noise.pkl").write_bytes(b"\x80\x02noise")
    with pytest.raises(BadInput, match=r"noise.pkl: not the DALL-E encoder"):
        load_tokenizer(str(tmp_path / "noise.pkl"))
    for name in ("pytorch_model.bin", "encoder.pkl"):
        (tmp_path / name).touch()
    with pytest.raises(BadInput, match=r"holds pytorch_model.bin and encoder.pkl; name one file"):
        load_tokenizer(str(tmp_path))
