"""Images: what a .beton file holds, the views and the order in which they are drawn, and the loader that makes batches
of them. It knows no model. Only `loader`, `beton`, `ffcv_repairs` and, of `views`, `libffcv`,
`render` and `decoder` need FFCV; `jit` is how numba compiles
functions, here and in `store`.
"""
