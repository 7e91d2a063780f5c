"""Differential attention: argument checks, and dispatch to the implementation for a platform."""

from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels.checks import check_at_least_one, check_integers, check_shapes
from pallas_kernels.common import dispatch
from pallas_kernels.diff_attention import gpu, gpu_decode, reference, tpu, tpu_decode, xla
from pallas_kernels.diff_attention.reference import Options
from pallas_kernels.visibility import bounds_of

Implementation = Literal["xla", "pallas_tpu", "pallas_gpu", "naive", "two_call", "four_call"]

# Called with Options, q, k, v, lam, gain and Visibility. One that cannot serve its arguments raises
# NotImplementedError, with the reason.
IMPLEMENTATIONS = {
  "xla": xla.blockwise,
  "pallas_tpu": tpu.diff_attention,
  "pallas_gpu": gpu.diff_attention,
  "naive": reference.naive,
  "two_call": reference.two_call,
  "four_call": reference.four_call,
}

# Called with Options, q, k, v, lam, gain, lengths and num_splits.
DECODE_IMPLEMENTATIONS = {
  "xla": xla.decode,
  "pallas_tpu": tpu_decode.decode,
  "pallas_gpu": gpu_decode.decode,
  "naive": reference.decode_naive,
}

_DEFAULTS = {"cpu": ("xla",), "gpu": ("xla",), "tpu": ("pallas_tpu", "xla")}


def diff_attention(
  q: Float[Array, "B T N 2 H"],
  k: Float[Array, "B S K 2 H"] | Float[Array, "B S K H"],
  v: Float[Array, "B S K V"],
  lam: Float[Array, ""] | Float[Array, "N"] | Float[Array, "B T N"],
  *,
  scale: float = 1.0,
  causal: bool = True,
  window: int | None = None,
  q_offset: int | Int[Array, ""] | Int[Array, "B"] = 0,
  segment_ids: Int[Array, "B T"] | None = None,
  kv_segment_ids: Int[Array, "B S"] | None = None,
  lengths: Int[Array, "B"] | None = None,
  gain: Float[Array, "V"] | None = None,
  eps: float | None = None,
  post_scale: float = 1.0,
  return_lse: bool = False,
  implementation: Implementation | Sequence[Implementation] | None = None,
) -> Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], Float[Array, "B T N 2"]]:
  """Differential attention, `(softmax(q1 k1^T) - lam softmax(q2 k2^T)) v`, optionally normalised.

  Scores, statistics and the subtraction are float32 whatever the inputs are. A query that sees no
  key gets zeros.

  Args:
    q: Queries of both maps.
    k: Keys of both maps, or of one that both share; `N` is a multiple of their `K` heads, which
      query heads share in consecutive groups.
    v: Values, which both maps share.
    lam: Weight of the second map: of all, per head, or per token and head. Of any sign and size.
    scale: Multiplies the scores; leave it to modules that have scaled the keys.
    causal: Hides the keys behind the query's position.
    window: The last `window` keys are seen, the query's own among them.
    q_offset: Position of the first query among the keys' `0 ... S - 1`.
    segment_ids: Packed documents of the queries, which see their own keys alone.
    kv_segment_ids: Documents of the keys; those of the queries if `None`.
    lengths: Valid keys per row (right padding). All valid if `None`.
    gain: Of the headwise norm, shared by all heads; ones if `None`.
    eps: Divides each head's output by its root mean square, `eps` under the root; `None` doesn't.
    post_scale: Multiplies the normalised output: the paper's `1 - lambda_init`.
    return_lse: Also return the log-sum-exp of both maps, float32 and `-inf` where no key is seen.
    implementation: A name is a demand and raises if it cannot be met; a sequence is tried in order;
      `None` is the target platform's default.

  Returns:
    The outputs in `v`'s dtype, and the log-sum-exps if asked for.

  Raises:
    ValueError: Shapes or options disagree, or a name is unknown.
    ExceptionGroup: Every implementation asked for refused; holds the reasons.
  """
  _check_heads(q, k, v, ("B", "T", "N", "2", "H"))
  _check_norm(v, gain, eps)
  check_shapes(f"{q.shape=}", lam=(lam, [(), q.shape[2:3], q.shape[:3]]))
  q_offset, visibility = bounds_of(
    q,
    k,
    q_offset=q_offset,
    segment_ids=segment_ids,
    kv_segment_ids=kv_segment_ids,
    lengths=lengths,
  )
  options = Options(
    scale=scale,
    causal=causal,
    window=window,
    q_offset=q_offset,
    eps=eps,
    post_scale=post_scale,
    return_lse=return_lse,
  )
  return dispatch(
    "diff_attention",
    IMPLEMENTATIONS,
    _DEFAULTS,
    implementation,
    *(options, q, k, v, lam, gain, visibility),
  )


def diff_attention_decode(
  q: Float[Array, "B N 2 H"],
  k: Float[Array, "B S K 2 H"] | Float[Array, "B S K H"],
  v: Float[Array, "B S K V"],
  lam: Float[Array, ""] | Float[Array, "N"] | Float[Array, "B N"],
  *,
  lengths: Int[Array, "B"] | None = None,
  scale: float = 1.0,
  window: int | None = None,
  gain: Float[Array, "V"] | None = None,
  eps: float | None = None,
  post_scale: float = 1.0,
  num_splits: int | None = None,
  implementation: Implementation | Sequence[Implementation] | None = None,
) -> Float[Array, "B N V"]:
  """Differential attention of one query per row over a cache, for decoding.

  Args:
    q: Queries; each row's is that of its last valid key.
    k: See `diff_attention`.
    v: See there.
    lam: See there; of all, per head, or per row and head.
    lengths: Valid keys per row; all `S` if `None`.
    scale: See `diff_attention`.
    window: The last `window` valid keys are seen; all if `None`.
    gain: See `diff_attention`.
    eps: See there.
    post_scale: See there.
    num_splits: A request, which an implementation may round: parts of the cache that are read side
      by side and merged, each map's on its own.
    implementation: See `diff_attention`.

  Returns:
    The outputs in `v`'s dtype.

  Raises:
    ValueError: Shapes or options disagree, or a name is unknown.
    ExceptionGroup: Every implementation asked for refused; holds the reasons.
  """
  _check_heads(q, k, v, ("B", "N", "2", "H"))
  _check_norm(v, gain, eps)
  check_shapes(
    f"{q.shape=}", lam=(lam, [(), q.shape[1:2], q.shape[:2]]), lengths=(lengths, [q.shape[:1]])
  )
  check_integers(lengths=lengths)
  lengths = None if lengths is None else jnp.clip(lengths, 0, k.shape[1])
  check_at_least_one(num_splits=num_splits)
  options = Options(scale=scale, window=window, q_offset=None, eps=eps, post_scale=post_scale)
  return dispatch(
    "diff_attention_decode",
    DECODE_IMPLEMENTATIONS,
    _DEFAULTS,
    implementation,
    *(options, q, k, v, lam, gain, lengths, num_splits),
  )


def _check_heads(q, k, v, axes):
  if q.ndim != len(axes) or q.shape[-2] != 2:
    raise ValueError(f"q is laid out {' '.join(axes)}, not {q.shape=}.")
  heads, _, head_dim = q.shape[-3:]
  if v.ndim != 4 or v.shape[0] != q.shape[0] or heads % max(1, v.shape[2]):
    raise ValueError(
      f"v is laid out B S K V with K heads that divide q's, which {q.shape=} {v.shape=} is not."
    )
  if k.shape not in ((*v.shape[:3], 2, head_dim), (*v.shape[:3], head_dim)):
    raise ValueError(
      f"k is laid out B S K 2 H, or B S K H if both maps share it, which {k.shape=} is not of "
      f"{q.shape=} and {v.shape=}."
    )


def _check_norm(v, gain, eps):
  check_shapes(f"{v.shape=}", gain=(gain, [v.shape[3:]]))
  if gain is not None and eps is None:
    raise ValueError("gain is of the headwise norm; give its eps too.")
