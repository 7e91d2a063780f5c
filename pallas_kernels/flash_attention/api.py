"""Softmax attention: argument checks, and dispatch to the implementation that serves a platform."""

from collections.abc import Sequence
from typing import Literal

from jax import Array
from jaxtyping import Float, Int

from pallas_kernels.checks import check_shapes
from pallas_kernels.common import dispatch
from pallas_kernels.flash_attention import gpu, reference, tpu
from pallas_kernels.flash_attention.reference import Options
from pallas_kernels.visibility import bounds_of

Implementation = Literal["xla", "naive", "splash", "cudnn"]

# Called with Options, q, k, v and Visibility. One that cannot serve its arguments raises
# NotImplementedError, with the reason.
IMPLEMENTATIONS = {
  "xla": reference.blockwise,
  "naive": reference.naive,
  "splash": tpu.splash,
  "cudnn": gpu.cudnn,
}

_DEFAULTS = {"cpu": ("xla",), "gpu": ("cudnn", "xla"), "tpu": ("splash", "xla")}


def flash_attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K V"],
  *,
  scale: float = 1.0,
  causal: bool = True,
  window: int | None = None,
  q_offset: int | Int[Array, ""] | Int[Array, "B"] = 0,
  segment_ids: Int[Array, "B T"] | None = None,
  kv_segment_ids: Int[Array, "B S"] | None = None,
  lengths: Int[Array, "B"] | None = None,
  return_lse: bool = False,
  implementation: Implementation | Sequence[Implementation] | None = None,
) -> Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
  """Softmax attention, `softmax(scale q k^T) v`, with float32 scores and statistics.

  A query that sees no key gets zeros.

  Args:
    q: Queries.
    k: Keys; `N` is a multiple of their `K` heads, which query heads share in consecutive groups.
    v: Values.
    scale: Multiplies the scores; leave it to modules that have scaled the keys.
    causal: Hides the keys behind the query's position.
    window: The last `window` keys are seen, the query's own among them.
    q_offset: Position of the first query among the keys' `0 ... S - 1`.
    segment_ids: Packed documents of the queries, which see their own keys alone.
    kv_segment_ids: Documents of the keys; those of the queries if `None`.
    lengths: Valid keys per row (right padding). All valid if `None`.
    return_lse: Also return the log-sum-exp of each row, float32 and `-inf` where no key is seen.
    implementation: A name is a demand and raises if it cannot be met; a sequence is tried in order;
      `None` is the target platform's default.

  Returns:
    The outputs in `v`'s dtype, and the log-sum-exps if asked for.

  Raises:
    ValueError: Shapes or options disagree, or a name is unknown.
    ExceptionGroup: Every implementation asked for refused; holds the reasons.
  """
  if q.ndim != 4 or k.ndim != 4 or v.ndim != 4 or q.shape[2] % max(1, k.shape[2]):
    raise ValueError(
      f"q is laid out B T N H, k and v B S K H and B S K V with K heads that divide N, which "
      f"{q.shape=} {k.shape=} {v.shape=} are not."
    )
  check_shapes(
    f"{q.shape=} and {k.shape=}",
    k=(k, [(q.shape[0], *k.shape[1:3], q.shape[3])]),
    v=(v, [(*k.shape[:3], v.shape[3])]),
  )
  q_offset, visibility = bounds_of(
    q,
    k,
    q_offset=q_offset,
    segment_ids=segment_ids,
    kv_segment_ids=kv_segment_ids,
    lengths=lengths,
  )
  if not q.shape[1] or not k.shape[1]:
    raise ValueError(f"There is at least one query and one key; not {q.shape=} {k.shape=}.")
  options = Options(
    causal=causal, window=window, q_offset=q_offset, scale=scale, return_lse=return_lse
  )
  out, lse = dispatch(
    "flash_attention", IMPLEMENTATIONS, _DEFAULTS, implementation, options, q, k, v, visibility
  )
  return (out, lse) if return_lse else out
