"""Text to token ids and back: tokenizers, vocabularies, chat formats and the detokenizer."""
