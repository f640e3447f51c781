"""Images with a label at every pixel."""
