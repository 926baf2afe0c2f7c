"""FFCV's files: `writer` lays one out, `workers` fill it with images, `reader` reads it back."""
