"""The layers taken from timm 0.4.12, imported without the deprecation warning that timm itself causes.

timm 0.4.12 calls `torch.jit.script` at import, which torch now warns of. The filter covers that one message
during that one import and nothing else. It can go when the pin on timm does. No model here uses `Block`: the tests
compare ours with it, and read its attention as that of a patched encoder.
"""

import warnings

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is (deprecated|not supported)")
    from timm.models.layers import DropPath, trunc_normal_
    from timm.models.vision_transformer import Block, Mlp, PatchEmbed

__all__ = ["Block", "DropPath", "Mlp", "PatchEmbed", "trunc_normal_"]
