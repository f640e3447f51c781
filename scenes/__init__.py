"""Composed photographs with labels and object masks, in the layouts of ImageNet, ADE20K and COCO."""
