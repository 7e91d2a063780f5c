"""The release's model, head and DiT give outputs and every gradient of its formulas, in float64.

The reference is written from the paper's and the release's mathematics, over weights by the
release's names: LatentLM section 3.2, DiT section 3.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentlab import interop
from latentlab.interop import latentlm as names
from latentlab.layers import Diffusion, Shared, initializers
from latentlab.models.dit import DiT
from latentlab.models.latentlm import Items, LatentLM

torch = pytest.importorskip("torch", reason="the reference of LatentLM's release needs torch")

WIDTH, MLP, DIM, DEPTH, HEADS, KV_HEADS, CLASSES = 32, 64, 3, 2, 4, 2, 5
silu = torch.nn.functional.silu


def _ends(images, name):
  shapes = {"t_embedder.mlp.0.weight": (WIDTH, 256), "t_embedder.mlp.2.weight": (WIDTH, WIDTH)}
  shapes |= {"final_layer.linear.weight": (DIM, WIDTH)}
  shapes |= {"final_layer.adaLN_modulation.1.weight": (2 * WIDTH, WIDTH)}
  if not images:
    return shapes | {f"{name}.weight": (WIDTH, DIM)}
  return shapes | {f"{name}.proj.weight": (WIDTH, DIM, 1, 1), f"{name}.proj.bias": (WIDTH,)}


def _layers(name, modulations):
  shapes = {}
  for i in range(DEPTH):
    layer = f"{name}.{i}."
    shapes |= {f"{layer}mlp.{x}.weight": (MLP, WIDTH) for x in ("fc1", "gate")}
    shapes[f"{layer}mlp.fc2.weight"] = (WIDTH, MLP)
    shapes[f"{layer}adaLN_modulation.1.weight"] = (modulations * WIDTH, WIDTH)
  return shapes


def head_weights(images):
  shapes = _ends(images, "noisy_x_embedder") | _layers("diffusion_blocks", 3)
  return _random(shapes | {"condition_layer.linear.weight": (WIDTH, WIDTH)})


def dit_weights(images, length):
  shapes = _ends(images, "x_embedder") | _layers("blocks", 6)
  shapes["y_embedder.embedding_table.weight"] = (CLASSES + 1, WIDTH)
  for i in range(DEPTH):
    fused = WIDTH + 2 * KV_HEADS * WIDTH // HEADS
    shapes[f"blocks.{i}.attn.qkv.weight"] = (fused, WIDTH)
    shapes[f"blocks.{i}.attn.proj.weight"] = (WIDTH, WIDTH)
  return _random(shapes) | {"pos_embed": _positions(images, length)}


def model_weights(images):
  shapes = {"y_embedder.embedding_table.weight": (CLASSES + 1, WIDTH)}
  for i in range(DEPTH):
    fused = WIDTH + 2 * KV_HEADS * WIDTH // HEADS
    shapes[f"blocks.{i}.attn.qkv.weight"] = (fused, WIDTH)
    shapes[f"blocks.{i}.attn.proj.weight"] = (WIDTH, WIDTH)
    shapes |= {f"blocks.{i}.mlp.{x}.weight": (MLP, WIDTH) for x in ("fc1", "gate")}
    shapes[f"blocks.{i}.mlp.fc2.weight"] = (WIDTH, MLP)
  into = {n.replace("noisy_", ""): s for n, s in _ends(images, "noisy_x_embedder").items()}
  shapes |= {n: s for n, s in into.items() if n.startswith("x_embedder")}
  return _random(shapes) | head_weights(images)


def _random(shapes):
  rng = np.random.default_rng(0)
  scale = lambda shape: 0.5 if len(shape) == 1 else 1 / math.sqrt(shape[1])
  return {n: (rng.normal(size=s) * scale(s)).astype(np.float32) for n, s in shapes.items()}


def _positions(images, length):
  """Place by place: sines, then cosines; the column's before the row's where there are rows."""
  side = math.isqrt(length)
  rows = []
  for i in range(length):
    numbers = (i % side, i // side) if images else (i,)
    half = WIDTH // len(numbers) // 2
    rows.append(
      [
        f(n / 10_000 ** (k / half))
        for n in numbers
        for f in (math.sin, math.cos)
        for k in range(half)
      ]
    )
  return np.array(rows, np.float32)[None]


def _as_torch(state):
  return {n: torch.tensor(x, dtype=torch.float64, requires_grad=True) for n, x in state.items()}


def _norm(x):
  return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def _modulated(w, name, x, c, part, parts):
  """A branch's input, and the gate of its output."""
  vectors = (silu(c) @ w[f"{name}.weight"].T).split(WIDTH, dim=-1)
  assert len(vectors) == parts
  shift, scale, *gate = vectors[part : part + 3]
  return _norm(x) * (1 + scale) + shift, gate[0] if gate else None


def _swiglu(w, name, x):
  fc1, gate, fc2 = (w[f"{name}.{n}.weight"].T for n in ("fc1", "gate", "fc2"))
  return (silu(x @ fc1) * (x @ gate)) @ fc2


def _time(w, t):
  angles = t[:, None] * 10_000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
  features = torch.cat([angles.cos(), angles.sin()], dim=-1)
  return silu(features @ w["t_embedder.mlp.0.weight"].T) @ w["t_embedder.mlp.2.weight"].T


def _in(w, name, x):
  if f"{name}.weight" in w:
    return x @ w[f"{name}.weight"].T
  return x @ w[f"{name}.proj.weight"][:, :, 0, 0].T + w[f"{name}.proj.bias"]


def _out(w, x, c):
  y, _ = _modulated(w, "final_layer.adaLN_modulation.1", x, c, 0, 2)
  return y @ w["final_layer.linear.weight"].T


def head_formula(w, noisy, t, hidden):
  c = hidden @ w["condition_layer.linear.weight"].T + _time(w, t)
  u = _in(w, "noisy_x_embedder", noisy)
  for i in range(DEPTH):
    layer = f"diffusion_blocks.{i}."
    y, gate = _modulated(w, layer + "adaLN_modulation.1", u, c, 0, 3)
    u = u + gate * _swiglu(w, layer + "mlp", y)
  return _out(w, u, c)


def model_formula(w, latents, labels):
  """Normalised hidden vectors, of the class and then of all latents but the last."""
  first = w["y_embedder.embedding_table.weight"][labels][:, None]
  x = torch.cat([first, _in(w, "x_embedder", latents[:, :-1])], dim=1)
  for i in range(DEPTH):
    x = x + _attention(w, f"blocks.{i}.attn", _norm(x), causal=True)
    x = x + _swiglu(w, f"blocks.{i}.mlp", _norm(x))
  return _norm(x)


def dit_formula(w, noisy, t, labels):
  x = _in(w, "x_embedder", noisy) + w["pos_embed"]
  c = (_time(w, t) + w["y_embedder.embedding_table.weight"][labels])[:, None]
  for i in range(DEPTH):
    layer = f"blocks.{i}."
    y, gate = _modulated(w, layer + "adaLN_modulation.1", x, c, 0, 6)
    x = x + gate * _attention(w, layer + "attn", y)
    y, gate = _modulated(w, layer + "adaLN_modulation.1", x, c, 3, 6)
    x = x + gate * _swiglu(w, layer + "mlp", y)
  return _out(w, x, c)


def _rotated(x):
  """Neighbouring features as complex numbers, turned by place over powers of 10000 up to it."""
  half = x.shape[-1] // 2
  turns = 10_000.0 ** -torch.linspace(0, 1, half, dtype=torch.float64)
  angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * turns
  turned = torch.view_as_complex(x.unflatten(-1, (half, 2)).contiguous())
  turned = turned * torch.polar(torch.ones_like(angles), angles)[:, None]
  return torch.view_as_real(turned).flatten(-2)


def _attention(w, name, x, causal=False):
  batch, length, _ = x.shape
  heads = (x @ w[f"{name}.qkv.weight"].T).reshape(batch, length, -1, WIDTH // HEADS)
  q, k, v = heads.split([HEADS, KV_HEADS, KV_HEADS], dim=2)
  hidden = torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)
  if causal:
    q, k = _rotated(q), _rotated(k)
  out = []
  for n in range(HEADS):
    m = n // (HEADS // KV_HEADS)
    scores = q[:, :, n] @ k[:, :, m].mT / math.sqrt(WIDTH // HEADS)
    scores = scores + hidden if causal else scores
    out.append(scores.softmax(-1) @ v[:, :, m])
  return torch.cat(out, dim=-1) @ w[f"{name}.proj.weight"].T


def _errors(formula, state, inputs, alpha, sigma, clean, noise):
  """The loss of v-prediction, and its gradients, by the release's names."""
  w = _as_torch(state)
  target = torch.tensor(alpha * noise - sigma * clean)
  out = formula(w, torch.tensor(alpha * clean + sigma * noise), *inputs)
  loss = (out - target).pow(2).mean()
  loss.backward()
  grads = {n: x.grad.numpy() for n, x in w.items() if n != "pos_embed"}
  return loss.item(), grads, out.detach().numpy()


def _levels(t):
  """`alpha` and `sigma` of the cosine schedule, of timesteps with axes behind them."""
  f = lambda u: np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
  u = np.arange(1001) / 1000
  kept = np.cumprod(1 - np.minimum(1 - f(u[1:]) / f(u[:-1]), 0.999))
  return np.sqrt(kept)[t], np.sqrt(1 - kept)[t]


def _close(got, want, name=""):
  np.testing.assert_allclose(
    got, want, rtol=2e-4, atol=2e-5 * max(np.abs(want).max(), 1e-3), err_msg=name
  )


@pytest.mark.parametrize("images", [True, False], ids=["convolution", "matrix"])
def test_the_heads_loss_and_gradients(images):
  """At several timesteps and noises for each hidden vector, repeated as the release does."""
  state, rng = head_weights(images), np.random.default_rng(1)
  rows, draws = 4, 3
  hidden, clean = rng.normal(size=(rows, WIDTH)), rng.normal(size=(rows, DIM))
  t, noise = rng.integers(0, 1000, (rows, draws)), rng.normal(size=(rows, draws, DIM))
  repeat = lambda x: np.repeat(x, draws, axis=0)
  alpha, sigma = _levels(t.reshape(-1, 1))
  given = torch.tensor(hidden, requires_grad=True)
  inputs = (torch.tensor(t.reshape(-1), dtype=torch.float64), given.repeat_interleave(draws, 0))
  loss, grads, out = _errors(
    head_formula, state, inputs, alpha, sigma, repeat(clean), noise.reshape(-1, DIM)
  )

  back = names.import_head(state | {"blocks.0.attn.qkv.weight": np.zeros((3, 1))})
  assert (back.embed_dim, back.dim, back.config.depth) == (WIDTH, DIM, DEPTH)
  assert back.config.mlp_dim == MLP and back.config.input_bias == images
  init = initializers.make("linear", num_layers=1, embed_dim=WIDTH)
  head = back.config.module(Shared(WIDTH, jnp.float32, init), DIM)
  f32 = lambda x: jnp.asarray(x, jnp.float32)

  def run(params, hidden):
    args = (hidden, f32(clean), jnp.asarray(t), f32(noise))
    return head.apply({"params": params}, *args, method="losses_at").mean()

  got, (d_params, d_hidden) = jax.jit(jax.value_and_grad(run, argnums=(0, 1)))(
    back.params, f32(hidden)
  )
  _close(got, loss)
  _close(d_hidden, given.grad.numpy())
  exported = names.export_head(back.config, d_params)
  assert exported.keys() == grads.keys()
  for name, want in grads.items():
    _close(exported[name], want, name)
  noisy = f32(alpha * repeat(clean) + sigma * noise.reshape(-1, DIM))
  call = jax.jit(functools.partial(head.apply, {"params": back.params}))
  _close(call(noisy, jnp.asarray(t.reshape(-1)), f32(repeat(hidden))), out)


@pytest.mark.parametrize("images", [True, False], ids=["convolution", "matrix"])
def test_the_models_loss_and_gradients(images):
  """Latents by class: one pass of the decoder, and the head's loss of every latent."""
  state, rng = model_weights(images), np.random.default_rng(1)
  length = 5
  clean, noise = rng.normal(size=(2, 3, length, DIM))
  t, labels = rng.integers(0, 1000, (3, length)), np.array([2, 0, CLASSES])
  alpha, sigma = _levels(t[..., None])

  def formula(w, noisy, t, clean, labels):
    hidden = model_formula(w, clean, labels)
    rows = head_formula(w, noisy.reshape(-1, DIM), t.reshape(-1), hidden.reshape(-1, WIDTH))
    return rows.reshape(noisy.shape)

  inputs = (torch.tensor(t, dtype=torch.float64), torch.tensor(clean), torch.tensor(labels))
  loss, grads, _ = _errors(formula, state, inputs, alpha, sigma, clean, noise)

  fields = dict(num_heads=HEADS, num_latents=length, mean=0.5, std=2.0)
  back = names.import_model(state, fields)
  c, special = back.config, back.config.tokens
  assert c.num_classes == CLASSES and c.modalities[0].input_bias == images
  model, f32 = LatentLM(c), lambda x: jnp.asarray(x, jnp.float32)
  first = [special.null if k == CLASSES else special.class_token(int(k)) for k in labels]
  tokens = np.full((3, length), special.latent(0))
  tokens[:, 0] = first
  kinds = np.ones((3, length), np.int32)
  kinds[:, 0] = 0
  read = np.roll(clean, 1, axis=1)
  items = Items(jnp.asarray(tokens), jnp.asarray(kinds), {"image": f32(read)})

  def run(params):
    hidden, _ = model.apply({"params": params}, items, method="hidden")
    args = (hidden, f32(clean), jnp.asarray(t)[..., None], f32(noise)[..., None, :])
    at = lambda module, *args: module.heads["image"].losses_at(*args)
    return model.apply({"params": params}, *args, method=at).mean()

  got, d_params = jax.jit(jax.value_and_grad(run))(back.params)
  _close(got, loss)
  # An export multiplies by the scales of norms; they are ones, and so they must be here.
  is_scale = lambda path: path[-1].key == "scale"
  d_params = jax.tree_util.tree_map_with_path(
    lambda path, d: jnp.ones_like(d) if is_scale(path) else d, d_params
  )
  exported = names.export_model(c, d_params)
  assert exported.keys() == grads.keys()
  for name, want in grads.items():
    _close(exported[name], want, name)
  again = names.export_model(c, back.params)
  assert again.keys() == state.keys()
  for name, x in state.items():
    np.testing.assert_array_equal(again[name], x, name)


@pytest.mark.parametrize("images", [True, False], ids=["grid", "line"])
def test_dits_loss_and_gradients(images):
  length = 9 if images else 6
  state, rng = dit_weights(images, length), np.random.default_rng(1)
  clean, noise = rng.normal(size=(2, 3, length, DIM))
  t, labels = np.array([3, 420, 999]), np.array([2, 0, CLASSES])
  alpha, sigma = _levels(t.reshape(-1, 1, 1))
  inputs = (torch.tensor(t, dtype=torch.float64), torch.tensor(labels))
  loss, grads, out = _errors(dit_formula, state, inputs, alpha, sigma, clean, noise)

  fields = dict(num_heads=HEADS, diffusion=Diffusion("v"))
  back = names.import_dit(state, fields)
  assert back.config.num_kv_heads == KV_HEADS and back.config.num_classes == CLASSES
  assert back.config.grid == ((3, 3) if images else (1, 6))
  assert back.config.num_params == sum(x.size for n, x in state.items() if n != "pos_embed")
  model, f32 = DiT(back.config), lambda x: jnp.asarray(x, jnp.float32)

  def run(params):
    args = (f32(clean), jnp.asarray(labels), jnp.asarray(t), f32(noise))
    return model.apply({"params": params}, *args, method="losses_at").mean()

  got, d_params = jax.jit(jax.value_and_grad(run))(back.params)
  _close(got, loss)
  exported = names.export_dit(back.config, d_params)
  assert exported.keys() == state.keys()
  for name, want in grads.items():
    _close(exported[name], want, name)
  call = jax.jit(functools.partial(model.apply, {"params": back.params}))
  _close(call(f32(alpha * clean + sigma * noise), jnp.asarray(t), jnp.asarray(labels)), out)
  assert interop.latentlm is names
