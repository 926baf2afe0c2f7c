"""Write the sha256 of every decoded image of a file, as one rank of many: BETON SIZE VIEW OUT_FOLDER RECIPE_JSON."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

from ckd_dist.core import dist
from ckd_dist.data import dataset, order
from ckd_dist.data.loader import BetonLoader
from ckd_dist.data.options import LoaderConfig
from ckd_dist.data.recipe import ViewRecipe

path, size, view, out, recipe_json = sys.argv[1:]
with dist.process_group() as device:
    info = dataset.read_info(path, "data.train")
    recipe = ViewRecipe.from_dict(json.loads(recipe_json))
    loader = BetonLoader(info, LoaderConfig(), recipe, batch_size=16, image_size=int(size), device=device)
    ids = order.shuffled_ids(info.count, 3, dist.world_size())[dist.rank() :: dist.world_size()]
    digests = {
        int(sample): hashlib.sha256(image.numpy().tobytes()).hexdigest()
        for batch in loader.batches(np.array(ids), int(view))
        for sample, image in zip(batch.ids, batch.images, strict=True)
    }
    Path(out, f"{dist.world_size()}_{dist.rank()}.json").write_text(json.dumps(digests))
