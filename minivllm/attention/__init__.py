"""Attention backends over the paged cache: each says what it cannot serve, plans a step, runs a layer."""
