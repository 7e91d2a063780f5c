"""Samplers of diffusion models, as tables of coefficients that one loop runs.

DDIM (https://arxiv.org/abs/2010.02502), DPM-Solver++ (https://arxiv.org/abs/2211.01095, multistep
and stochastic), the ancestral sampler of DDPM (https://arxiv.org/abs/2006.11239) and rectified
flow's Euler and midpoint rules (https://arxiv.org/abs/2209.03003). Each of them makes its next
vector linearly of the last one, of predicted latents and of noise, with factors that depend on the
levels alone, and these are computed in float64 before anything runs.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from latentlab.ops.diffusion import NoiseSchedule
from latentlab.typing import Array, Float, Key

SOLVERS = (
  "ddim",
  "dpm_2m",
  "dpm_2m_heun",
  "dpm_3m",
  "sde_2m",
  "ancestral",
  "ancestral_small",
  "flow_euler",
  "flow_midpoint",
)
"""Names; `ancestral` draws with the larger variance, as the release does, `ancestral_small` with
the smaller one."""

_FLOW = ("flow_euler", "flow_midpoint")


@dataclasses.dataclass(frozen=True, eq=False)
class SolverTable:
  """One row for each evaluation of the network.

  The next vector is `on_x x + on_start s + on_clean . (latents predicted, the newest first) +
  on_noise n`, where `s` is the vector at the start of a step of several evaluations.

  Attributes:
    t: Timestep of each evaluation.
    alpha: Its level.
    sigma: Its level.
    on_x: Factor of the last vector.
    on_start: Factor of the vector at the step's start.
    on_clean: Factors of the predicted latents.
    on_noise: Factor of fresh noise.
    ends: Whether the evaluation is its step's last.
  """

  t: Float[np.ndarray, "steps"]
  alpha: Float[np.ndarray, "steps"]
  sigma: Float[np.ndarray, "steps"]
  on_x: Float[np.ndarray, "steps"]
  on_start: Float[np.ndarray, "steps"]
  on_clean: Float[np.ndarray, "steps order"]
  on_noise: Float[np.ndarray, "steps"]
  ends: np.ndarray

  @property
  def stochastic(self) -> bool:
    return bool(self.on_noise.any())

  @property
  def num_evaluations(self) -> int:
    return len(self.t)


class Level(NamedTuple):
  """Where an evaluation is: its index, its timestep, and what is there of latent and noise."""

  index: Array
  t: Array
  alpha: Array
  sigma: Array


def sample_grid(
  schedule: NoiseSchedule, num_steps: int, lambda_min: float | None = None
) -> np.ndarray:
  """Timesteps of a sampler, the noisiest first: a rounded even grid, without 0.

  Args:
    schedule: The levels.
    num_steps: How many.
    lambda_min: Leaves out timesteps whose `ln(alpha / sigma)` lies below, where an error of
      predicted noise is magnified; none if `None`.

  Raises:
    ValueError: there are not as many timesteps.
  """
  last = schedule.num_timesteps - 1
  if lambda_min is not None:
    kept = np.flatnonzero(schedule.log_ratios >= lambda_min)
    if not kept.size:
      raise ValueError(f"{lambda_min=} leaves no timestep: {schedule.log_ratios.max()=}")
    last = int(kept[-1])
  if not 1 <= num_steps <= last:
    raise ValueError(f"{num_steps=} of a sampler must be in 1 ... {last}")
  return np.round(np.linspace(0, last, num_steps + 1)).astype(int)[:0:-1]


@functools.lru_cache(maxsize=64)
def solver_table(
  solver: str, schedule: NoiseSchedule, num_steps: int, lambda_min: float | None = None
) -> SolverTable:
  """A solver's table on a schedule's grid, which ends at the latent itself.

  Args:
    solver: One of `SOLVERS`.
    schedule: The levels.
    num_steps: Steps; `flow_midpoint` evaluates the network twice in each.
    lambda_min: See `sample_grid`.

  Raises:
    ValueError: the solver is unknown or not of this schedule, or `num_steps` is bad.
  """
  if solver in _FLOW and schedule.kind != "flow":
    raise ValueError(f"{solver=} goes along straight paths; {schedule.kind=} must be 'flow'")
  if solver.startswith("ancestral") and schedule.kind == "flow":
    raise ValueError(f"{solver=} has a variance of DDPM's schedules, not of {schedule.kind=}")
  t = sample_grid(schedule, num_steps, lambda_min)
  alpha, sigma = schedule.tables
  alpha, sigma = np.append(alpha[t], 1.0), np.append(sigma[t], 0.0)
  if solver == "flow_midpoint":
    return _midpoint(t, sigma, schedule.num_timesteps)
  return multistep_table(solver, t, alpha, sigma)


def multistep_table(
  solver: str,
  t: np.ndarray,
  alpha: Float[np.ndarray, "levels"],
  sigma: Float[np.ndarray, "levels"],
) -> SolverTable:
  """A table over levels of a caller's own; one evaluation for each step.

  Args:
    solver: One of `SOLVERS`, except `flow_midpoint`.
    t: Timestep of each level but the last.
    alpha: Levels from the noisiest on; the last one is the destination.
    sigma: Levels; 0 as the destination for the latent itself.

  Raises:
    ValueError: the solver is unknown, or levels do not get cleaner.
  """
  if solver not in SOLVERS or solver == "flow_midpoint":
    raise ValueError(f"unknown {solver=}; choose one of {SOLVERS}")
  alpha, sigma = np.asarray(alpha, np.float64), np.asarray(sigma, np.float64)
  with np.errstate(divide="ignore"):
    lam = np.log(alpha) - np.log(sigma)
  if len(t) + 1 != len(lam) or not (np.diff(lam) > 0).all():
    raise ValueError(f"levels must get cleaner, one more than {len(t)} timesteps: {lam=}")
  steps = len(t)
  zeros, next_alpha, next_sigma = np.zeros(steps), alpha[1:], sigma[1:]
  alpha, sigma = alpha[:-1], sigma[:-1]
  on_x, on_noise = next_sigma / sigma, zeros
  order = {"dpm_2m": 2, "dpm_2m_heun": 2, "sde_2m": 2, "dpm_3m": 3}.get(solver, 1)
  on_clean = np.zeros((steps, order))
  if solver.startswith("ancestral"):
    step = alpha / next_alpha  # Both at the destination: alpha_{t|s} and its variance.
    variance = sigma**2 - step**2 * next_sigma**2
    on_x = step * next_sigma**2 / sigma**2
    on_clean[:, 0] = next_alpha * variance / sigma**2
    small = variance * next_sigma**2 / sigma**2
    large = np.where(next_sigma > 0, variance, 0.0)
    on_noise = np.sqrt(large if solver == "ancestral" else small)
  elif solver == "sde_2m":
    decay = alpha * next_sigma / (next_alpha * sigma)  # exp(-h); 0 where h is infinite.
    on_x = on_x * decay
    on_clean[:] = (next_alpha * (1 - decay**2))[:, None] * _extrapolated(lam, order)
    on_noise = next_sigma * np.sqrt(1 - decay**2)
  elif solver in ("dpm_2m_heun", "dpm_3m"):
    on_clean[:] = _exact(lam, next_alpha, order)
  else:
    # alpha' (1 - exp(-h)), which is exact where h is infinite.
    on_clean[:] = (next_alpha - alpha * on_x)[:, None] * _extrapolated(lam, order)
  ends = np.ones(steps, bool)
  t = np.asarray(t, np.float64)
  return SolverTable(t, alpha, sigma, on_x, zeros, on_clean, on_noise, ends)


def run_solver(
  denoise: Callable[[Array, Level, Any], Array],
  x: Float[Array, "B *Z"],
  table: SolverTable,
  keys: Key[Array, " B"] | None = None,
  *,
  along: Any = None,
) -> Float[Array, "B *Z"]:
  """Runs a solver from noise.

  Args:
    denoise: From `x^t`, its level and that level's part of `along` to the predicted latent, guided
      if it is.
    x: What to start from, float32 (or float64).
    table: The solver.
    keys: One for each row, for stochastic solvers: a row's sample depends on no other row.
    along: Arrays with a leading axis of evaluations, made once for all rows.

  Raises:
    ValueError: `x` is rounded, or a stochastic solver has no keys.
  """
  if x.dtype not in (jnp.float32, jnp.float64):
    raise ValueError(f"{x.dtype=} is too coarse for a solver; give float32")
  if table.stochastic and keys is None:
    raise ValueError("a stochastic solver needs keys, one for each row")
  arrays = (table.t, table.alpha, table.sigma, table.on_x, table.on_start, table.on_noise)
  rows = (
    jnp.arange(table.num_evaluations),
    *(jnp.asarray(a, x.dtype) for a in (*arrays, table.on_clean)),
    jnp.asarray(table.ends),
    along,
  )
  order, in_stages = table.on_clean.shape[1], not table.ends.all()

  def step(carry, row):
    x, start, past = carry
    index, t, alpha, sigma, on_x, on_start, on_noise, on_clean, ends, here = row
    clean = denoise(x, Level(index, t, alpha, sigma), here).astype(x.dtype)
    past = (clean, *past)
    new = on_x * x + sum(on_clean[i] * past[i] for i in range(order))
    if table.stochastic:
      draw = lambda key: jax.random.normal(jax.random.fold_in(key, index), x.shape[1:], x.dtype)
      new = new + on_noise * jax.vmap(draw)(keys)
    if in_stages:
      new = new + on_start * start
      start = jnp.where(ends, new, start)
    return (new, start, past[: order - 1]), None

  first = (x, x if in_stages else None, (jnp.zeros_like(x),) * (order - 1))
  return jax.lax.scan(step, first, rows)[0][0]


def _extrapolated(lam: np.ndarray, order: int) -> np.ndarray:
  """Factors of the last latents: of one, 1; of two, the midpoint rule's `D + h/(2 h') (D - D')`.

  None of the older one in the first step, and in one to the latent itself, where h is infinite.
  """
  h = np.diff(lam)
  if order == 1:
    return np.ones((len(h), 1))
  ratio = np.zeros(len(h))
  finite = np.isfinite(h[1:])
  ratio[1:][finite] = h[1:][finite] / (2 * h[:-1][finite])
  return np.stack([1 + ratio, -ratio], axis=1)


def _exact(lam: np.ndarray, next_alpha: np.ndarray, order: int) -> np.ndarray:
  """Factors by which the polynomial through the last `order` latents is integrated exactly.

  `alpha' e^{-h} int_0^h e^u p(u) du`, where `p` is a polynomial of the log-ratio in Newton's form;
  of lower degree in the first steps, and constant in a step to the latent itself.
  """
  out = np.zeros((len(next_alpha), order))
  first_node = 0 if np.isfinite(lam[0]) else 1  # Pure noise is no node of a polynomial.
  for i, end in enumerate(next_alpha):
    h = lam[i + 1] - lam[i]
    out[i, 0] = end * -np.expm1(-h)
    degree = min(i - first_node, order - 1) if np.isfinite(h) else 0
    if degree < 1:
      continue
    # Integrals of 1, u and u (u + h') against e^u; nodes lie at 0, -h', -(h' + h'').
    first = end * (h + np.expm1(-h))
    back = lam[i] - lam[i - 1]
    out[i, :2] += first / back * np.array([1, -1])
    if degree == 2:
      second = end * (h**2 - 2 * h - 2 * np.expm1(-h)) + first * back
      nodes = lam[i - 2 : i + 1][::-1]
      divided = [1 / np.prod([a - b for b in nodes if b != a]) for a in nodes]
      out[i] += second * np.array(divided)
  return out


def _midpoint(t: np.ndarray, sigma: np.ndarray, num_timesteps: int) -> SolverTable:
  """Half a step of Euler's rule, then a whole one with the velocity found there."""
  here, there = sigma[:-1], sigma[1:]
  middle = (here + there) / 2
  pairs = lambda a, b: np.stack([a, b], axis=1).reshape(-1)
  levels = pairs(here, middle)
  # The velocity is (x - latent) / sigma, of the vector that it is evaluated at.
  slope = pairs(middle - here, there - here) / levels
  ends = np.arange(len(levels)) % 2 == 1
  return SolverTable(
    t=pairs(t.astype(np.float64), num_timesteps * middle - 1),
    alpha=1 - levels,
    sigma=levels,
    on_x=np.where(ends, slope, 1 + slope),
    on_start=ends.astype(np.float64),
    on_clean=-slope[:, None],
    on_noise=np.zeros(len(levels)),
    ends=ends,
  )
