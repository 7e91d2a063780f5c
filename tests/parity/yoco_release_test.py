"""YOCO by the names of its release gives the logits and gradients of the release's mathematics.

The reference is written from the formulas (section 2; equations 1 to 8 of the paper), token by
token where the paper has a recurrence, in float64.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentlab import interop
from latentlab.interop import yoco as names
from latentlab.models import LanguageModel, build_config, decode_step, num_params, prefill

torch = pytest.importorskip("torch", reason="the reference of YOCO's release needs torch")

VOCAB, LENGTH, PROMPT = 29, 13, 6
GATED = dict(dim=24, n_layers=2, hidden_dim=20, n_self_heads=2, n_attn_heads=4, n_attn_kv_heads=2)
FORMS = {
  "gated-tied": GATED | dict(tied=True),
  "gated-mha": GATED | dict(n_self_heads=3, n_attn_kv_heads=4),
  "window": GATED | dict(n_layers=4, n_self_heads=3, n_attn_kv_heads=1, sliding_window=5),
}
REST = dict(rope_theta=321.0, norm_eps=1e-3, vocab_size=VOCAB, max_seq_len=99)


def _shapes(args):
  """Names and shapes that the release's constructor makes."""
  width, hidden, head = args["dim"], args["hidden_dim"], args["dim"] // args["n_attn_heads"]
  shapes = {"embed_tokens": (VOCAB, width), "output_projection": (VOCAB, width)}
  shapes |= {"layer_norm": (width,), "cross_decoder.kv_layer_norm": (width,)}
  shapes |= {f"cross_decoder.{x}_proj": (head * args["n_attn_kv_heads"], width) for x in "kv"}
  projections = {"self": ["q", "k", "v", "out"], "cross": ["q", "out"]}
  if "sliding_window" not in args:
    projections["self"].append("g")
  for half, kinds in projections.items():
    for i in range(args["n_layers"] // 2):
      layer = f"{half}_decoder.layers.{i}."
      shapes |= {f"{layer}mixer.{x}_proj": (width, width) for x in kinds}
      if "g" in kinds:
        shapes[layer + "mixer.gt_proj"] = (args["n_self_heads"], width)
      shapes |= {f"{layer}{x}_layer_norm": (width,) for x in ("mixer", "final")}
      shapes |= {f"{layer}ffn.{x}": (hidden, width) for x in ("fc1", "gate")}
      shapes[layer + "ffn.fc2"] = (width, hidden)
  return {f"{name}.weight": shape for name, shape in shapes.items()}


def _weights(args):
  rng = np.random.default_rng(0)
  state = {}
  for name, shape in _shapes(args).items():
    x = rng.normal(size=shape) * (2.0 if "gt_proj" in name else 1.0) / math.sqrt(shape[-1])
    state[name] = np.asarray(1 + x if len(shape) == 1 else x, np.float32)
  if args.get("tied"):
    state["output_projection.weight"] = state["embed_tokens.weight"].copy()
  return state


class _Reference:
  """The release's mathematics over a dictionary of float64 tensors."""

  def __init__(self, weights, args):
    self.weights, self.args = weights, args

  def __call__(self, tokens):
    width, heads = self.args["dim"], self.args["n_attn_heads"]
    x = math.sqrt(width) * self.weights["embed_tokens.weight"][tokens]
    for i in range(self.args["n_layers"] // 2):
      x = self._layer(x, f"self_decoder.layers.{i}.", self._self_attention)
    m = self._norm(x, "cross_decoder.kv_layer_norm")
    kv_heads = self.args["n_attn_kv_heads"]
    k = self._rope(self._heads(m, "cross_decoder.k_proj", kv_heads, width // heads))
    v = self._heads(m, "cross_decoder.v_proj", kv_heads, width // heads)
    # Query head j reads key head j // (h / h_kv).
    k, v = (z.repeat_interleave(heads // kv_heads, dim=2) for z in (k, v))

    def cross_attention(x, layer):
      q = self._rope(self._heads(x, layer + "mixer.q_proj", heads, width // heads))
      return self._linear(self._softmax(q, k, v, len(q[0])), layer + "mixer.out_proj")

    for i in range(self.args["n_layers"] // 2):
      x = self._layer(x, f"cross_decoder.layers.{i}.", cross_attention)
    return self._linear(self._norm(x, "layer_norm"), "output_projection")

  def _layer(self, x, layer, mixer):
    x = x + mixer(self._norm(x, layer + "mixer_layer_norm"), layer)
    y = self._norm(x, layer + "final_layer_norm")
    up, gate = (self._linear(y, f"{layer}ffn.{name}") for name in ("gate", "fc1"))
    return x + self._linear(torch.nn.functional.silu(gate) * up, layer + "ffn.fc2")

  def _self_attention(self, x, layer):
    heads = self.args["n_self_heads"]
    sizes = (heads, self.args["dim"] // heads)
    q, k, v = (self._heads(x, f"{layer}mixer.{z}_proj", *sizes) for z in "qkv")
    q, k = self._rope(q), self._rope(k)
    if (window := self.args.get("sliding_window")) is not None:
      return self._linear(self._softmax(q, k, v, window), layer + "mixer.out_proj")
    gamma = torch.sigmoid(self._linear(x, layer + "mixer.gt_proj")) ** (1 / 16)
    state, outs = 0.0, []
    for n in range(x.shape[1]):  # Equation 6.
      new = k[:, n, :, :, None] * sizes[1] ** -0.5 * v[:, n, :, None, :]
      state = gamma[:, n, :, None, None] * state + new
      outs.append((q[:, n, :, :, None] * state).sum(-2))
    out = self._norm(torch.stack(outs, 1)).flatten(2)
    swish = torch.nn.functional.silu(self._linear(x, layer + "mixer.g_proj"))
    return self._linear(swish * out, layer + "mixer.out_proj")

  def _softmax(self, q, k, v, window):
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / math.sqrt(q.shape[-1])
    i, j = torch.arange(q.shape[1])[:, None], torch.arange(q.shape[1])
    seen = (j <= i) & (j > i - window)
    maps = torch.where(seen, scores, -math.inf).softmax(-1)
    return torch.einsum("bhnm,bmhd->bnhd", maps, v).flatten(2)

  def _rope(self, x):
    half = x.shape[-1] // 2
    theta = torch.tensor(self.args["rope_theta"], dtype=x.dtype)
    angles = theta ** -torch.linspace(0, 1, half, dtype=x.dtype)  # The end point is included.
    angles = torch.arange(x.shape[1])[:, None, None] * angles
    a, b = x[..., 0::2], x[..., 1::2]
    turned = (a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin())
    return torch.stack(turned, -1).flatten(-2)

  def _norm(self, x, name=None):
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.args["norm_eps"])
    return x if name is None else x * self.weights[name + ".weight"]

  def _linear(self, x, name):
    return x @ self.weights[name + ".weight"].T

  def _heads(self, x, name, heads, dim):
    return self._linear(x, name).unflatten(-1, (heads, dim))


@pytest.fixture(scope="module")
def tokens():
  return np.random.default_rng(1).integers(0, VOCAB, (2, LENGTH + 1))


def _import(state, args):
  fields = interop.CONFIG_FILES["yoco"].fields(args)
  imported = interop.IMPORTERS["yoco"](state, fields)
  params = jax.tree.map(jnp.asarray, imported.params)
  # A scan compiles one layer.
  return LanguageModel(build_config(imported.model | dict(unroll=1), imported.vocab_size)), params


@pytest.mark.parametrize("form", ["gated-tied", "window"])
def test_logits_and_every_gradient_are_the_releases(form, tokens):
  args = FORMS[form] | REST
  state = _weights(args)
  model, params = _import(state, args)
  inputs, targets = tokens[:, :-1], tokens[:, 1:]

  @jax.jit
  def both(params):
    logits = model.apply({"params": params}, jnp.asarray(inputs)).logits
    losses = lambda p: model.apply(
      {"params": p}, jnp.asarray(inputs), jnp.asarray(targets), method="token_losses"
    )
    return logits, jax.grad(lambda p: losses(p).mean())(params)

  logits, grads = both(params)
  leaves = {k: torch.tensor(x, dtype=torch.float64).requires_grad_() for k, x in state.items()}
  if args.get("tied"):
    leaves["output_projection.weight"] = leaves["embed_tokens.weight"]
  assert num_params(model.config)["total"] == sum(x.numel() for x in {*leaves.values()})
  want = _Reference(leaves, args)(torch.tensor(inputs))
  torch.nn.functional.cross_entropy(
    want.flatten(0, 1), torch.tensor(targets, dtype=torch.int64).flatten()
  ).backward()
  want = want.detach().numpy()
  np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())

  kind = "sliding_window" if "sliding_window" in args else "gated_retention"
  table = names.entries(self_attention=kind, tied=model.config.tie_embeddings)
  found = interop.export_weights(table, grads)
  assert found.keys() == leaves.keys() - (
    {"output_projection.weight"} if args.get("tied") else set()
  )
  for name, got in found.items():
    grad = leaves[name].grad.numpy()
    assert np.abs(grad).max() > 1e-6, name
    np.testing.assert_allclose(got, grad, rtol=1e-3, atol=2e-5 * np.abs(grad).max(), err_msg=name)


@pytest.mark.parametrize("form", ["gated-mha", "window"])
def test_a_prompt_and_what_follows_are_read_from_the_caches(form, tokens):
  args = FORMS[form] | REST
  state = _weights(args)
  model, params = _import(state, args)
  leaves = {k: torch.tensor(x, dtype=torch.float64) for k, x in state.items()}
  want = _Reference(leaves, args)(torch.tensor(tokens)).numpy()
  read = jax.jit(lambda p, t: prefill(model, p, t, max_length=tokens.shape[1]))
  step = jax.jit(lambda p, t, c: decode_step(model, p, t, c))
  logits, cache = read(params, jnp.asarray(tokens[:, :PROMPT]))
  for t in range(PROMPT, tokens.shape[1]):
    np.testing.assert_allclose(logits, want[:, t - 1], rtol=1e-4, atol=1e-5 * np.abs(want).max())
    logits, cache = step(params, jnp.asarray(tokens[:, t]), cache)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("prefix", ["", "decoder.model."])
def test_an_export_comes_back_bit_for_bit(form, prefix):
  args = FORMS[form] | REST
  state = _weights(args)
  model, params = _import({prefix + name: x for name, x in state.items()}, args)
  back = interop.EXPORTERS["yoco"](model.config, params)
  assert back.keys() == state.keys()
  for name, x in state.items():
    np.testing.assert_array_equal(back[name], x, err_msg=name)
  made = interop.CONFIG_FILES["yoco"].make(model.config)
  assert made.pop("sliding_window") == args.get("sliding_window")
  assert made == {name: args[name] for name in made}
