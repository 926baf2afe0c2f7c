"""FFCV decoders: the views of a batch, its labels, its sample ids."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numba import int64, prange, uint64
from numba.extending import overload

from ckd_dist.data.ffcv_repairs import AllocationQuery, Compiler, IntDecoder, SimpleRGBImageDecoder, precompiled
from ckd_dist.data.jit import compiled
from ckd_dist.data.recipe import ViewRecipe
from ckd_dist.data.views.mixing import blend, draw_mix
from ckd_dist.data.views.parameters import parameters
from ckd_dist.data.views.render import render_stored


def _stored(address, state):
    """The bytes of an image in FFCV's memory, uint8 [bytes]."""
    raise NotImplementedError


@overload(_stored)
def _stored_in(address, state):
    if state[0].ndim == 1:  # the whole file, mapped: (bytes, addresses, sizes)

        def read(address, state):
            size = state[2][np.searchsorted(state[1], address)]
            return state[0][address : address + size]

    else:  # FFCV's own cache: (a page in each row, addresses, sizes, the row of each page)

        def read(address, state):
            size = state[2][np.searchsorted(state[1], address)]
            page_size = uint64(state[0].shape[1])
            page, offset = address // page_size, address % page_size
            return state[0][state[3][page], offset : offset + size]

    return read


def _decode_batch(over):
    """The loop over a batch, by `over`: range, or prange for several threads."""

    def decode(batch_indices, memory, metadata, storage_state, values, mixes):
        out, partners, seed_high, seed_low, view = memory
        seed, view_id = (seed_high.shape[2] << 31) | seed_low.shape[2], view.shape[2]
        for b in over(len(batch_indices)):
            sample = int64(batch_indices[b])
            field = metadata[sample]
            data = _stored(field["data_ptr"], storage_state)
            render_stored(data, field, seed, view_id, sample, values, out[b])
            if mixes:
                partner, weight, box = draw_mix(seed, view_id, sample, len(metadata), values)
                if weight < 1:
                    field = metadata[partner]
                    data = _stored(field["data_ptr"], storage_state)
                    render_stored(data, field, seed, view_id, partner, values, partners[b])
                    blend(out[b], partners[b], weight, box)
        return out[: len(batch_indices)]

    return decode


_decode = compiled(_decode_batch(range))
_decode_in_parallel = compiled(_decode_batch(prange), parallel=True)


def _channel(*values: int) -> tuple[AllocationQuery, ...]:
    """Buffers that carry integers in [0, 2**31) into compiled code as their shape, and hold no bytes.

    FFCV asks an operation for its buffers anew at each epoch and hands them to the function as arguments: so
    a value that changes between epochs belongs to that epoch's iterator alone.
    """
    return tuple(AllocationQuery((0, value), np.dtype("u1")) for value in values)


class ViewDecoder(SimpleRGBImageDecoder):
    """FFCV decoder of the field `image`: view `view` of every sample, uint8 [batch, size, size, 3].

    `view` and `size` may be set between epochs; they are read when an epoch starts.
    """

    def __init__(self, recipe: ViewRecipe, size: int, seed: int = 0, view: int = 0):
        super().__init__()
        self.recipe, self.size, self.seed, self.view = recipe, size, seed, view

    def declare_state_and_memory(self, previous_state):
        """Tell FFCV the type of the images, and what memory decoding takes."""
        byte = np.dtype("u1")
        shape = (self.size, self.size, 3)
        return (
            replace(previous_state, jit_mode=True, shape=shape, dtype=byte),
            (
                AllocationQuery(shape, byte),
                AllocationQuery(shape if self.recipe.mixes else (0, 0, 3), byte),
                *_channel(self.seed >> 31, self.seed & 0x7FFFFFFF, self.view),
            ),
        )

    def generate_code(self):
        """Give FFCV the function that decodes a batch."""
        loop = _decode_in_parallel if Compiler.num_threads > 1 else _decode
        values, mixes = parameters(self.recipe), self.recipe.mixes

        @precompiled
        def decode(batch_indices, memory, metadata, storage_state):
            return loop(batch_indices, memory, metadata, storage_state, values, mixes)

        return decode


class LabelDecoder(IntDecoder):
    """FFCV decoder of an integer field, int64 [batch, 1]."""

    def generate_code(self):
        """Give FFCV the function that decodes a batch."""

        @precompiled
        def decode(batch_indices, out, metadata, storage_state):
            out[: len(batch_indices), 0] = metadata[batch_indices]
            return out[: len(batch_indices)]

        return decode


class SampleIdDecoder(IntDecoder):
    """FFCV decoder that yields each sample's id, int64 [batch, 1], from any field."""

    def generate_code(self):
        """Give FFCV the function that decodes a batch."""

        @precompiled
        def decode(batch_indices, out, metadata, storage_state):
            out[: len(batch_indices), 0] = batch_indices
            return out[: len(batch_indices)]

        return decode
