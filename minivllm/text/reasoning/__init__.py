"""Parsers that part the reasoning in a reply from its answer, one file a way of writing it."""
