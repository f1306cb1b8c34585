"""The replay of a generation: one HTML page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mdm.core.pages import write_page
from megatron_mdm.inference.replay.pieces import Piece, PieceReader
from megatron_mdm.inference.replay.trace import Trace

# In the page's data: a masked position, and a token that was not chosen by its probability.
_MASK, _NO_PROBABILITY = -1, -1
_PER_UNIT = 1000


@dataclass(frozen=True)
class ReplayedSample:
    """A sample as the page shows it.

    Attributes:
        title: What to call it in the list of samples.
        num_prompt_tokens: Tokens given before the new ones.
        num_suffix_tokens: Tokens given after them.
        trace: How it came about.
        texts: Prompt, completion and suffix.
        settings: Names and values, in the order in which to show them.
    """

    title: str
    num_prompt_tokens: int
    num_suffix_tokens: int
    trace: Trace
    texts: tuple[str, str, str]
    settings: dict[str, Any]


def write_replay(
    path: Path,
    samples: Sequence[ReplayedSample],
    *,
    model_name: str,
    mask_token_id: int,
    pieces: PieceReader,
) -> None:
    """Writes the page.

    Args:
        path: The file to create or replace.
        samples: At least one.
        model_name: What made them.
        mask_token_id: Id of the mask token.
        pieces: How tokens are shown.

    Raises:
        OSError: The file cannot be written.
    """
    write_page(
        path,
        "megatron_mdm.inference.replay",
        "page.html.j2",
        model_name=model_name,
        data=build_replay_data(samples, mask_token_id, pieces),
    )


def build_replay_data(
    samples: Sequence[ReplayedSample], mask_token_id: int, pieces: PieceReader
) -> dict[str, Any]:
    """The page's data: each sample's first state, and the changes of each step.

    Args:
        samples: What to show.
        mask_token_id: Id of the mask token.
        pieces: How tokens are shown.

    Returns:
        JSON values: `pieces`, text, kind and if need be bytes of each token id that occurs, by
        which a page can put characters together; `samples`, in which
        `initial` holds token ids, -1 for a mask, and each of `steps` a flat list of position,
        token id and probability in thousandths, -1 where there is none.
    """

    def encode_mask(token_id: int) -> int:
        return _MASK if token_id == mask_token_id else token_id

    ids = sorted({token_id for sample in samples for token_id in _list_ids(sample.trace)})
    known: dict[int, Piece] = {i: pieces.read_piece(i) for i in ids if i != mask_token_id}
    return {
        "pieces": {
            str(token_id): [piece.text, piece.kind, *([piece.raw.hex()] if piece.raw else [])]
            for token_id, piece in known.items()
        },
        "samples": [
            {
                "title": sample.title,
                "prompt": sample.num_prompt_tokens,
                "suffix": sample.num_suffix_tokens,
                "initial": [encode_mask(token_id) for token_id in sample.trace.initial],
                "steps": [
                    [
                        number
                        for change in step
                        for number in (
                            change.position,
                            encode_mask(change.token_id),
                            _to_thousandths(change.probability),
                        )
                    ]
                    for step in sample.trace.steps
                ],
                "texts": list(sample.texts),
                "settings": [[name, _format(value)] for name, value in sample.settings.items()],
            }
            for sample in samples
        ],
    }


def _list_ids(trace: Trace) -> Iterable[int]:
    yield from trace.initial
    for step in trace.steps:
        for change in step:
            yield change.token_id


def _to_thousandths(probability: float | None) -> int:
    return _NO_PROBABILITY if probability is None else round(probability * _PER_UNIT)


def _format(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
