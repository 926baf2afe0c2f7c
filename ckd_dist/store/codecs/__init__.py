"""Codecs: what a store keeps of a teacher's logits, and what the losses get back.

A record is a fixed number of bytes for an image, a view and a checkpoint. Shards are .npy arrays of the type that
`Codec.array` names, so numpy opens them without this package.

    dense     2 * classes bytes   all logits: float16, or bfloat16 as the uint16 that hold its bits
    topk      4 * k + 12 bytes    the k largest logits and the statistics of all of them
    transform bytes               all logits, by gain, points on a checkpoint's principal axes, and repairs
    sampled   4 * k bytes         k classes drawn from the teacher's softmax: an unbiased sparse target

A new codec is one new file here, with a subclass of `base.Codec`, `full.FullCodec` or `sparse.SparseCodec`, and one
line of `CODECS`.
(`--codec` offers the names, and has the options, of `ckd_dist.store.options.CodecConfig`, which is read without torch.)
"""

from ckd_dist.store.codecs.base import Codec
from ckd_dist.store.codecs.dense import Dense
from ckd_dist.store.codecs.sampled import Sampled
from ckd_dist.store.codecs.topk import TopK
from ckd_dist.store.codecs.transform import Transform

CODECS: dict[str, type[Codec]] = {
    Dense.name: Dense,
    Transform.name: Transform,
    TopK.name: TopK,
    Sampled.name: Sampled,
}
"""Name -> codec."""
