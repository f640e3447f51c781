"""Frozen features and what reads them."""
