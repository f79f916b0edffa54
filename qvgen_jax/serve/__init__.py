"""A local web page: a prompt to two videos, full precision and low-bit, from the same noise."""
