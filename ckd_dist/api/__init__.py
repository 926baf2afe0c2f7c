"""What training loops of others take of this package, under the names that `ckd_dist` offers: a store's logits and
losses, the views that its teacher saw, and how a store is filled from any model. Only `loader` needs FFCV.
"""
