"""The release's image tokenizer is its own modules' one: means, pixels, and every gradient.

Its encoder is torchscale's `Encoder` behind its `VisionEmbedding`, as the release puts BEiT-3
together; its ViT, which stands in no package, is written from the release's mathematics on torch's
own functions.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import peers
from latentlab.interop import latentlm_tokenizer as names
from latentlab.models import latent_tokenizer
from latentlab.models.latent_tokenizer import LatentTokenizer

torch = pytest.importorskip("torch", reason="the release's tokenizer needs torch")
pytest.importorskip("torchscale", reason="needs `pip install --no-deps torchscale==0.3.0`")

SIZE, PATCH, CHANNELS, DIM, WIDTH, MLP, HEADS = 12, 4, 2, 3, 16, 24, 4
DEPTH = dict(encoder=2, decoder=3)
COUNT = (SIZE // PATCH) ** 2
F = torch.nn.functional


class Beit(torch.nn.Module):
  def __init__(self):
    super().__init__()
    peers.stand_in_for_unused_imports()
    from torchscale.architecture.config import EncoderConfig
    from torchscale.architecture.encoder import Encoder
    from torchscale.component.embedding import PositionalEmbedding, VisionEmbedding

    sizes = dict(encoder_embed_dim=WIDTH, encoder_attention_heads=HEADS, encoder_ffn_embed_dim=MLP)
    config = EncoderConfig(**sizes, encoder_layers=DEPTH["encoder"], no_output_layer=True)
    places = PositionalEmbedding(COUNT + 3, WIDTH)
    self.vision_embed = VisionEmbedding(SIZE, PATCH, CHANNELS, WIDTH, True, True)
    self.encoder = Encoder(config, embed_tokens=None, embed_positions=places)

  def forward(self, x):
    x = self.encoder(None, token_embeddings=self.vision_embed(x, None))
    return x["encoder_out"][:, 1:]


def vit_shapes(part, patch, channels):
  shapes = {"patch_embed.proj.weight": (WIDTH, channels, patch, patch)}
  shapes |= {"patch_embed.proj.bias": (WIDTH,), "cls_token": (1, 1, WIDTH)}
  shapes |= {"pos_embed": (1, COUNT + 1, WIDTH)}
  shapes |= {f"fc_norm.{x}": (WIDTH,) for x in ("weight", "bias")}
  for i in range(DEPTH[part]):
    layer = {f"{norm}.{x}": (WIDTH,) for norm in ("norm1", "norm2") for x in ("weight", "bias")}
    layer |= {"attn.qkv.weight": (3 * WIDTH, WIDTH), "attn.q_bias": (WIDTH,)}
    layer |= {"attn.v_bias": (WIDTH,), "attn.proj.weight": (WIDTH, WIDTH)}
    layer |= {"attn.proj.bias": (WIDTH,), "mlp.fc1.weight": (MLP, WIDTH), "mlp.fc1.bias": (MLP,)}
    layer |= {"mlp.fc2.weight": (WIDTH, MLP), "mlp.fc2.bias": (WIDTH,)}
    shapes |= {f"blocks.{i}.{name}": shape for name, shape in layer.items()}
  return {f"{part}.{name}": shape for name, shape in shapes.items()}


def vit(w, part, x):
  w = {n.removeprefix(f"{part}."): y for n, y in w.items() if n.startswith(f"{part}.")}
  norm = lambda name, x: F.layer_norm(x, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)
  linear = lambda name, x: F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])
  kernel = w["patch_embed.proj.weight"]
  x = F.conv2d(x, kernel, w["patch_embed.proj.bias"], stride=kernel.shape[-1])
  x = x.flatten(2).transpose(1, 2)
  x = torch.cat([w["cls_token"].expand(len(x), 1, WIDTH), x], dim=1) + w["pos_embed"]
  for i in range(DEPTH[part]):
    block = f"blocks.{i}."
    bias = [w[f"{block}attn.{name}_bias"] for name in "qv"]
    bias = torch.cat([bias[0], torch.zeros_like(bias[0]), bias[1]])
    y = F.linear(norm(f"{block}norm1", x), w[f"{block}attn.qkv.weight"], bias)
    q, k, v = y.reshape(len(x), -1, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
    x = x + linear(f"{block}attn.proj", y)
    y = F.gelu(linear(f"{block}mlp.fc1", norm(f"{block}norm2", x)))
    x = x + linear(f"{block}mlp.fc2", y)
  return norm("fc_norm", x)[:, 1:]


def weights(kind):
  if kind == "beit3":
    shapes = {f"encoder.{n}": tuple(x.shape) for n, x in Beit().state_dict().items()}
  else:
    shapes = vit_shapes("encoder", PATCH, CHANNELS)
  pixels = PATCH**2 * CHANNELS
  shapes |= vit_shapes("decoder", 1, DIM)
  for name, shape in {
    "encoder_post_processor.dense": (DIM, WIDTH),
    "decoder_post_processor.fc1": (WIDTH, WIDTH),
    "decoder_post_processor.fc2": (pixels, WIDTH),
  }.items():
    shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
  rng = np.random.default_rng(0)
  scale = lambda shape: 0.3 if len(shape) == 1 else 1 / np.sqrt(np.prod(shape[1:]))
  # Scales about one, all else about zero.
  middle = lambda n: float(n.endswith(".weight") and len(shapes[n]) == 1)
  return {
    n: (middle(n) + rng.normal(size=s) * scale(s)).astype(np.float32) for n, s in shapes.items()
  }


def their_loss(kind, w, media, probes):
  """Means, pixels and a loss of both, in float64; media are channels first."""
  if kind == "beit3":
    own = {n.removeprefix("encoder."): x for n, x in w.items() if n.startswith("encoder.")}
    features = torch.func.functional_call(Beit().double().eval(), own, (media,))
  else:
    features = vit(w, "encoder", media)
  linear = lambda name, x: F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])
  side = SIZE // PATCH
  means = linear("encoder_post_processor.dense", features)
  z = means.reshape(len(means), side, side, DIM).permute(0, 3, 1, 2)
  x = torch.tanh(linear("decoder_post_processor.fc1", vit(w, "decoder", z)))
  x = linear("decoder_post_processor.fc2", x).reshape(-1, side, side, CHANNELS, PATCH, PATCH)
  pixels = x.permute(0, 3, 1, 4, 2, 5).reshape(media.shape)
  return means, pixels, (means * probes[0]).sum() + (pixels * probes[1]).sum()


@pytest.mark.parametrize("kind", ["beit3", "vit"])
def test_outputs_and_gradients_are_the_releases(kind):
  state = weights(kind)
  imported = names.import_tokenizer(state, dict(num_heads=HEADS))
  config = latent_tokenizer.build_config(imported.model)
  model, rng = LatentTokenizer(config), np.random.default_rng(1)
  assert (config.body.encoder_kind, config.body.layers) == (kind, (2, 3))
  media = rng.uniform(-1, 1, (2, SIZE, SIZE, CHANNELS)).astype(np.float32)
  probes = [rng.normal(size=s).astype(np.float32) for s in ((2, COUNT, DIM), media.shape)]

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def ours(params):
    out = model.apply({"params": params}, jnp.asarray(media))
    loss = jnp.sum(out.means * probes[0]) + jnp.sum(out.reconstruction * probes[1])
    return loss, (out.means, out.reconstruction)

  (_, (means, pixels)), grads = ours(imported.params)
  w = {n: torch.tensor(x, dtype=torch.float64, requires_grad=True) for n, x in state.items()}
  first = lambda x: torch.tensor(x, dtype=torch.float64).permute(0, 3, 1, 2)
  probe = [torch.tensor(probes[0], dtype=torch.float64), first(probes[1])]
  want_means, want_pixels, loss = their_loss(kind, w, first(media), probe)
  loss.backward()
  np.testing.assert_allclose(means, want_means.detach(), rtol=1e-4, atol=1e-5)
  want_pixels = want_pixels.detach().permute(0, 2, 3, 1)
  np.testing.assert_allclose(pixels, want_pixels, rtol=1e-4, atol=1e-5)
  got = names.export_model(config, grads)
  assert got.keys() == w.keys()
  for name, x in w.items():
    # What nothing reads, and a bias of keys, which moves no softmax.
    want = np.zeros(x.shape) if x.grad is None else x.grad.numpy()
    bound = 1e-4 * max(np.abs(want).max(), 1.0)
    np.testing.assert_allclose(got[name], want, rtol=1e-4, atol=bound, err_msg=name)


@pytest.mark.parametrize("kind", ["beit3", "vit"])
def test_what_comes_out_is_what_came_in(kind):
  state = weights(kind)
  imported = names.import_tokenizer(state, dict(num_heads=HEADS, std=0.5))
  config = latent_tokenizer.build_config(imported.model)
  assert config.noise.std == 0.5
  back = names.export_model(config, imported.params)
  assert back.keys() == state.keys()
  for name, x in state.items():
    if name == "encoder.vision_embed.mask_token":
      x = np.zeros_like(x)
    if name == "encoder.encoder.embed_positions.weight":
      x = np.concatenate([np.zeros_like(x[:2]), x[2:]])
    np.testing.assert_array_equal(back[name], x, err_msg=name)
  again = names.import_like(back, config)
  jax.tree.map(np.testing.assert_array_equal, again, imported.params)
