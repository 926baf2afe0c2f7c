"""A view is a pure function: view(seed, view id, sample id) -> crop box, flip, operations of a policy, colours, blur,
erased box, partner.

Every draw comes from a counter-based generator keyed by those three integers (`draws`), inside the FFCV decoder
(`decoder`): it does not depend on thread, rank, batch size, world size or order. So a teacher pass and a student pass
see byte-identical images, and cached logits are addressed by (view, sample). No draw depends on the output's
resolution.

A module imports from those before it only: draws, magnitudes -> parameters -> geometry -> colour, erasing, mixing,
operations, moving, blurring -> policies -> finishing -> replay, which makes a view of pixels in memory; libffcv ->
render -> decoder, which make it of FFCV's files, and alone need FFCV. All but `magnitudes`, `decoder` and the resizing
of `replay` is compiled by numba (`ckd_dist.data.jit`).
"""
