"""What `kernels.py` times: our implementations of an op, and what users of other libraries run.

A program has two passes over the same inputs, the forward, and the forward with the gradients of
what is learned. torch, flash-linear-attention and tokamax are imported where they are used.
"""

import abc
import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import specs
from latentlab.ops import log_decay_rates
from pallas_kernels.diff_attention import IMPLEMENTATIONS as DIFF_ATTENTION
from pallas_kernels.diff_attention import diff_attention
from pallas_kernels.retention import IMPLEMENTATIONS as RETENTION
from pallas_kernels.retention import retention

Inputs = Mapping[str, Any]
PASSES = ("forward", "forward_backward")


@dataclasses.dataclass(frozen=True)
class Program:
  """One way to compute an op.

  Attributes:
    passes: By name, functions of prepared inputs: the output, or it and the gradients by name.
    prepare: Makes a program's own inputs of jax arrays.
    fetch: Makes an array of numpy of the first row of a result.
    wait: Waits for a result, and all that was asked for before it.
  """

  passes: Mapping[str, Callable[[Inputs], Any]]
  prepare: Callable[[Inputs], Inputs]
  fetch: Callable[[Any], np.ndarray]
  wait: Callable[[Any], Any]


class Op(abc.ABC):
  """An op at one shape: inputs, floors, and the programs that compute it."""

  learned: tuple[str, ...]

  def __init__(self, shape: specs.Attention, dtype: str):
    self.shape, self.dtype = shape, jnp.dtype(dtype)

  @abc.abstractmethod
  def inputs(self, seed: int) -> dict[str, jax.Array]:
    """Random inputs by name, and the output's gradient, `dout`."""

  @abc.abstractmethod
  def ours(self, implementation: str) -> Callable[..., jax.Array]:
    """The op as a function of its inputs by name."""

  @abc.abstractmethod
  def work(self) -> dict[str, tuple[float, float]]:
    """Floating-point operations and bytes, which no program can do without, by pass."""

  @abc.abstractmethod
  def programs(self) -> dict[str, Callable[[], Program]]:
    """Makers of programs by name. One raises `NotImplementedError` with what it lacks."""

  def reference(self, inputs: Inputs) -> dict[str, np.ndarray]:
    """Output and gradients of the first row, in float32."""
    row = {k: x[:1] if x.ndim > 1 else x for k, x in inputs.items()}
    row = {k: x.astype(jnp.float32) for k, x in row.items()}
    program = jax_program(self.ours("xla"), self.learned)
    with jax.default_matmul_precision("float32"):  # A GPU's default rounds float32 operands.
      results = program.passes["forward_backward"](row)
    return {name: program.fetch(x) for name, x in results.items()}

  def _draw(self, seed: int, **shapes: tuple[int, ...]) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    normal = functools.partial(jax.random.normal, dtype=self.dtype)
    return {n: normal(key, s) for key, (n, s) in zip(keys, shapes.items(), strict=True)}


def jax_program(function: Callable[..., jax.Array], learned: tuple[str, ...]) -> Program:
  """A program of a function of inputs by name."""

  @jax.jit
  def forward(inputs):
    return function(**{k: x for k, x in inputs.items() if k != "dout"})

  @jax.jit
  def forward_backward(inputs):
    fixed = {k: x for k, x in inputs.items() if k not in learned and k != "dout"}
    out, vjp = jax.vjp(lambda x: function(**x, **fixed), {k: inputs[k] for k in learned})
    return {"out": out} | vjp(inputs["dout"].astype(out.dtype))[0]

  return Program(
    passes=dict(forward=forward, forward_backward=forward_backward),
    prepare=lambda inputs: inputs,
    fetch=lambda x: np.asarray((x[:1] if x.ndim > 1 else x).astype(jnp.float32)),
    wait=jax.block_until_ready,
  )


def torch_program(function: Callable[..., Any], learned: tuple[str, ...]) -> Program:
  """The same of a function of torch tensors."""
  import torch

  def prepare(inputs):
    tensors = {k: torch.from_dlpack(jax.block_until_ready(x)) for k, x in inputs.items()}
    return {k: x.detach().requires_grad_(k in learned) for k, x in tensors.items()}

  def forward(inputs):
    with torch.no_grad():
      return function(**{k: x for k, x in inputs.items() if k != "dout"})

  def forward_backward(inputs):
    out = function(**{k: x for k, x in inputs.items() if k != "dout"})
    grads = torch.autograd.grad(out, [inputs[k] for k in learned], inputs["dout"].to(out.dtype))
    return {"out": out} | dict(zip(learned, grads, strict=True))

  def wait(result):
    if torch.cuda.is_available():
      torch.cuda.synchronize()
    return result

  return Program(
    passes=dict(forward=forward, forward_backward=forward_backward),
    prepare=prepare,
    fetch=lambda x: (x[:1] if x.ndim > 1 else x).detach().float().cpu().numpy(),
    wait=wait,
  )


def require(*packages: str) -> None:
  """Raises `NotImplementedError` if one of them is not installed."""
  for package in packages:
    if importlib.util.find_spec(package) is None:
      raise NotImplementedError(f"{package} is not installed.")


class Retention(Op):
  """RetNet's decays per head, or a decay per token and head, which is learned."""

  def __init__(self, shape, dtype):
    super().__init__(shape, dtype)
    self.learned = ("q", "k", "v", *(["log_decay"] if shape.gated else []))

  def inputs(self, seed):
    s = self.shape
    lead = (s.batch, s.length, s.num_heads)
    queries, values = (*lead, s.head_dim), (*lead, s.value_head_dim)
    inputs = self._draw(seed, q=queries, k=queries, v=values, dout=values)
    inputs["k"] *= s.head_dim**-0.5
    inputs["log_decay"] = log_decay_rates(s.num_heads)
    if s.gated:
      gates = jax.random.normal(jax.random.key(seed + 1000), lead)
      inputs["log_decay"] = jax.nn.log_sigmoid(gates + 3)
    return inputs

  def ours(self, implementation):
    return lambda **inputs: retention(**inputs, implementation=implementation)[0]

  def work(self):
    s, chunk = self.shape, 64
    heads, widths = s.batch * s.length * s.num_heads, s.head_dim + s.value_head_dim
    states, size = s.head_dim * s.value_head_dim, self.dtype.itemsize
    forward = (2 * chunk * widths + 4 * states, 2 * size * widths)
    backward = (6 * chunk * widths + 10 * states, 5 * size * widths)
    both = tuple(f + b for f, b in zip(forward, backward, strict=True))
    return {
      name: tuple(heads * x for x in work)
      for name, work in zip(PASSES, (forward, both), strict=True)
    }

  def programs(self):
    names = ("xla", "pallas_gpu", "recurrent") if self.shape.length < 128 else ("xla", "pallas_gpu")
    ours = {name: lambda name=name: jax_program(self.ours(name), self.learned) for name in names}
    peers = {"fla simple_gla": self._simple_gla}
    if not self.shape.gated:
      peers["fla retention"] = self._retention
    assert set(names) <= set(RETENTION)
    return ours | peers

  def _simple_gla(self):
    require("torch", "triton", "fla")
    from fla.ops.simple_gla import chunk_simple_gla

    def run(q, k, v, log_decay):
      decay = "g" if self.shape.gated else "g_gamma"
      return chunk_simple_gla(q, k, v, scale=1.0, **{decay: log_decay})[0]

    return torch_program(run, self.learned)

  def _retention(self):
    require("torch", "triton", "fla")
    from fla.ops.retention import chunk_retention

    # Its decays are RetNet's, and no argument.
    return torch_program(
      lambda q, k, v, log_decay: chunk_retention(q, k, v, scale=1.0)[0], self.learned
    )


class DiffAttention(Op):
  """Causal, with one weight of the second map per head, and no norm."""

  learned = ("q", "k", "v", "lam")

  def inputs(self, seed):
    s = self.shape
    maps = (s.batch, s.length, s.num_heads, 2, s.head_dim)
    values = (s.batch, s.length, s.num_heads, s.value_head_dim)
    inputs = self._draw(seed, q=maps, k=maps, v=values, dout=values)
    inputs["k"] *= s.head_dim**-0.5
    inputs["lam"] = jax.random.uniform(jax.random.key(seed + 1000), (s.num_heads,))
    return inputs

  def ours(self, implementation):
    return functools.partial(diff_attention, implementation=implementation)

  def work(self):
    s = self.shape
    heads, size = s.batch * s.num_heads, self.dtype.itemsize
    products, moved = s.head_dim * s.length**2, s.head_dim * s.length * size
    return {
      "forward": (heads * 6 * products, heads * 8 * moved),
      "forward_backward": (heads * 16 * products, heads * 24 * moved),
    }

  def programs(self):
    names = [name for name in ("xla", "pallas_gpu") if name in DIFF_ATTENTION]
    ours = {name: lambda name=name: jax_program(self.ours(name), self.learned) for name in names}
    peers = {
      f"torch {backend} x{calls}": functools.partial(self._sdpa, backend, calls)
      for backend in ("flash", "cudnn")
      for calls in (2, 4)
    }
    return ours | peers | {"tokamax x2": self._tokamax}

  def _sdpa(self, backend, calls):
    """A call for each map with values twice as wide as its keys, or for each half of those."""
    require("torch")
    import torch
    from torch.nn import attention

    if not torch.cuda.is_available():
      raise NotImplementedError("torch has no GPU.")
    backend = {
      "flash": attention.SDPBackend.FLASH_ATTENTION,
      "cudnn": attention.SDPBackend.CUDNN_ATTENTION,
    }[backend]

    def attend(q, k, v):
      q, k, v = (x.transpose(1, 2) for x in (q, k, v))
      with attention.sdpa_kernel(backend):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
      return out.transpose(1, 2)

    def run(q, k, v, lam):
      parts = v.chunk(calls // 2, -1)
      one, two = (
        torch.cat([attend(q[..., m, :], k[..., m, :], part) for part in parts], -1) for m in (0, 1)
      )
      return one - lam[:, None].to(one.dtype) * two

    return torch_program(run, self.learned)

  def _tokamax(self):
    require("tokamax")
    import tokamax

    def run(q, k, v, lam):
      one, two = (
        tokamax.dot_product_attention(q[..., m, :], k[..., m, :], v, scale=1.0, is_causal=True)
        for m in (0, 1)
      )
      return one - lam[:, None].astype(one.dtype) * two

    return jax_program(run, self.learned)


OPS: dict[str, tuple[type[Op], dict[str, specs.Attention]]] = {
  "retention": (Retention, specs.RETENTION),
  "diff_attention": (DiffAttention, specs.DIFF_ATTENTION),
}
