"""Datasets to .beton files, the format that FFCV loads."""
