"""A tokenizer learnt from library source, as in tests/data."""

from tests.data.conftest import cache, config, modules, tokenizer

__all__ = ['cache', 'config', 'modules', 'tokenizer']
