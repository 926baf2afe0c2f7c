"""The logit store: the logits of a teacher's checkpoints for every (view, sample), in shards on disk.

    store/
      manifest.json                                    what the logits are of: see `manifest`
      epoch_0008/view_0003/samples_00000000-00065535.npy    float16 [samples, classes]; any tool reads it
      epoch_0008/view_0003/samples_00000000-00065535.json   the shard's checksum and identity

A shard appears under its name only when whole: what is there is good, what is missing the next run computes.
"""
