"""A model as `mteb` asks an encoder (its EncoderProtocol, version 2), which needs nothing of mteb
until it asks for the model's card."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from llama_jax.errors import UserError
from llama_jax.evaluate.retrieval import unit
from llama_jax.evaluate.subject import Subject


class Encoder:
    """Vectors of texts: the mean of the features of their tokens, of unit length.

    Attributes:
        truncated: texts that were longer than the context, whose ends were left out.
    """

    def __init__(self, subject: Subject, *, prompts: Mapping[str, str] | None = None):
        """`prompts`: what is put in front of a 'query' or a 'document'; default: what the model was
        trained with, or nothing."""
        unknown = sorted({*(prompts or {})} - {'query', 'document'})
        if unknown:
            raise UserError(f'prompts: there is no kind {unknown[0]!r}: give query, document')
        self._subject = subject
        self._prompts = dict(subject.prompts if prompts is None else prompts)
        self.truncated = 0

    def encode(
        self, inputs: Iterable[Any], *, prompt_type: Any = None, **context: Any
    ) -> np.ndarray:
        """Float32 [n, D] of texts, or of mteb's batches {'text': [...]}, in their order. What else
        mteb says (`task_metadata`, `hf_split`, `hf_subset`, `batch_size`) changes nothing."""
        kind = getattr(prompt_type, 'value', prompt_type)
        texts: list[str] = []
        for batch in [inputs] if isinstance(inputs, str) else inputs:
            if isinstance(batch, Mapping):
                if 'text' not in batch:
                    raise UserError(f'a batch holds {", ".join(batch)}: only text can be encoded')
                texts.extend(batch['text'])
            else:
                texts.append(batch)
        before = self._prompts.get(str(kind), '')
        texts = [before + text for text in texts]
        if not texts:
            return np.zeros((0, self._subject.programs.config.dim), np.float32)
        longest = self._subject.context
        self.truncated += sum(len(self._subject.encode(text)) > longest for text in texts)
        return self._subject.vectors(texts, truncate=True)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """Cosines of all pairs [n, m]."""
        return _unit(embeddings1) @ _unit(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """Cosines of the i-th with the i-th [n]."""
        return (_unit(embeddings1) * _unit(embeddings2)).sum(axis=-1)

    @property
    def mteb_model_meta(self) -> Any:
        """The card of the model, for mteb's results."""
        try:
            from mteb.models import ModelMeta
        except ModuleNotFoundError:
            raise UserError('the card of a model takes mteb: pip install mteb') from None
        return ModelMeta.create_empty(
            {
                'name': f'llama_jax/{self._subject.name}'.replace(', ', '-').replace(' ', '-'),
                'revision': 'local',
                'embed_dim': self._subject.programs.config.dim,
                'max_tokens': self._subject.context,
                'similarity_fn_name': 'cosine',
            }
        )


def _unit(x: Any) -> np.ndarray:
    return unit(np.atleast_2d(x)).astype(np.float32)
