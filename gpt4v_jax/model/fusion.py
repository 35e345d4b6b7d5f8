"""list[Segment] -> Fused: how the modalities meet. One small function or module a kind.

What data must know of a kind (how many positions a picture takes, what attends both ways) is batch.Layout's.
"""

import jax.numpy as jnp

from gpt4v_jax import batch as batch_lib


def concat(segments: list[batch_lib.Segment], slot_BT) -> batch_lib.Fused:
    """Media features go into the stream's media positions: position t takes feature slot[t], counted over all media.

    `prefix_lm` is the same function: what differs is `ar`, which data writes (Layout.prefix).
    """
    stream = segments[0].x
    if len(segments) > 1:
        features_BMD = jnp.concatenate([segment.x for segment in segments[1:]], axis=1)
        gathered = jnp.take_along_axis(features_BMD, jnp.maximum(slot_BT, 0)[..., None], axis=1)
        stream = jnp.where((slot_BT >= 0)[..., None], gathered, stream)
    return batch_lib.Fused(stream)


KINDS = {"concat": concat, "prefix_lm": concat}
