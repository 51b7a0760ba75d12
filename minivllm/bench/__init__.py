"""Measuring tools behind `mini-vllm bench`."""
