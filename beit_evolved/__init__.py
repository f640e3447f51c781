"""BEiT (Bao et al., ICLR 2022) pre-trained with evolved part masking."""
