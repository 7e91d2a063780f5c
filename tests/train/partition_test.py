"""One training run under every layout: equal parameters, and the communication each should have."""

import ast
import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from latentlab.train import partition
from latentlab.train.state import TrainState
from latentlab.train.task import Group, LanguageModelTask
from latentlab.train.tasks import build_task

VOCAB, LENGTH, ROWS = 64, 16, 16
MODELS = {
  "transformer": dict(num_kv_heads=2),
  "retnet": dict(chunk_size=4),
  "diff_transformer": dict(num_kv_heads=2, init="fan_in"),
  "yoco": dict(num_kv_heads=2, self_attention="sliding_window", window=3),
}
LAYOUTS = {
  "data": dict(data=8),
  "fsdp": dict(data=2, fsdp=4),
  "tensor": dict(data=2, fsdp=2, tensor=2),
  "mixed": dict(fsdp=2, tensor=2, seq=2),
  "seq": dict(data=2, seq=4),
  "pmap": dict(data=8),
}


def _config(model="transformer", layout="data", optimizer="sgd", **fields):
  config = ml_collections.ConfigDict(
    dict(
      model=dict(name=model, num_layers=2, embed_dim=32, num_heads=4, unroll=1, **MODELS[model]),
      parallelism="pmap" if layout == "pmap" else "jit",
      mesh=LAYOUTS.get(layout, {"data": 1}),
      axis_rules=(),
      train_steps=20,
      optimizer=dict(
        name=optimizer, peak_lr=1e-3, schedule="constant", warmup_steps=4, accumulate_steps=1
      ),
      task=dict(type="language_model"),
    )
  )
  config.update_from_flattened_dict(fields)
  return config


def _trainer(config, task=None):
  devices = jax.devices()[:1] if dict(config.mesh) == {"data": 1} else None
  return partition.make_trainer(task or build_task(config, VOCAB), config, devices)


def _batch(seed, rows=ROWS):
  """Packed documents of tokens that mostly count up, so that there is something to learn."""
  rng = np.random.default_rng(seed)
  tokens = np.cumsum(rng.integers(0, 3, (rows, LENGTH + 1)), axis=1).astype(np.int32) % VOCAB
  cuts = rng.integers(1, LENGTH, (rows, 1))
  columns = np.arange(LENGTH)[None]
  return {
    "inputs": tokens[:, :-1],
    "targets": tokens[:, 1:],
    "segment_ids": (columns >= cuts).astype(np.int32),
    "positions": np.where(columns < cuts, columns, columns - cuts).astype(np.int32),
    "weights": (rng.uniform(0, 2, (rows, LENGTH)) * (columns != cuts - 1)).astype(np.float32),
  }


def _copy(tree):
  return jax.tree.map(lambda x: np.array(x, copy=True), tree)


def _sgd_or_adam():
  """Both optimisers in one program, which halves the compilations: the state says which."""
  # At rates ten times as high, RetNet's head norm amplifies a rounding past any tolerance.
  sgd, adam = optax.sgd(0.02), optax.adam(1e-3)

  def update(grads, state, params):
    use_adam, adam_state = state
    slow, adam_state = adam.update(grads, adam_state, params)
    fast, _ = sgd.update(grads, sgd.init(params))
    return jax.tree.map(functools.partial(jnp.where, use_adam), slow, fast), (use_adam, adam_state)

  return optax.GradientTransformation(lambda params: (jnp.array(False), adam.init(params)), update)


class _Task(LanguageModelTask):
  @functools.cached_property
  def groups(self):
    constant = optax.constant_schedule(1.0)
    return (Group("model", self.loss, _sgd_or_adam(), constant),)


@dataclasses.dataclass(frozen=True)
class _Run:
  """A trained run.

  Attributes:
    first: Its initial parameters.
    results: By optimiser, the trained ones and the last loss.
    trainer: Its trainer.
    state: Its last state, on the devices.
  """

  first: dict
  results: dict
  trainer: partition.Trainer
  state: TrainState

  @functools.cached_property
  def program(self):
    """The step as compiled, which a `jit` that was called holds already."""
    return _compiled_step(self.trainer, self.state)


def _compiled_step(trainer, state):
  return trainer.lower(state, trainer.place(_batch(0))).compile().as_text()


@functools.cache
def _run(model, layout, accumulate_steps=1, optimizers=("sgd", "adam")):
  """Trains for twenty steps with each optimiser."""
  config = _config(model, layout, **{"optimizer.accumulate_steps": accumulate_steps})
  trainer = _trainer(config, _Task(build_task(config, VOCAB).model, config))
  results = {}
  for optimizer in optimizers:
    state = trainer.init(jax.random.key(0))
    first = _copy(state.params)
    flag, moments = state.opt_states["model"]
    flag = jax.device_put(np.array(optimizer == "adam"), flag.sharding)
    state = state.replace(opt_states={"model": (flag, moments)})
    for i in range(20):
      state, metrics = trainer.step(state, trainer.place(_batch(i)))
    results[optimizer] = _copy(state.params), float(metrics["loss"])
  assert trainer.num_compilations() == 1
  return _Run(first, results, trainer, state)


def _difference(got, want):
  """Largest relative difference of any parameter."""
  norm = np.linalg.norm
  ratios = jax.tree.map(lambda a, b: norm(a - b) / max(norm(b), 1e-3), got, want)
  return max(jax.tree.leaves(ratios))


@pytest.mark.slow
@pytest.mark.parametrize(
  "model, layout",
  [
    *itertools.product(("transformer", "retnet"), LAYOUTS),
    ("yoco", "mixed"),
    ("diff_transformer", "mixed"),
  ],
)
def test_every_layout_trains_to_equal_parameters(model, layout):
  want, got = _run(model, "one device"), _run(model, layout)
  jax.tree.map(np.testing.assert_array_equal, got.first, want.first)
  for optimizer, tolerance in (("sgd", 1e-5), ("adam", 1e-4)):
    (params, loss), (want_params, want_loss) = got.results[optimizer], want.results[optimizer]
    assert _difference(params, want_params) < tolerance, optimizer
    assert _difference(params, got.first) > 100 * tolerance, optimizer  # It learned something.
    np.testing.assert_allclose(loss, want_loss, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp", "pmap"])
def test_accumulation_equals_the_whole_batch_on_a_mesh(layout):
  want = _run("transformer", "one device")
  got = _run("transformer", layout, accumulate_steps=2, optimizers=("sgd",))
  assert _difference(got.results["sgd"][0], want.results["sgd"][0]) < 1e-5


def _collectives(program, shapes=r".*?"):
  """Counts the collectives of a compiled step, those of arrays of some shapes."""
  kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
  names = re.findall(rf"= {shapes} ({kinds})(?:-start)?\(", program)
  return {name: names.count(name) for name in set(names)}


def _share_on_one_device(params):
  """Returns the share of the parameters' bytes that the first device holds."""
  leaves = jax.tree.leaves(params)
  return sum(x.addressable_shards[0].data.nbytes for x in leaves) / sum(x.nbytes for x in leaves)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["data", "pmap"])
def test_data_parallelism_only_reduces(layout):
  run = _run("retnet", layout)
  assert _collectives(run.program).keys() == {"all-reduce"}
  assert _share_on_one_device(run.state.params) == 1


@pytest.mark.slow
def test_fsdp_gathers_parameters_that_lie_in_shards():
  run = _run("transformer", "fsdp")
  found = _collectives(run.program)
  assert found["all-gather"] > 0
  assert found.keys() & {"reduce-scatter", "all-reduce"}
  assert _share_on_one_device(run.state.params) < 1.01 / 4
  # Adam's count is on every device.
  assert _share_on_one_device(run.state.opt_states) < 1.05 / 4


@pytest.mark.slow
def test_tensor_parallelism_reduces_activations():
  trainer = _trainer(_config(mesh={"tensor": 2, "data": 4}))
  found = _collectives(_compiled_step(trainer, trainer.abstract_state))
  plain = _collectives(_run("transformer", "data").program)
  assert found["all-reduce"] > plain["all-reduce"]
  assert _share_on_one_device(_run("transformer", "tensor").state.params) < 0.55 / 2


@pytest.mark.slow
@pytest.mark.parametrize(
  "model, collective", [("transformer", "all-gather"), ("retnet", "collective-permute")]
)
def test_a_sharded_sequence_gathers_keys_or_passes_states(model, collective):
  assert _collectives(_run(model, "seq").program).get(collective, 0) > 0


def test_yoco_09_a_sharded_sequence_gathers_the_shared_keys_once():
  """Of arrays `B S K H`; the self-decoder's scanned layers pass theirs on, there and back."""
  trainer = _trainer(_config("yoco", "seq", **{"model.num_layers": 6}))
  program = _compiled_step(trainer, trainer.abstract_state)
  found = _collectives(program, shapes=r"\(?f32\[\d+,\d+,\d+,\d+\].*?")
  assert found == {"all-gather": 1, "reduce-scatter": 1, "collective-permute": 2}


@pytest.mark.parametrize("layout", ["mixed", "pmap"])
def test_a_step_compiles_once_donates_its_state_and_transfers_nothing(layout):
  compiled = []

  def listen(event, seconds, **kwargs):
    if event == "/jax/core/compile/backend_compile_duration":
      compiled.append(event)

  config = _config(
    "retnet", layout, "adamw", **{"optimizer.weight_decay": 0.1, "optimizer.ema_decay": 0.9}
  )
  trainer = _trainer(config)
  state = trainer.init(jax.random.key(0))
  for i in range(4):
    batch, old = trainer.place(_batch(i)), state
    if i == 1:
      jax.monitoring.register_event_duration_secs_listener(listen)
    with jax.transfer_guard("disallow"):
      state, metrics = trainer.step(state, batch)
    # The key is not changed, so pmap, which takes its words, leaves it.
    assert all(x.is_deleted() for x in jax.tree.leaves(old.replace(key=None)))
  jax.monitoring.unregister_event_duration_listener(listen)
  assert trainer.num_compilations() == 1 and not compiled
  assert np.isfinite(metrics["loss"]) and state.step == 4
  describe = lambda x: (x.shape, x.dtype)
  assert jax.tree.map(describe, state) == jax.tree.map(describe, trainer.abstract_state)
  assert all(
    x.sharding.is_equivalent_to(y.sharding, x.ndim)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(trainer.abstract_state), strict=True)
  )


def test_optimizer_and_average_lie_like_their_parameters():
  config = _config(layout="mixed", optimizer="muon", **{"optimizer.ema_decay": 0.9})
  state = _trainer(config).abstract_state
  specs = lambda tree: jax.tree.map(lambda x: x.sharding.spec, tree)
  params = specs(state.params)
  assert specs(state.ema) == params
  flat = {jax.tree_util.keystr(path): spec for path, spec in jax.tree.leaves_with_path(params)}
  moments = 0
  for path, spec in jax.tree.leaves_with_path(specs(state.opt_states)):
    owner = [p for p in flat if jax.tree_util.keystr(path).endswith(p)]
    assert spec == (flat[owner[0]] if owner else P())
    moments += len(owner)
  assert moments >= len(flat)
  assert {axis for spec in flat.values() for axis in spec} >= {"fsdp", "tensor"}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["mixed", "pmap"])
def test_an_evaluation_compiles_for_the_layout(layout):
  task = build_task(_config("transformer", layout), VOCAB)
  trainer, params = _run("transformer", layout).trainer, _run("transformer", layout).state.params
  rows = trainer.compile(lambda params, batch: task.loss(params, batch, jax.random.key(0)))
  terms = rows(params, _batch(0))
  want = jax.jit(task.loss)(_copy(params), _batch(0), jax.random.key(0))
  np.testing.assert_allclose(terms.total, want.total, rtol=1e-5)
  assert terms.total.is_fully_replicated


@pytest.mark.parametrize(
  "sizes, shape",
  [
    (dict(data=-1), (8, 1, 1, 1)),
    (dict(data=2, fsdp=-1, seq=2), (2, 2, 1, 2)),
    (dict(data=1, fsdp=2, tensor=2, seq=2), (1, 2, 2, 2)),
  ],
)
def test_mesh_sizes(sizes, shape):
  mesh = partition.make_mesh(sizes)
  assert tuple(mesh.shape.values()) == shape and mesh.axis_names == partition.MESH_AXES
  assert mesh.axis_types == (jax.sharding.AxisType.Auto,) * 4


@pytest.mark.parametrize(
  "sizes, message",
  [
    (dict(data=3), "takes 3 devices, but there are 8"),
    (dict(data=-1, tensor=3), "takes 6 devices, but there are 8"),
    (dict(data=-1, fsdp=-1), "-1 at most once"),
    (dict(data=0), "positive sizes"),
    (dict(data=-1, model=2), r"config.mesh has \['model'\]"),
  ],
)
def test_bad_meshes_are_errors(sizes, message):
  with pytest.raises(ValueError, match=message):
    partition.make_mesh(sizes)


def test_rules_can_be_overridden():
  config = _config(mesh={"tensor": 2, "fsdp": 4}, axis_rules=(("mlp", None), ("vocab", "fsdp")))
  specs = {x.sharding.spec for x in jax.tree.leaves(_trainer(config).abstract_state.params)}
  axes = {axis for spec in specs for axis in spec}
  assert "tensor" in axes and dict(_trainer(config).rules)["mlp"] is None
  with pytest.raises(ValueError, match=r"'mlp' to \['model'\].*'tensor'"):
    partition.make_rules((("mlp", "model"),))
  with pytest.raises(ValueError, match="pairs"):
    partition.make_rules(("mlp",))


@pytest.mark.parametrize(
  "fields, message",
  [
    (
      {"mesh": {"tensor": 8}},
      r"Dimension \d \('(kv_)?heads'\) of parameter '.*_proj/kernel' has "
      r"size \d.*8 devices of mesh axes tensor.*axis_rules",
    ),
    ({"parallelism": "pmap", "mesh": {"data": 4, "tensor": 2}}, "pmap.*data parallelism only"),
    ({"parallelism": "xmap"}, r"parallelism='xmap'.*\['jit', 'pmap'\]"),
    ({"task.type": "vision"}, r"task.type='vision'.*language_model"),
  ],
)
def test_layouts_that_do_not_fit_are_errors(fields, message):
  with pytest.raises(ValueError, match=message):
    _trainer(_config(**fields))


@pytest.mark.parametrize(
  "model, sizes",
  [("retnet", dict(num_heads=2)), ("transformer", dict(num_heads=4, num_kv_heads=2))],
)
def test_the_remedy_for_heads_that_do_not_divide_is_enough(model, sizes):
  config = _config(model, mesh=dict(data=2, tensor=4))
  config.model.update(sizes)
  for _ in range(3):
    try:
      trainer = _trainer(config)
      break
    except ValueError as e:
      given = str(e).rpartition("config.axis_rules=")[2].removesuffix(".")
      config.axis_rules = (*config.axis_rules, *ast.literal_eval(given))
  assert ("act_kv_heads" if model == "transformer" else "act_heads") in str(config.axis_rules)
  state = trainer.init(jax.random.key(0))
  assert np.isfinite(trainer.step(state, trainer.place(_batch(0)))[1]["loss"])


def test_a_logical_axis_without_a_rule_is_an_error():
  class Odd(nn.Module):
    @nn.compact
    def __call__(self, tokens):
      init = nn.with_logical_partitioning(nn.initializers.ones, ("colour",))
      return self.param("scale", init, (8,))

  config = _config()
  with pytest.raises(ValueError, match=r"'scale' has the logical axes \['colour'\].*axis_rules"):
    _trainer(config, LanguageModelTask(Odd(), config))


@pytest.mark.parametrize(
  "layout, rows, length, message",
  [
    ("data", 12, LENGTH, "batch_size=12 must be a multiple of 8"),
    ("pmap", 12, LENGTH, "batch_size=12 must be a multiple of 8"),
    ("seq", 16, 6, "sequence length of 6 must be a multiple of 4"),
  ],
)
def test_batches_that_do_not_divide_are_errors(layout, rows, length, message):
  trainer = _trainer(_config(layout=layout))
  with pytest.raises(ValueError, match=message):
    trainer.place({name: x[:, :length] for name, x in _batch(0, rows).items()})
  assert math.prod(trainer.mesh.shape.values()) == 8
