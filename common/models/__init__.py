"""Transformer blocks, and the encoders that share them."""
