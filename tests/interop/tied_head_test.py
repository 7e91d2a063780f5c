"""A head that is the embedding: saved or not, told or not, in every library alike."""

import jax
import numpy as np
import pytest

from latentlab import interop
from latentlab.models import build_config

VOCAB = 11
SIZES = dict(num_layers=2, embed_dim=16, num_heads=2, mlp_dim=10)
# A model's section, what its weights do not tell, and the names of the embedding and of the head.
LIBRARIES = {
  "diffllama": (
    dict(name="diff_transformer", head_norm_affine=False),
    dict(feed_forward="swiglu", rope_base=10_000.0, norm_eps=1e-5),
    ("model.embed_tokens.weight", "lm_head.weight"),
  ),
  "torchscale": (
    dict(name="torchscale_retnet"),
    dict(feed_forward="swiglu", scale_embeddings=True),
    ("embed_tokens.weight", "output_projection.weight"),
  ),
  "yoco": (
    dict(name="yoco", num_self_heads=4),
    dict(num_heads=2, rope_base=10_000.0),
    ("embed_tokens.weight", "output_projection.weight"),
  ),
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_tied_head_may_be_there_or_not(library):
  section, told, (embedding, head) = LIBRARIES[library]
  config = build_config(SIZES | section | dict(tie_embeddings=False), VOCAB)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(np.float32), interop.parameter_shapes(config)
  )
  state = interop.EXPORTERS[library](config, params)
  load = interop.IMPORTERS[library]
  tied = lambda found, **fields: load(found, told | fields).model["tie_embeddings"]
  repeated = state | {head: state[embedding].copy()}
  absent = {name: x for name, x in state.items() if name != head}
  assert not tied(state) and not tied(repeated, tie_embeddings=False)
  for fields in ({}, dict(tie_embeddings=None), dict(tie_embeddings=True)):
    assert tied(repeated, **fields) and tied(absent, **fields)
    assert "head" not in load(repeated, told | fields).params
  with pytest.raises(ValueError, match=rf"unexpected \['{head}'\]"):
    tied(state, tie_embeddings=True)
  with pytest.raises(ValueError, match=rf"missing \['{head}'\]"):
    tied(absent, tie_embeddings=False)
