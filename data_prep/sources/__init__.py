"""Datasets as sources of images: `source.read(i, check)` is (uint8 RGB array [height, width, 3], class index).

`datasets` knows each by its name. Images are arrays in memory (`arrays`) or files (`files`, laid out as `layouts`
tells, whose pixels `decoding` makes).
"""
