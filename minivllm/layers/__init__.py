"""The decoder's parts. A layer gets what it needs as arguments; none knows about requests."""
