"""Text from a language model: prompts in, pieces of text out while they are drawn."""

import codecs
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from latentlab.data import Tokenizer
from latentlab.models import LanguageModel
from latentlab.sample.logits import LogitBias, TokenSampler
from latentlab.sample.loop import Generated, stream
from latentlab.typing import Array, Key, Params


@dataclasses.dataclass(frozen=True)
class Piece:
  """What one block adds to one row.

  Attributes:
    text: Characters that are complete; those cut by a token come with the next piece.
    tokens: Ids drawn.
    log_prob: Of those tokens together, in nats, before filters.
    finished: Whether the model ended the row.
    done: Whether this is the row's last piece.
  """

  text: str
  tokens: list[int]
  log_prob: float
  finished: bool
  done: bool


def stream_text(
  model: LanguageModel,
  params: Params,
  tokenizer: Tokenizer,
  prompts: Sequence[str],
  *,
  sampler: TokenSampler,
  key: Key[Array, ""] | Key[Array, " B"],
  max_new_tokens: int,
  block_size: int = 8,
  prefill_size: int | None = None,
  on_read: Callable[[int], None] | None = None,
) -> Iterator[list[Piece]]:
  """Continues prompts, each the start of a document; a row ends where the model starts the next.

  Args:
    model: The model.
    params: Its parameters.
    tokenizer: Its vocabulary.
    prompts: Texts; the empty one starts a document.
    sampler: Draws tokens; special tokens but `<bos>` are banned beside it.
    key: As in `generate`.
    max_new_tokens: Tokens to draw at most.
    block_size: Tokens between two pieces.
    prefill_size: As in `stream`.
    on_read: As in `stream`.

  Returns:
    An iterator over blocks, each a piece per row. Arguments are checked before it is begun.

  Raises:
    ValueError: prompt and continuation exceed the model's context.
  """
  encoded = [np.concatenate([[tokenizer.bos_id], tokenizer.encode(p)]) for p in prompts]
  lengths = np.array([len(ids) for ids in encoded])
  tokens = np.full((len(prompts), lengths.max()), tokenizer.pad_id)
  for row, ids in zip(tokens, encoded, strict=True):
    row[: len(ids)] = ids
  # <bos> ends a row; no other special token is text, and training says little of their logits.
  special = np.flatnonzero(tokenizer.byte_lengths == 0)
  ban = LogitBias.ban(special[special != tokenizer.bos_id].tolist(), tokenizer.vocab_size)
  blocks = stream(
    model,
    params,
    tokens,
    lengths,
    sampler=sampler.replace(filters=(ban, *sampler.filters)),
    key=key,
    max_new_tokens=max_new_tokens,
    block_size=min(block_size, max_new_tokens),
    prefill_size=prefill_size,
    on_read=on_read,
    stop_tokens=(tokenizer.bos_id,),
    pad_id=tokenizer.pad_id,
  )
  return _pieces(blocks, tokenizer, len(prompts), max_new_tokens)


def _pieces(
  blocks: Iterable[Generated], tokenizer: Tokenizer, num_rows: int, max_new_tokens: int
) -> Iterator[list[Piece]]:
  # A character may be cut by a token or a block; its bytes wait in the decoder for the rest.
  decoders = [codecs.getincrementaldecoder("utf-8")(errors="replace") for _ in range(num_rows)]
  drawn = 0
  for block in blocks:
    tokens, log_probs = np.asarray(block.tokens), np.asarray(block.log_probs)
    lengths, finished = np.asarray(block.lengths), np.asarray(block.finished)
    drawn += tokens.shape[1]
    pieces = []
    for row, decoder in enumerate(decoders):
      ids = tokens[row, : lengths[row]]
      done = bool(finished[row]) or drawn >= max_new_tokens
      pieces.append(
        Piece(
          text=decoder.decode(tokenizer.decode_bytes(ids), final=done),
          tokens=ids.tolist(),
          log_prob=float(log_probs[row].sum()),
          finished=bool(finished[row]),
          done=done,
        )
      )
    yield pieces
