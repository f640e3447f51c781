"""Evolved part masking: the method (`evolved_mask` is the front door) and the machinery trainers share."""
