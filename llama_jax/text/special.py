"""Tokens with a part of their own, and those that files add to a vocabulary."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Special:
    """Ids with a part of their own. None: the vocabulary has no such token."""

    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    end_ids: tuple[int, ...] = ()
    """Ids that end a text besides eos, such as the end of a turn."""
    spaced: bool = True
    """Where a space is put before a text, it is put before what follows a control token as well
    (`legacy` of transformers)."""
    takes: tuple[tuple[int, bool, bool], ...] = ()
    """Control tokens that take white space from the text on their left, or right (`lstrip`,
    `rstrip`), where the vocabulary's own file does not say so."""

    @property
    def ends(self) -> tuple[int, ...]:
        """Every id that ends a text, eos first."""
        first = () if self.eos_id is None else (self.eos_id,)
        return tuple(dict.fromkeys((*first, *self.end_ids)))

    @property
    def ids(self) -> frozenset[int]:
        return frozenset(i for i in (self.bos_id, self.pad_id, *self.ends) if i is not None)

    @property
    def padding(self) -> int | None:
        """The token that pads and does nothing else."""
        return None if self.pad_id in (self.bos_id, *self.ends) else self.pad_id


NOTHING = Special()


@dataclasses.dataclass(frozen=True)
class Added:
    """A token that a file adds to those that were learnt."""

    content: str
    id: int
    special: bool = True
    """No text spells it; else it is found in text before all others."""
    lstrip: bool = False
    rstrip: bool = False
    """Whether it takes white space from the text beside it."""
