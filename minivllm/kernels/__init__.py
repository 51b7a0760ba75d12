"""Every op: its meaning in plain torch (reference) and the versions that run fast on a device."""
