"""Images with boxes and outlines of objects."""
