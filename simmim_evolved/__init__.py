"""SimMIM (Xie et al., CVPR 2022) pre-trained with evolved part masking."""
