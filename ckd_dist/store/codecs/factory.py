"""The codec that options or a store's manifest name."""

from __future__ import annotations

import json

from ckd_dist.core.files import parse_json
from ckd_dist.store.codecs import CODECS
from ckd_dist.store.codecs.base import Codec
from ckd_dist.store.options import CodecConfig


def from_config(config: CodecConfig, num_classes: int) -> Codec:
    """The codec that the options name; raises `UserError` where it does not fit the number of classes."""
    return CODECS[config.codec].from_options(config, num_classes)


def from_dict(values: dict, num_classes: int) -> Codec:
    """Inverse of `Codec.to_dict`; raises ValueError for a name or parameters that no codec of this version has."""
    parameters = {key: value for key, value in values.items() if key != "name"}
    if values.get("name") not in CODECS:
        raise ValueError(f"codec {values.get('name')}")
    return parse_json(json.dumps({"num_classes": num_classes, **parameters}), CODECS[values["name"]])
