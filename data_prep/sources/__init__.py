"""Datasets as sources of images: `source.read(i, check)` is (uint8 RGB array [height, width, 3], class index).

`datasets` knows each by its name. Images are arrays in memory (`arrays`) or encoded (`encoded`, whose pixels `decoding`
makes): files of their own (`files`) or parts of larger ones (`tars`,
`parquet`). `imagenet` and `layouts` tell how they lie in folders, `tables`, `webdataset` and `parquet` list them with
their labels (`listed`).
"""
