"""Rules of the source tree: who may import whom, what stays optional, what is annotated."""

import ast
import dataclasses
import pathlib
import sys
from collections.abc import Iterator

import pytest

_ROOT = pathlib.Path(__file__).parent.parent

# pallas_kernels <- ops <- layers <- models <- {sample, eval} <- train <- app <- experiments.
_ORDER = ("pallas_kernels", "ops", "layers", "models", "sample", "train", "app", "experiments")
_ALLOWED = {room: set(_ORDER[:i]) | {"typing"} for i, room in enumerate(_ORDER)}
_ALLOWED |= {
  "__init__": set(),
  "typing": set(),
  "huge_pages": set(),
  "pallas_kernels": set(),
  "data": {"typing"},
  "eval": _ALLOWED["sample"] | {"data", "sample"},
  "sample": _ALLOWED["sample"] | {"data"},  # Text is drawn by way of a tokenizer.
  "horae": {"typing"},
  "interop": _ALLOWED["sample"],
}
_ALLOWED["train"] |= {"data", "eval"}
_ALLOWED["app"] |= {"data", "eval"}
_ALLOWED["experiments"] |= {"data", "eval", "horae", "huge_pages", "interop"}
_OPTIONAL = {
  "huggingface_hub",
  "jiwer",
  "pyarrow",
  "pystoi",
  "safetensors",
  "sklearn",
  "tensorboardX",
  "torch",
  "transformers",
  "wandb",
}


@dataclasses.dataclass(frozen=True)
class _Source:
  path: pathlib.Path

  @property
  def room(self) -> str:
    """`latentlab/ops/x.py` is in `ops`, `latentlab/app.py` in `app`; elsewhere, the package."""
    package, *rest = self.path.relative_to(_ROOT).with_suffix("").parts
    return rest[0] if package == "latentlab" else package

  @property
  def tree(self) -> ast.Module:
    return ast.parse(self.path.read_text(), str(self.path))

  def __str__(self) -> str:
    return str(self.path.relative_to(_ROOT))


_SOURCES = [
  _Source(path)
  for package in ("pallas_kernels", "latentlab", "experiments")
  for path in sorted((_ROOT / package).rglob("*.py"))
]
_each_source = pytest.mark.parametrize("source", _SOURCES, ids=str)


def _imported(nodes: Iterator[ast.AST], package: str) -> Iterator[str]:
  """Dotted names; `from latentlab import ops` gives `latentlab.ops`."""
  for node in nodes:
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      parts = package.split(".")
      base = parts[: len(parts) + 1 - node.level] if node.level else []
      module = ".".join([*base, *([node.module] if node.module else [])])
      yield from (f"{module}.{alias.name}" for alias in node.names)


def _package(source: _Source) -> str:
  return ".".join(source.path.relative_to(_ROOT).parent.parts)


@_each_source
def test_imports_go_one_way(source: _Source):
  for name in _imported(ast.walk(source.tree), _package(source)):
    first, *rest = name.split(".")
    if first not in ("pallas_kernels", "latentlab", "experiments"):
      continue
    room = rest[0] if first == "latentlab" else first
    assert room == source.room or room in _ALLOWED[source.room], (
      f"{source} imports {name}; {source.room} may import {sorted(_ALLOWED[source.room])}."
    )


@_each_source
def test_optional_packages_are_imported_where_used(source: _Source):
  top = {name.split(".")[0] for name in _imported(iter(source.tree.body), _package(source))}
  assert not top & _OPTIONAL


@pytest.mark.parametrize("source", [s for s in _SOURCES if s.room == "pallas_kernels"], ids=str)
def test_kernels_stand_alone(source: _Source):
  # numpy comes with jax, and computes tables at trace time.
  allowed = {"jax", "jaxtyping", "numpy", "pallas_kernels"} | sys.stdlib_module_names
  names = {name.split(".")[0] for name in _imported(ast.walk(source.tree), _package(source))}
  assert names <= allowed


@pytest.mark.parametrize(
  "source", [s for s in _SOURCES if s.room in ("ops", "pallas_kernels")], ids=str
)
def test_public_functions_are_annotated(source: _Source):
  for node in source.tree.body:
    if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
      continue
    a = node.args
    bare = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs) if x.annotation is None]
    assert not bare and node.returns, f"{source}: {node.name} leaves {bare or 'its result'} bare."


def test_order_is_about_this_tree():
  assert len(_SOURCES) > 20
  assert {s.room for s in _SOURCES} <= set(_ALLOWED)
