"""SentencePiece models as others train them."""

import io

import sentencepiece


def sentencepiece_model(texts, **settings):
    """A serialised model: a space before every text, no control tokens of ours."""
    model = io.BytesIO()
    defaults = dict(
        vocab_size=600,
        model_type='bpe',
        byte_fallback=True,
        normalization_rule_name='identity',
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, **(defaults | settings)
    )
    return model.getvalue()
