"""Datasets to .beton files, the format that FFCV loads: `python -m data_prep.write_beton`.

`sources` reads datasets, `beton` writes images into a file. Around them, `options` is the command line, `splits` and
`parts` say which images go into which file, `description` what is written about it, and `publishing` gives files
their final names.
"""
