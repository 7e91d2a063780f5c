"""The training loop: one for every task, one that resumes."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
import pathlib
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tqdm
import tqdm.contrib.logging
from jax.experimental import multihost_utils

from latentlab import data as data_lib
from latentlab import eval as eval_lib
from latentlab.data import files
from latentlab.train import checkpoint, latents, metrics, partition, plots
from latentlab.train.state import TrainState
from latentlab.train.task import RunTask
from latentlab.train.tasks import build_task
from latentlab.train.workdir_files import CONFIG, CORPUS, TOKENIZER, read_config, saved
from latentlab.typing import Params

logger = logging.getLogger(__name__)

# An iterator's state is a number of global batches, which means nothing when these change.
_BATCH_FIELDS = (
  "batch_size",
  "seed",
  *(f"data.{name}" for name in ("seq_length", "packing", "condition", "documents_per_row")),
  "data.repeats",
)

PREEMPTED_EXIT_CODE = 75
"""Exit status after SIGTERM: the state is saved, and the same command goes on (EX_TEMPFAIL)."""


class Preempted(SystemExit):
  """The run was told to stop, saved its state, and ends the process with its exit code."""

  def __init__(self, step: int):
    super().__init__(PREEMPTED_EXIT_CODE)
    self.step = step


class DivergedError(ValueError):
  """More steps in a row than allowed had a loss or gradient that is not finite."""


def train(config: ml_collections.ConfigDict, workdir: str | pathlib.Path) -> dict[str, float]:
  """Trains from wherever the run stands to `config.train_steps`.

  The run starts from the first of these that there is: the newest checkpoint of `workdir`, that of
  the workdir `config.resume` (the whole state), the parameters of the workdir `config.init_from`,
  nothing.

  Args:
    config: An experiment; see `experiments/configs/common.py`.
    workdir: Gets `config.json`, `corpus.json`, `tokenizer.json`, `metrics.jsonl`, `checkpoints/`
      and `plots/`.

  Returns:
    The last value of every metric.

  Raises:
    ValueError: the config, the data or the checkpoint does not fit; before anything is compiled.
    DivergedError: the loss stayed non-finite.
    Preempted: SIGTERM arrived, on this host or another.
  """
  return _train(config, workdir).latest


def _train(config: ml_collections.ConfigDict, workdir: str | pathlib.Path) -> "_Run":
  """The run of `train`, at its end."""
  _check(config)
  workdir = pathlib.Path(workdir).absolute()
  asked, config = config, latents.resolved(config, workdir)
  for tokenizer, place in latents.missing_tokenizers(asked, workdir):
    logger.info("First the tokenizer, in %s.", place)
    if _train(tokenizer, place).preempted:
      # In its last step: the tokenizer is done, and this run has not begun.
      logger.warning("Told to stop behind the tokenizer; the same command goes on from there.")
      raise Preempted(0)
  data = _build_data(config)
  _check_hosts_agree(data)
  task = build_task(config, data.tokenizer.vocab_size, data.summary)
  task.check_sample(data)
  trainer = partition.make_trainer(task, config)
  evaluations = eval_lib.build(config.evals.to_dict(), task, data, trainer.compile)
  if "seq_length" in config.data:
    for section in config.evals.values():
      trainer.check_length(section.get("seq_length") or config.data.seq_length)
  with contextlib.ExitStack() as stack:
    preemption = stack.enter_context(_Preemption())
    checkpointer = stack.enter_context(checkpoint.Checkpointer(workdir, **config.checkpoint))
    step, state, iterator_state = _start(config, workdir, checkpointer, trainer, data)
    iterator = data.train_iterator(config.seed)
    if iterator_state is not None:
      iterator.set_state(iterator_state)
    if jax.process_index() == 0:
      _write_config(asked, workdir)
      _write_corpus(data, workdir)
      data.tokenizer.save(workdir / TOKENIZER)
    writer = stack.enter_context(
      contextlib.closing(
        metrics.MetricsWriter(workdir, start_step=step, tensorboard=config.logging.tensorboard)
      )
    )
    run = _Run(config, task, trainer, evaluations, checkpointer, preemption, writer)
    run.latest = _last_values(workdir)
    state = run.loop(step, state, iterator)
  if jax.process_index() == 0:
    pictures = plots.write_plots(workdir)
    _print_summary(run.latest, config, workdir, pictures)
  task.show_sample(state.params if state.ema is None else state.ema, data, workdir)
  return run


@dataclasses.dataclass(frozen=True)
class Trained:
  """A trained model, with what it needs to be used.

  Attributes:
    config: Of its run.
    tokenizer: Of its run.
    task: Its task; holds the model.
    trainer: Its layout.
    params: Its parameters, or their average where the run kept one.
    step: The step they are from.
    summary: Of its data; `None` where the run wrote none.
  """

  config: ml_collections.ConfigDict
  tokenizer: data_lib.Tokenizer
  task: RunTask
  trainer: partition.Trainer
  params: Params
  step: int
  summary: Mapping[str, Any] | None

  @functools.cached_property
  def data(self) -> data_lib.Data:
    """Its data, made or found anew: a sample needs none, an evaluation does."""
    data = _build_data(self.config)
    if data.tokenizer.digest != self.tokenizer.digest:
      raise ValueError(
        "The corpus at hand has another tokenizer than the run had: config.data or the corpus "
        f"changed since ({data.tokenizer.digest=}, {self.tokenizer.digest=})."
      )
    return data


def load(
  workdir: str | pathlib.Path,
  config: ml_collections.ConfigDict | None = None,
  *,
  step: int | str = "latest",
  model: Mapping[str, Any] | None = None,
) -> Trained:
  """Restores the parameters of a run.

  Args:
    workdir: Of the run.
    config: Of the run, if not what its `config.json` says; the mesh may differ. Without one, a mesh
      that does not fit the devices at hand gives way to plain data parallelism.
    step: A step that has a checkpoint, "latest" or "best".
    model: Fields of `config.model` that differ from the run's, for the same parameters: another
      mask, say.

  Raises:
    ValueError: there is no such checkpoint, or it is of another model.
  """
  if config is None:
    config = read_config(workdir)
    try:
      partition.make_mesh(config.mesh.to_dict())
    except ValueError as e:
      logger.info("%s Here the run's parameters are on every device instead.", e)
      config.mesh = ml_collections.ConfigDict({"data": -1})
  config = latents.resolved(config, workdir)
  path = pathlib.Path(workdir) / TOKENIZER
  if not path.exists():
    raise ValueError(f"{str(workdir)!r} holds no {TOKENIZER}: train there first.")
  tokenizer = data_lib.load_tokenizer(path)
  summary = saved(path.parent / CORPUS)
  if summary is None and latents.of_latents(config):
    raise ValueError(f"{str(workdir)!r} holds no {CORPUS} of its latents: train there again.")
  task = build_task(config, tokenizer.vocab_size, summary)
  if model:
    if not hasattr(task, "variant"):
      raise ValueError(
        f"model={dict(model)} changes a language model, and {str(workdir)!r} trained "
        f"{config.task.type!r}; leave it out."
      )
    task.variant(model)  # Raises where it has other parameters.
    config = ml_collections.ConfigDict(config.to_dict())
    config.model.update(model)
    task = build_task(config, tokenizer.vocab_size, summary)
  trainer = partition.make_trainer(task, config)
  part = "params" if trainer.abstract_state.ema is None else "ema"
  with checkpoint.Checkpointer(workdir, **config.checkpoint, read_only=True) as checkpointer:
    if step == "best":
      step = checkpointer.best_step()
    elif step != "latest" and not str(step).isdigit():
      raise ValueError(
        f"{step=} is no step; choose a number of {checkpointer.steps()}, 'latest' or 'best'."
      )
    step, state, _ = checkpointer.restore(
      {part: getattr(trainer.abstract_state, part)},
      None if step == "latest" else int(step),
      partial=True,
    )
  return Trained(config, tokenizer, task, trainer, state[part], step, summary)


def save(
  workdir: str | pathlib.Path,
  config: ml_collections.ConfigDict,
  tokenizer: data_lib.Tokenizer,
  params: Params,
  summary: Mapping[str, Any] | None = None,
) -> None:
  """Writes what `load` reads, as step 0 of a run, for parameters that were trained elsewhere.

  Training can start from them with `config.init_from`.

  Args:
    workdir: Where to.
    config: Of the run.
    tokenizer: Of its texts.
    params: Its parameters.
    summary: Of its data; needed for a model over latents.

  Raises:
    ValueError: the workdir holds a run.
  """
  workdir = pathlib.Path(workdir).absolute()
  if (workdir / CONFIG).exists() or (workdir / "checkpoints").exists():
    raise ValueError(f"{str(workdir)!r} holds a run already; give another workdir.")
  workdir.mkdir(parents=True, exist_ok=True)
  with checkpoint.Checkpointer(workdir, **config.checkpoint) as checkpointer:
    parts = {"params": jax.device_put(params)}
    if config.optimizer.ema_decay:
      parts["ema"] = jax.tree.map(lambda x: x.astype(jnp.float32), parts["params"])
    checkpointer.save(0, parts, {})
  tokenizer.save(workdir / TOKENIZER)
  if summary is not None:
    files.write_json(workdir / CORPUS, dict(summary))
  _write_config(config, workdir)


class _Run:
  """A run between its start and its end."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    task: RunTask,
    trainer: partition.Trainer,
    evaluations: list[eval_lib.Evaluation],
    checkpointer: checkpoint.Checkpointer,
    preemption: "_Preemption",
    writer: metrics.MetricsWriter,
  ):
    self._config, self._trainer, self._evaluations = config, trainer, evaluations
    self._checkpointer, self._preemption, self._writer = checkpointer, preemption, writer
    self._throughput = metrics.Throughput(
      tokens_per_step=task.items_per_step,
      flops_per_token=task.flops_per_item,
      devices=list(trainer.mesh.devices.flat),
    )
    self.latest: dict[str, float] = {}
    self.preempted = False

  def loop(self, start: int, state: TrainState, iterator: Any) -> TrainState:
    """Steps from `start` to `config.train_steps`."""
    c = self._config
    first, last = start + 1, c.train_steps
    with _progress(start, last) as bar:
      for step in range(first, last + 1):
        begin = time.perf_counter()
        batch = self._trainer.place(next(iterator))
        # What moves between host and device, moves where it is written.
        with jax.transfer_guard("disallow"):
          state, step_metrics = self._trainer.step(state, batch)
        self._throughput.step()
        line: dict[str, float] = {}
        if step == first:
          jax.block_until_ready(step_metrics)
          line["perf/compile_sec"] = time.perf_counter() - begin
          self._throughput.restart()
        preempted = self.preempted = self._preemption.reached(step)
        if step == first or step % c.log_steps == 0 or step == last or preempted:
          line |= self._train_metrics(state, step_metrics)
          _show(bar, step, last, line)
        skipped = line.get("train/skipped", 0)
        with self._throughput.paused():
          evaluation = {}
          if not preempted and skipped <= c.max_skipped_steps:
            with contextlib.ExitStack() as on_error:
              # An evaluation that fails costs the run neither the step nor its line.
              on_error.callback(self._save, step, state, iterator, {})
              on_error.callback(self._writer.write, step, line)
              evaluation = self._evaluate(step, state)
              on_error.pop_all()
          line |= {f"eval/{name}": value for name, value in evaluation.items()}
          self._writer.write(step, line)
          self.latest |= line
          if skipped > c.max_skipped_steps:
            raise DivergedError(
              f"Training diverged: the last {skipped:.0f} steps up to {step} had a loss or "
              f"gradient that is not finite, more than {c.max_skipped_steps=}. The newest "
              f"checkpoint is from before them. Lower optimizer.peak_lr, or look at the data."
            )
          if (
            step % c.checkpoint_steps == 0
            or step == last
            or preempted
            or self._checkpointer.is_best(evaluation)
          ):
            self._save(step, state, iterator, evaluation)
        bar.update()
        if preempted and step < last:
          self._checkpointer.wait()
          logger.warning(
            "Told to stop: leaving after step %d with exit code %d; the same command "
            "goes on from the newest checkpoint.",
            step,
            PREEMPTED_EXIT_CODE,
          )
          raise Preempted(step)
    return state

  def _train_metrics(self, state: TrainState, step_metrics: Mapping[str, Any]) -> dict[str, float]:
    """Waits for the step."""
    fetched = jax.device_get({**step_metrics, "total_skipped": state.total_skipped})
    return {f"train/{name}": float(x) for name, x in fetched.items()} | self._throughput.read()

  def _evaluate(self, step: int, state: TrainState) -> dict[str, float]:
    # The average is what will be used, where one is kept.
    params = state.params if state.ema is None else state.ema
    due = [
      e for e in self._evaluations if step % e.every_steps == 0 or step == self._config.train_steps
    ]
    results = {name: value for e in due for name, value in e.run(params).items()}
    if results:
      logger.info(
        "Step %d: %s",
        step,
        "  ".join(f"{k} {v:.4g}" for k, v in results.items() if "/position_" not in k),
      )
    best = self._config.checkpoint.keep_best.removeprefix("eval/")
    if any(best.startswith(f"{e.name}/") for e in due) and best not in results:
      raise ValueError(f"checkpoint.keep_best={best!r} is no metric; there are {list(results)}.")
    return results

  def _save(
    self, step: int, state: TrainState, iterator: Any, evaluation: Mapping[str, float]
  ) -> None:
    if skipped := int(jax.device_get(state.skipped)):
      logger.warning(
        "Step %d: no checkpoint, since the last %d steps were not finite.", step, skipped
      )
      return
    self._checkpointer.save(step, state, iterator.get_state(), evaluation)


class _Preemption(contextlib.AbstractContextManager):
  """Learns of SIGTERM, and, with several hosts, agrees on the step to stop at."""

  def __init__(self):
    self._noticed = False
    # JAX's preemption service has a handler of its own, which this one would displace.
    self._own_handler = (
      not jax.distributed.is_initialized() and threading.current_thread() is threading.main_thread()
    )

  def __enter__(self) -> "_Preemption":
    if self._own_handler:
      self._previous = signal.signal(signal.SIGTERM, self._notice)
    return self

  def __exit__(self, *error: object) -> None:
    if self._own_handler:
      signal.signal(signal.SIGTERM, self._previous)

  def reached(self, step: int) -> bool:
    if jax.distributed.is_initialized():
      return multihost_utils.reached_preemption_sync_point(step)
    return self._noticed

  def _notice(self, *_: Any) -> None:
    self._noticed = True


def _check(config: ml_collections.ConfigDict) -> None:
  for name in ("train_steps", "log_steps", "checkpoint_steps", "batch_size"):
    if config[name] < 1:
      raise ValueError(f"config.{name}={config[name]} must be at least 1.")
  if config.max_skipped_steps < 0:
    raise ValueError(
      f"config.max_skipped_steps={config.max_skipped_steps} must not be negative; 0 "
      "stops at the first step that is not finite."
    )
  if not 0 <= (config.optimizer.ema_decay or 0) < 1:
    raise ValueError(
      f"optimizer.ema_decay={config.optimizer.ema_decay} must be in [0, 1); 0 keeps no average."
    )
  if (config.optimizer.clip_norm or 0) < 0:
    raise ValueError(
      f"optimizer.clip_norm={config.optimizer.clip_norm} must not be negative; 0 does not clip."
    )
  best = config.checkpoint.keep_best.removeprefix("eval/")
  if best and best.partition("/")[0] not in config.evals:
    raise ValueError(
      f"checkpoint.keep_best={best!r} starts with none of config.evals: "
      f"{sorted(config.evals)}; it has the form <evaluation>/<metric>."
    )


def _check_hosts_agree(data: data_lib.Data) -> None:
  """Hosts with other texts or tokenizers would train one model on rows that do not fit together."""
  made_of = [data.tokenizer.digest, data.summary.get("tokens_sha256")]
  digest = hashlib.sha256(json.dumps(made_of).encode()).digest()
  everyones = multihost_utils.process_allgather(np.frombuffer(digest[:8], np.uint8))
  if (everyones != everyones[0]).any():
    raise ValueError(
      "The processes of this run have different data; this one has the tokenizer "
      f"{made_of[0][:12]} and the tokens {made_of[1]}. Give all hosts the same Python or corpus, "
      "or one token file made with experiments/prepare.py."
    )


def _check_tokenizer(workdir: pathlib.Path, data: data_lib.Data) -> None:
  """Raises if the run of `workdir` had another tokenizer: its ids meant other text."""
  path = workdir / TOKENIZER
  if not path.exists():
    return
  was, now = data_lib.load_tokenizer(path).digest, data.tokenizer.digest
  if was != now:
    raise ValueError(
      f"The run of {str(workdir)!r} had the tokenizer {was[:12]}, but config.data makes "
      f"{now[:12]}: the parameters know other tokens. Set data.tokenizer={str(path)!r} and "
      "data.vocab_size=0, or start in another workdir."
    )


def _check_latents(workdir: pathlib.Path, data: data_lib.Data) -> None:
  """Raises if the run of `workdir` was trained on latents of another tokenizer."""
  if changes := _other_latents(workdir, data):
    raise ValueError(
      f"The run of {str(workdir)!r} was trained on {'; on '.join(changes)}: the parameters know "
      "other latents. Give the tokenizer that they were trained on, or start in another workdir."
    )


def _other_latents(workdir: pathlib.Path, data: data_lib.Data) -> list[str]:
  """For each modality with another tokenizer than the run of `workdir` had: that one, and this."""
  before, changes = _by_modality(saved(workdir / CORPUS) or {}), []
  for name in _by_modality(data.summary):
    other = name in data.summary.get("others", {})
    part, where = (data.of(name), f"others.{name}.") if other else (data, "")
    was, now = (x.get("latent_tokenizer") for x in (before.get(name, {}), part.summary))
    if was and now and was != now:
      changes.append(
        f"latents of the tokenizer {was}, and that of "
        f"{where}data.tokenizer_run={part.config.tokenizer_run!r} is {now}"
      )
  return changes


def _by_modality(summary: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
  """A corpus's summary, and those of its further modalities."""
  return {summary.get("modality", ""): summary} | dict(summary.get("others", {}))


def _check_batches(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Raises if the run of `workdir` counted batches of another kind."""
  before = saved(workdir / CONFIG)
  if before is None:
    return
  changed = [
    d
    for d in _differences(before, json.loads(config.to_json()))
    # Of any modality.
    if re.sub(r"^config\.(others\.[^.]+\.)?", "", d.partition(":")[0]) in _BATCH_FIELDS
  ]
  was, now = (sorted(c.get("others") or {}) for c in (before, config))
  if was != now:
    changed.append(f"config.others: {was} -> {now}")
  if changed:
    raise ValueError(
      f"The data of {str(workdir)!r} cannot go on with other batches: {'; '.join(changed)}. Set "
      "these back, or start from the parameters alone with config.init_from."
    )


def _start(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  checkpointer: checkpoint.Checkpointer,
  trainer: partition.Trainer,
  data: data_lib.Data,
) -> tuple[int, TrainState, dict[str, Any] | None]:
  """The step to start after, the state there, and the data iterator's state if it has one."""
  source = str(workdir) if checkpointer.steps() else config.resume
  if source:
    _check_batches(config, pathlib.Path(source))
    _check_latents(pathlib.Path(source), data)
  if source or config.init_from:
    _check_tokenizer(pathlib.Path(source or config.init_from), data)
  if checkpointer.steps():
    step, state, iterator_state = checkpointer.restore(trainer.abstract_state)
    logger.info("Start: resumed %s at step %d.", workdir, step)
    return step, state, iterator_state
  if config.resume:
    with checkpoint.Checkpointer(config.resume, read_only=True) as source:
      step, state, iterator_state = source.restore(trainer.abstract_state)
    logger.info("Start: resumed config.resume=%s at step %d.", config.resume, step)
    return step, state, iterator_state
  state = trainer.init(jax.random.key(config.seed))
  if config.init_from:
    # No error: to learn other latents may be what the run is for.
    for change in _other_latents(pathlib.Path(config.init_from), data):
      logger.warning("config.init_from=%s was trained on %s.", config.init_from, change)
    params = checkpoint.restore_params(
      config.init_from, state.params, renames=config.init_rename, new=config.init_new
    )
    # A copy even where the dtypes agree: both are donated.
    ema = (
      None
      if state.ema is None
      else jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), params)
    )
    state = state.replace(params=params, ema=ema)
    logger.info("Start: parameters of config.init_from=%s, step 0.", config.init_from)
  else:
    logger.info("Start: from scratch.")
  return 0, state, None


def _write_config(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  text = config.to_json(indent=2, sort_keys=True) + "\n"
  before = saved(workdir / CONFIG)
  if before is not None and (changed := _differences(before, json.loads(text))):
    logger.warning("The config changed since this workdir's last run: %s", "; ".join(changed))
  files.write_text(workdir / CONFIG, text)


def _write_corpus(data: data_lib.Data, workdir: pathlib.Path) -> None:
  before, now = saved(workdir / CORPUS), dict(data.summary)
  if before is not None and before.get("tokens_sha256") != now.get("tokens_sha256"):
    logger.warning(
      "The corpus changed since this workdir's last run: tokens_sha256 %s -> %s",
      before.get("tokens_sha256"),
      now.get("tokens_sha256"),
    )
  files.write_json(workdir / CORPUS, now)


def _differences(old: Any, new: Any, path: str = "config") -> list[str]:
  if isinstance(old, dict) and isinstance(new, dict):
    return [
      d for k in sorted({*old, *new}) for d in _differences(old.get(k), new.get(k), f"{path}.{k}")
    ]
  return [] if old == new else [f"{path}: {old!r} -> {new!r}"]


def _last_values(workdir: pathlib.Path) -> dict[str, float]:
  lines = metrics.read_metrics(workdir / "metrics.jsonl") if jax.process_index() == 0 else []
  return {k: v for line in lines for k, v in line.items() if k != "step"}


@contextlib.contextmanager
def _progress(start: int, last: int) -> Iterator[tqdm.tqdm]:
  """A bar with the time that remains, on process 0 and where someone can see it."""
  bar = tqdm.tqdm(
    initial=start,
    total=last,
    unit="step",
    dynamic_ncols=True,
    disable=None if jax.process_index() == 0 else True,
  )
  with contextlib.ExitStack() as stack:
    stack.enter_context(bar)
    if not bar.disable:
      stack.enter_context(
        tqdm.contrib.logging.logging_redirect_tqdm([logging.getLogger("latentlab")])
      )
    yield bar


def _show(bar: tqdm.tqdm, step: int, last: int, line: Mapping[str, float]) -> None:
  shown = {
    k.partition("/")[2]: f"{line[k]:.4g}"
    for k in ("train/loss", "train/grad_norm", "train/lr", "perf/tokens_per_sec")
    if k in line
  }
  if bar.disable:
    logger.info("Step %d/%d: %s", step, last, "  ".join(f"{k} {v}" for k, v in shown.items()))
  else:
    bar.set_postfix(shown, refresh=False)


def _print_summary(
  latest: Mapping[str, float],
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  pictures: list[pathlib.Path],
) -> None:
  print(f"\nTrained {config.train_steps} steps in {workdir}")
  compared = {
    k: v if _is_finite(v) else math.inf for k, v in latest.items() if "/bits_per_byte" in k
  }
  for name, value in latest.items():
    if "/position_" not in name and "/bits_per_byte" not in name:
      print(f"  {name:<44} {f'{value:.6g}' if _is_finite(value) else 'not finite'}")
  for name, value in config.expected.items():
    print(f"  {'expected ' + name:<44} {value}")
  if compared:
    print("\nBits per raw byte, the fewest first:")
    longest = max(filter(math.isfinite, compared.values()), default=0) or 1
    for name, value in sorted(compared.items(), key=lambda item: item[1]):
      label = name.removeprefix("eval/").replace("bits_per_byte", "").strip("/_").replace("/_", " ")
      finite = math.isfinite(value)
      bar = f"{value:6.3f}  {'#' * round(30 * value / longest)}" if finite else "not finite"
      print(f"  {label:<32} {bar}")
    of_bytes_seen = [v for k, v in compared.items() if "/bits_per_byte_order_" in k]
    of_models = [v for k, v in compared.items() if k.endswith("/bits_per_byte")]
    if of_bytes_seen and of_models:
      below = max(of_models) < min(of_bytes_seen)
      print(f"\nBelow all n-grams of the bytes seen: {'yes' if below else 'no'}")
  print("\nPlots: " + " ".join(str(p.relative_to(workdir)) for p in pictures))
  sys.stdout.flush()


def _is_finite(value: float | None) -> bool:
  """`metrics.jsonl` has `null` for what is not."""
  return value is not None and math.isfinite(value)


def _build_data(config: ml_collections.ConfigDict) -> data_lib.Data:
  if latents.of_latents(config):
    return latents.build_data(config)
  return data_lib.build(
    config.data.to_dict(), config.batch_size, jax.process_index(), jax.process_count()
  )
