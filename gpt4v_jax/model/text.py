"""Token ids -> Segment."""

import flax.linen as nn

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config
from gpt4v_jax.model.layers import Table


class TextEmbed(nn.Module):
    """h0 = embedding of the token + (where positions are learned) embedding of the position: [B,T] -> [B,T,D]."""

    config: config.Model

    def setup(self):
        c = self.config
        self.embed = Table(c.vocab, c.backbone.width, c.init_std)
        if c.position == "learned":
            self.position = Table(c.context, c.backbone.width, c.init_std)

    def __call__(self, batch: batch_lib.Batch, step) -> batch_lib.Segment:
        x = self.embed(batch.tokens)
        if self.config.position == "learned":
            x += self.position(batch.position[..., 0])
        return batch_lib.Segment(x, batch.document, step, item=(batch.tokens * 0), kind=batch_lib.TEXT)

    def attend(self, x):
        return self.embed.attend(x)
