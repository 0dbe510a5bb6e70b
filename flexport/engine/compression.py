"""What is compressed of a model, in how many bits, and what is left as it is.

Torch is not imported here.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from typing import Any

from flexport.codecs.compressed import compressed
from flexport.engine.stored import packed_layout
from flexport.models.spec import ModelSpec
from flexport.models.tensors import owned_tensors

__all__ = ["weights_summary"]


@lru_cache(maxsize=8)  # a plan is made for every job, and a model may have 50,000 experts
def weights_summary(spec: ModelSpec, codec: str) -> dict[str, Any]:
    """The report's words on weights.

    `codec`; and where there is one `bits` of a weight that is packed, scales and padding included,
    the `share` of all weights that are, and how many weights each part has that is left as it is.
    """
    form = compressed(codec)
    if form is None:
        return {"codec": "none"}
    num_packed = packed_bytes = 0
    left: Counter[str] = Counter()
    for layer in range(spec.num_schedule_layers):
        for tensor in owned_tensors(spec, layer):
            layout = packed_layout(tensor, form) if 0 < layer < spec.head_layer else None
            if layout is None:
                left[tensor.slot.partition("@")[0]] += tensor.num_values
            else:
                num_packed += tensor.num_values
                packed_bytes += layout.num_bytes
    return {
        "codec": form.name,
        "bits": round(8 * packed_bytes / max(1, num_packed), 3),
        "share": num_packed / (num_packed + sum(left.values())),
        "left": dict(left.most_common()),
    }
