"""Checkpoints: what is saved comes back, wherever it goes; what is damaged or foreign does not."""

import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from latentlab.train import checkpoint


def _state(seed=0, width=24):
  a, b, key = jax.random.split(jax.random.key(seed), 3)
  params = {
    "body": {"kernel": jax.random.normal(a, (40, width))},
    "head": {"kernel": jax.random.normal(b, (width, 100))},
  }
  return {
    "step": jnp.int32(seed),
    "params": params,
    "ema": None,
    "key": key,
    "opt_states": {"model": (jax.tree.map(jnp.ones_like, params), ())},
  }


def _abstract(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def _assert_equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      x, y = jax.random.key_data(x), jax.random.key_data(y)
    np.testing.assert_array_equal(x, y)


def _save(workdir, steps=(1, 2, 3), **options):
  with checkpoint.Checkpointer(workdir, keep_last=len(steps), **options) as c:
    for step in steps:
      c.save(step, _state(step), {"next_index": step}, {"validation/loss": 10.0 - step})


def test_saving_copies_on_several_devices_compiles_nothing(tmp_path):
  """Slices of them would have to be, for each shape, while the step waits."""
  compiled = []
  listen = lambda name, seconds, **_: compiled.append(name) if "compile" in name else None
  mesh = jax.make_mesh((8,), ("data",))
  copies = jax.device_put(_state()["params"], NamedSharding(mesh, P()))
  with checkpoint.Checkpointer(tmp_path) as c:
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
      c.save(1, dict(params=copies), {})
      c.wait()
    finally:
      jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled
    _assert_equal(c.restore(_abstract(dict(params=copies)))[1], dict(params=copies))


def test_arrays_of_numpy_are_kept(tmp_path):
  state = dict(table=np.arange(6.0, dtype=np.float32), count=np.int32(3))
  with checkpoint.Checkpointer(tmp_path) as c:
    c.save(1, state, {})
    c.wait()
    _, restored, _ = c.restore(_abstract(jax.tree.map(jnp.asarray, state)))
  _assert_equal(restored, state)


def test_round_trip_is_exact_and_survives_donation(tmp_path):
  state = _state(7)
  expected = jax.tree.map(lambda x: jnp.array(x, copy=True) if x.dtype == jnp.float32 else x, state)
  scrap = jax.jit(lambda p: jax.tree.map(jnp.zeros_like, p), donate_argnums=0)
  with checkpoint.Checkpointer(tmp_path) as c:
    c.save(7, state, {"next_index": 3})
    scrap(state["params"])  # The next step, while the checkpoint is still being written.
    c.wait()
    step, restored, iterator_state = c.restore(_abstract(expected))
  assert (step, iterator_state) == (7, {"next_index": 3})
  _assert_equal(restored, expected)


def test_restores_onto_another_mesh(tmp_path):
  _save(tmp_path)
  mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  state = _state(3)
  specs = jax.tree.map(lambda x: P("fsdp", "tensor") if x.ndim == 2 else P(), state)
  target = jax.tree.map(
    lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
    state,
    specs,
  )
  with checkpoint.Checkpointer(tmp_path) as c:
    restored = c.restore(target)[1]
  _assert_equal(restored, state)
  kernel = restored["params"]["body"]["kernel"]
  assert kernel.sharding.spec == P("fsdp", "tensor") and len(kernel.addressable_shards) == 8


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # TensorStore's.
@pytest.mark.parametrize("damage", ["half", "empty", "zeros"])
def test_damaged_newest_falls_back(tmp_path, damage, caplog):
  _save(tmp_path / "good", keep_best="validation/loss")
  files = [
    p.relative_to(tmp_path / "good")
    for p in (tmp_path / "good/checkpoints/3").rglob("*")
    if p.is_file()
  ]
  fell_back = set()
  for i, name in enumerate(files):
    workdir = tmp_path / str(i)
    shutil.copytree(tmp_path / "good", workdir)
    content = (workdir / name).read_bytes()
    (workdir / name).write_bytes(
      {"half": content[: len(content) // 2], "empty": b"", "zeros": bytes(len(content))}[damage]
    )
    with checkpoint.Checkpointer(workdir, keep_last=3, keep_best="validation/loss") as c:
      step, state, iterator_state = c.restore(_abstract(_state()))
      # Some files (commit marks, say) are read by nobody; then the newest must be whole.
      _assert_equal(state, _state(step))
      assert iterator_state == {"next_index": step}
      if step == 2:
        fell_back.add(name.relative_to("checkpoints/3").parts[0])
        assert c.steps() == [1, 2] and (workdir / "damaged_checkpoints/3").is_dir()
        c.save(3, state, iterator_state)  # Its name is free again.
  assert fell_back == {"state", "iterator", "metrics"}
  assert "Falling back to the checkpoint of step 2" in caplog.text


def test_all_damaged_is_an_error_and_moves_nothing(tmp_path):
  _save(tmp_path)
  for file in tmp_path.glob("checkpoints/*/iterator/metadata"):
    file.write_text("{")
  with checkpoint.Checkpointer(tmp_path) as c:
    with pytest.raises(checkpoint.UnreadableError, match="damaged"):
      c.restore(_abstract(_state()))
    assert c.steps() == [1, 2, 3]


def test_half_written_is_ignored(tmp_path):
  _save(tmp_path)
  leftover = tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp"
  shutil.copytree(tmp_path / "checkpoints" / "3", leftover)
  with checkpoint.Checkpointer(tmp_path) as c:
    assert c.restore(_abstract(_state()))[0] == 3
    assert not leftover.exists()


@pytest.mark.parametrize(
  "change, name, expected, found",
  [
    (
      lambda s: s | {"params": _state(width=16)["params"]},
      "params/body/kernel",
      "float32[40, 16]",
      "float32[40, 24]",
    ),
    (
      lambda s: s | {"params": s["params"] | {"extra": jnp.zeros(3)}},
      "params/extra",
      "float32[3]",
      "nothing",
    ),
    (
      lambda s: s | {"params": {"body": s["params"]["body"]}},
      "params/head/kernel",
      "nothing",
      "float32[24, 100]",
    ),
    (lambda s: s | {"step": jnp.float32(0)}, "step", "float32[]", "int32[]"),
  ],
  ids=["shape", "missing", "unused", "dtype"],
)
def test_another_model_is_an_error_that_names_the_first_difference(
  tmp_path, change, name, expected, found
):
  _save(tmp_path)
  with checkpoint.Checkpointer(tmp_path) as c:
    with pytest.raises(
      ValueError, match=re.escape(f"{name!r}: expected {expected}, found {found}")
    ):
      c.restore(_abstract(change(_state())))
    assert c.steps() == [1, 2, 3]  # It is not damaged.


@pytest.mark.parametrize(
  "mode, losses, best",
  [("min", (3.0, 1.0, 2.0, 4.0), 2), ("max", (3.0, 9.0, 2.0, float("nan")), 2)],
)
def test_keeps_the_last_and_the_best(tmp_path, mode, losses, best):
  options = dict(keep_last=1, keep_best="eval/validation/loss", best_mode=mode)
  with checkpoint.Checkpointer(tmp_path, **options) as c:
    for step, loss in enumerate(losses, 1):
      metrics = {"validation/loss": loss}
      assert c.is_best(metrics) == (step in (1, best))
      c.save(step, _state(step), {}, metrics)
    c.save(5, _state(5), {})  # Not evaluated: kept only while it is the newest.
    c.save(6, _state(6), {})
  with checkpoint.Checkpointer(tmp_path, **options) as c:  # A run that resumes knows as much.
    assert c.steps() == [best, 6] and c.best_step() == best
    assert not c.is_best({"validation/loss": losses[best - 1]})
    _assert_equal(c.restore(_abstract(_state()), best)[1], _state(best))
  with checkpoint.Checkpointer(tmp_path, read_only=True) as c:
    with pytest.raises(ValueError, match="keep_best"):
      c.best_step()
    with pytest.raises(ValueError, match=r"there are \[2, 6\]"):
      c.restore(_abstract(_state()), 4)


def test_restores_a_part(tmp_path):
  _save(tmp_path)
  with checkpoint.Checkpointer(tmp_path, read_only=True) as c:
    part = c.restore({"params": _abstract(_state()["params"])}, partial=True)[1]
  _assert_equal(part, {"params": _state(3)["params"]})


def test_init_from_renames_and_keeps_what_is_new(tmp_path):
  _save(tmp_path)
  source, fresh = _state(3)["params"], _state(9)["params"]
  target = {"trunk": fresh["body"], "adapter": {"a": jnp.ones(2)}}
  restored = checkpoint.restore_params(
    tmp_path, target, renames=[("^body/", "trunk/"), ("^head/.*", "")], new=["adapter/.*"]
  )
  _assert_equal(restored, {"trunk": source["body"], "adapter": target["adapter"]})


@pytest.mark.parametrize(
  "options, message",
  [
    ({}, r"Missing .*: \['trunk/kernel'\].*Unused .*: \['body/kernel', 'head/kernel'\]"),
    (dict(new=["trunk"]), "Missing"),  # A pattern matches whole paths.
    (dict(renames=[("body|head", "trunk")]), "the name 'trunk/kernel'"),
    (
      dict(renames=[("head", "trunk"), ("body.*", "")]),
      r"expected float32\[40, 24\], found float32",
    ),
  ],
  ids=["missing_and_unused", "new_matches_whole", "collision", "shape"],
)
def test_init_from_is_strict(tmp_path, options, message):
  _save(tmp_path)
  with pytest.raises(ValueError, match=message):
    checkpoint.restore_params(tmp_path, {"trunk": _state()["params"]["body"]}, **options)


def test_follows_no_links(tmp_path):
  _save(tmp_path / "a")
  _save(tmp_path / "b", steps=(1,))
  (tmp_path / "b/checkpoints/2").symlink_to(tmp_path / "a/checkpoints/2")
  with checkpoint.Checkpointer(tmp_path / "b") as c:
    with pytest.raises(ValueError, match="symbolic link"):
      c.restore(_abstract(_state()))
  assert (tmp_path / "a/checkpoints/2").is_dir()


def test_missing_workdir_and_bad_options(tmp_path):
  with pytest.raises(ValueError, match="train there first"):
    checkpoint.Checkpointer(tmp_path / "none", read_only=True)
  with pytest.raises(ValueError, match="best_mode='lowest'"):
    checkpoint.Checkpointer(tmp_path, best_mode="lowest")
  with pytest.raises(ValueError, match="keep_last=0"):
    checkpoint.Checkpointer(tmp_path, keep_last=0)
