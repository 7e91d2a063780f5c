import dataclasses

import latent_cases as cases
import numpy as np
import pytest

from latentlab.data import latent_store, mixed


def _row(data, row=0, split="train"):
  batch = data.splits[split].rows(np.array([row]))
  return {name: x[0] for name, x in batch.items()}


def test_a_class_and_its_latents(tmp_path):
  data = cases.data(tmp_path / "s")
  row, item = _row(data, 1), data.store.splits["train"].item(1)
  special = data.documents.tokens
  assert row["inputs"].tolist() == [special.class_token(1)] + [special.latent(0)] * 3
  assert row["kinds"].tolist() == [0, 1, 1, 1] and row["next_kinds"].tolist() == [1, 1, 1, 1]
  assert row["modes"].tolist() == [1] * 4 and row["droppable"].tolist() == [True] + [False] * 3
  assert not row["weights"].any()  # Nothing for the softmax to learn.
  np.testing.assert_array_equal(row["next_latents/image"], item.means)
  np.testing.assert_array_equal(row["latents/image"][1:], item.means[:-1])


def test_text_opens_and_closes_a_run(tmp_path):
  data = cases.data(tmp_path / "s", "text", "token", counts=(2,) * 6)
  row, special = _row(data, 1), data.documents.tokens
  bos, begin, end, latent = 256, special.begin(0), special.end(0), special.latent(0)
  text = [ord(c) for c in "bcd"]
  items = [bos, *text, begin, latent, latent, end, bos]
  places = len(items) - 1
  assert row["inputs"].tolist() == [*items[:-1], *[257] * (len(row["inputs"]) - places)]
  assert row["targets"][:places].tolist() == items[1:]
  assert row["weights"][:places].tolist() == [1] * places  # "Another one" and the end included.
  assert row["kinds"][:places].tolist() == [0] * 5 + [1, 1, 0]
  assert row["modes"][:places].tolist() == [0] * 4 + [1, 1, 1, 0]
  assert row["droppable"][:places].tolist() == [False, True, True, True] + [False] * 4
  assert row["segment_ids"].tolist() == [1] * places + [0] * (len(row["inputs"]) - places)


def test_a_fixed_run_leaves_its_end_to_the_length(tmp_path):
  row = _row(cases.data(tmp_path / "s", "text", "fixed", counts=(2,) * 6), 0)
  # Of `<bos> a <begin> z z <end> <bos>`, the softmax learns `a`, `<begin>`, and the last `<bos>`.
  assert row["weights"][:6].tolist() == [1, 1, 0, 0, 0, 1]


def test_captions_follow_their_image(tmp_path):
  data = cases.data(tmp_path / "s", "caption", "token", counts=(2,) * 6)
  row, special = _row(data, 0), data.documents.tokens
  latent = special.latent(0)
  want = [256, special.begin(0), latent, latent, special.end(0), ord("a")]
  assert row["inputs"][:6].tolist() == want and row["targets"][5] == 256
  assert not row["droppable"].any()


def test_both_has_each_item_twice(tmp_path):
  data = cases.data(tmp_path / "s", "both", "token", counts=(2,) * 6, documents_per_row=1)
  assert data.training.num_rows == 12
  first, second = _row(data, 2), _row(data, 3)
  assert first["inputs"][1] == data.documents.tokens.begin(0) and second["inputs"][1] == ord("b")
  np.testing.assert_array_equal(
    first["latents/image"][first["kinds"] > 0], second["latents/image"][second["kinds"] > 0]
  )


def test_rows_are_packed_with_what_surely_fits(tmp_path):
  data = cases.data(tmp_path / "s", counts=(3, 2, 3, 1, 3, 2), seq_length=8, noise=None)
  row = _row(data, 0)
  assert data.summary["documents_per_row"] == 2 and data.training.num_rows == 3
  assert row["segment_ids"].tolist() == [1, 1, 1, 2, 2, 0, 0, 0]
  assert not data.summary["equal_lengths"]


def test_runs_are_as_long_as_the_media(tmp_path):
  store = cases.store(tmp_path / "s")
  padded = dataclasses.replace(store, meta=store.meta | dict(num_latents=9))  # Sounds of a half.
  config = mixed.LatentDataConfig()
  data = mixed.build(config, padded, cases.tokens("class"), "fixed", 2)
  assert data.summary["num_latents"] == 4 and data.summary["equal_lengths"]


@pytest.mark.parametrize("condition", ["text", "caption", "both"])
def test_media_without_texts_are_an_error_where_texts_are_learnt(tmp_path, condition):
  items = [latent_store.LatentItem(np.zeros((2, cases.DIM), np.float32), 0)]
  meta = dict(key="k", dim=cases.DIM, noise=cases.NOISE)
  store = latent_store.write(tmp_path / "s", {"train": items}, meta)
  config = mixed.LatentDataConfig(condition=condition)
  with pytest.raises(ValueError, match=f"{condition!r} needs texts of items.*class_captions"):
    mixed.build(config, store, cases.tokens(condition), "token", 2)


def test_the_iterator_resumes(tmp_path):
  cases.check_resume(cases.data(tmp_path / "s", batch_size=2))


def test_two_processes_make_one_batch(tmp_path):
  data = cases.data(tmp_path / "s", batch_size=4)
  parts = [dataclasses.replace(data, process_index=i, process_count=2) for i in range(2)]
  want = next(data.train_iterator(0))
  got = [next(part.train_iterator(0)) for part in parts]
  for name, x in want.items():
    np.testing.assert_array_equal(np.concatenate([g[name] for g in got]), x)


def test_the_store_knows_its_moments_and_its_damage(tmp_path):
  store = cases.store(tmp_path / "s")
  means = np.asarray(store.splits["train"].means, np.float64)
  assert store.meta["mean"] == pytest.approx(means.mean())
  assert store.meta["std"] == pytest.approx(np.sqrt(means.var() + (0.5 / 0.8) ** 2))
  np.save(tmp_path / "s/train.means.npy", means[:-1])
  with pytest.raises(ValueError, match="damaged; delete the folder"):
    _ = latent_store.read(tmp_path / "s").splits
  with pytest.raises(ValueError, match="holds no latents"):
    latent_store.read(tmp_path)


def test_noise_on_a_sphere_adds_nothing_to_the_moments(tmp_path):
  noise = cases.NOISE | dict(kind="fixed", on_sphere=True)
  store = cases.store(tmp_path / "s", noise=noise)
  means = np.asarray(store.splits["train"].means, np.float64)
  assert store.meta["std"] == pytest.approx(means.std())


def test_two_processes_may_write_the_same_latents(tmp_path):
  def items():
    yield latent_store.LatentItem(np.ones((2, cases.DIM), np.float32))
    cases.store(tmp_path / "s")  # Another process is done first.

  written = latent_store.write(tmp_path / "s", {"train": items()}, {"noise": cases.NOISE})
  assert len(written.splits["train"]) == 6
  assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_a_failed_write_leaves_nothing(tmp_path):
  def items():
    yield latent_store.LatentItem(np.full((2, cases.DIM), np.nan, np.float32))

  with pytest.raises(ValueError, match="item 0 of split 'train' has latents that are not finite"):
    latent_store.write(tmp_path / "s", {"train": items()}, {"noise": cases.NOISE})
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (dict(condition="poem"), "data.condition='poem' is unknown"),
    (dict(seq_length=3), "data.seq_length=3 has no room"),
    (dict(documents_per_row=2, seq_length=7), "documents_per_row=2 documents of up to 4 items"),
    (dict(max_text=-1), "data.max_text=-1 must not be negative"),
    (dict(batch_size=0), "batch_size=0 must be a positive multiple"),
  ],
)
def test_bad_fields(tmp_path, fields, message):
  with pytest.raises(ValueError, match=message):
    cases.data(tmp_path / "s", **fields)


def test_unknown_fields():
  with pytest.raises(ValueError, match=r"config.data has no field \['media_path'\]"):
    mixed.LatentDataConfig.of(dict(source="latents", media_path=""))
