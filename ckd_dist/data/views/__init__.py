"""A view is a pure function: view(seed, view id, sample id) -> crop box, flip, colours, erased box, partner.

Every draw comes from a counter-based generator keyed by those three integers (`draws`), inside the FFCV decoder
(`decoder`): it does not depend on thread, rank, batch size, world size or order. So a teacher pass and a student pass
see byte-identical images, and cached logits are addressed by (view, sample). No draw depends on the output's
resolution.

A module imports from those before it only: draws -> parameters -> geometry -> colour, erasing, mixing; libffcv ->
render -> decoder. All but `decoder` is compiled by numba (`ckd_dist.data.jit`).
"""
