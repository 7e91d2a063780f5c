"""The grid of solver steps and guidance: its cells, what they are made of, and runs that go on."""

import dataclasses
import json
import pathlib
import types

import numpy as np
import pytest

from experiments import solver_grid
from experiments.configs import quickstart_latent
from latentlab.layers.diffusion_head import Diffusion
from latentlab.layers.latent_heads import SolverSettings
from latentlab.sample import loop as sample_loop
from latentlab.train import loop

OPTIONS = solver_grid.Options(num_samples=12, features="pixels", split="validation")


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
  """Two seeds of a run of three steps, on one tokenizer."""
  home = tmp_path_factory.mktemp("grid")
  for seed in range(2):
    c = quickstart_latent.get_config(f"smoke,seed={seed}")
    c.data.update(cache_dir=str(home / "cache"), tokenizer_run=str(home / "tokenizer"))
    c.model.embed_dim, c.sample.num_samples, c.evals = 16, 0, {}
    c.train_steps = c.tokenizer.train_steps = 3  # Behind the warm-up.
    if not seed:
      loop.train(c.tokenizer, home / "tokenizer")
    loop.train(c, home / f"seed{seed}")
  return [str(home / f"seed{seed}") for seed in range(2)]


@pytest.fixture(scope="module")
def filled(workdirs, tmp_path_factory):
  """A grid of four cells and one run, and the programs that drew them."""
  path = tmp_path_factory.mktemp("filled") / "grid.json"
  grid = solver_grid.make_grid([1, 2], [1.5, 3.0], ["dpm_2m"])
  runs = solver_grid.load_runs(workdirs[:1], OPTIONS)
  before = sample_loop.begin._cache_size()
  result = solver_grid.fill(runs, grid, OPTIONS, path)
  return path, grid, result, sample_loop.begin._cache_size() - before


@pytest.mark.slow
def test_cells_are_the_evaluators_figures(filled, workdirs):
  """One cell again, by the evaluation that a config asks for; a program for all guidance."""
  path, grid, result, programs = filled
  assert programs == 2  # For each number of steps.
  run = solver_grid.load_runs(workdirs[:1], OPTIONS)["seed0"]
  evaluator = type(run.evaluator)(
    *(run.trained.task, run.trained.data, None),
    **dataclasses.asdict(OPTIONS),
    num_steps=2,
    guidance=3.0,
    reconstruction=True,
  )
  want = dict(evaluator.run(run.trained.params))
  got = result["cells"]["dpm_2m_s2_g3"]["runs"]["seed0"] | result["runs"]["seed0"]["limits"]
  for name, value in want.items():
    assert got[name] == pytest.approx(value, rel=1e-6), name
  assert got["std_ratio"] == pytest.approx(want["latent_std"] / want["real_latent_std"])
  positions = got["positions"]
  assert {len(x) for x in positions.values()} == {16}
  excess = np.subtract(positions["distance"], positions["distance_behind_real"])
  assert got["excess_second_half"] == pytest.approx(excess[8:].mean())
  assert json.loads(path.read_text())["cells"] == result["cells"]
  # More steps disperse more, whatever the model has learnt.
  ratio = lambda cell: result["cells"][cell]["mean"]["std_ratio"]["mean"]
  assert ratio("dpm_2m_s1_g1.5") < ratio("dpm_2m_s2_g1.5")


@pytest.mark.slow
def test_a_second_seed_is_added_and_nothing_is_drawn_twice(
  filled, workdirs, tmp_path, monkeypatch, capsys
):
  path, grid, first, _ = filled
  output = tmp_path / "grid"
  output.with_suffix(".json").write_text(path.read_text())
  drawn, measure = [], solver_grid.measure

  def record(run, settings):
    drawn.append((run.trained.config.seed, settings.num_steps, settings.guidance))
    return measure(run, settings)

  monkeypatch.setattr(solver_grid, "measure", record)
  both = solver_grid.draw_grid(workdirs, grid, OPTIONS, output)
  assert sorted(drawn) == [(1, s, g) for s in (1, 2) for g in (1.5, 3.0)]
  result = json.loads(output.with_suffix(".json").read_text())
  assert result == both
  assert output.with_suffix(".png").stat().st_size > 1000
  for name, cell in result["cells"].items():
    assert cell["runs"]["seed0"] == first["cells"][name]["runs"]["seed0"]
    found = [run["fd"] for run in cell["runs"].values()]
    assert cell["mean"]["fd"]["mean"] == pytest.approx(np.mean(found))
    # Student's t of one degree of freedom.
    half = 12.706 * np.std(found, ddof=1) / np.sqrt(2)
    assert cell["mean"]["fd"]["half_width"] == pytest.approx(half, rel=1e-3)
  of_two = [c for c in result["cells"].values() if c["num_steps"] == 2]
  fd, guidance = min((c["mean"]["fd"]["mean"], c["guidance"]) for c in of_two)
  assert result["best_guidance"]["dpm_2m_s2"] == dict(guidance=guidance, fd=fd)
  assert capsys.readouterr().out.count("| dpm_2m |") == 4
  solver_grid.draw_grid(workdirs, grid, OPTIONS, output)  # All is there.
  assert len(drawn) == 4


@pytest.mark.slow
def test_what_does_not_fit_is_named(filled, workdirs, tmp_path):
  path, grid, *_ = filled
  other = dataclasses.replace(OPTIONS, num_samples=13)
  runs = solver_grid.load_runs(workdirs[:1], OPTIONS)
  with pytest.raises(ValueError, match="cells of options with num_samples=12, not 13"):
    solver_grid.fill(runs, grid, other, path)
  changed = dataclasses.replace(runs["seed0"], about=dict(step=3, params_sha256="another"))
  with pytest.raises(ValueError, match="cells of seed0 with params_sha256="):
    solver_grid.fill({"seed0": changed}, grid, OPTIONS, path)
  with pytest.raises(ValueError, match="two runs of seed 0"):
    solver_grid.load_runs([workdirs[0], workdirs[0]], OPTIONS)
  tokenizer = str(pathlib.Path(workdirs[0]).parent / "tokenizer")
  with pytest.raises(ValueError, match="tokenizer: a generation is of a model over latents"):
    solver_grid.load_runs([tokenizer], OPTIONS)
  with pytest.raises(ValueError, match="no config.json"):
    solver_grid.load_runs([str(tmp_path)], OPTIONS)
  folder = tmp_path / "other"
  folder.mkdir()
  config = json.loads(pathlib.Path(workdirs[1], "config.json").read_text())
  config["latents"]["prompt_dropout"] = 0.2
  (folder / "config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match=r"they differ in \['latents.prompt_dropout'\]"):
    solver_grid.load_runs([workdirs[0], str(folder)], OPTIONS)


def test_cells_have_the_settings_of_their_names():
  grid = solver_grid.make_grid([1, 20], [1.0, 1.5], ["dpm_2m", "ddim"])
  assert len(grid) == 8
  assert grid["ddim_s20_g1.5"] == SolverSettings(guidance=1.5, solver="ddim", num_steps=20)


def test_steps_beyond_the_levels_are_named_before_anything_is_drawn(tmp_path):
  task = types.SimpleNamespace(diffusion=Diffusion(num_timesteps=10))
  run = solver_grid.Run(None, types.SimpleNamespace(task=task), None, {})
  grid = solver_grid.make_grid([5, 20], [1.0], ["ddim"])
  with pytest.raises(ValueError, match="--lambda_min, cell ddim_s20_g1: .*20"):
    solver_grid.fill({"seed0": run}, grid, OPTIONS, tmp_path / "grid.json")


@pytest.mark.parametrize(
  ("axes", "message"),
  [
    (([], [1.0], ["ddim"]), "--num_steps= must be different values, at least one"),
    (([1, 1], [1.0], ["ddim"]), "--num_steps=1,1 must be different"),
    (([0], [1.0], ["ddim"]), "num_steps=0 of a solver must be positive"),
    (([1], [1.0], ["euler"]), "unknown solver='euler'"),
  ],
)
def test_bad_axes_are_named(axes, message):
  with pytest.raises(ValueError, match=message):
    solver_grid.make_grid(*axes)
