"""Speculative decoding: tokens are drafted, and one run of the model verifies them."""
