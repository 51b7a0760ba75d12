"""Models are data: a spec read from a config.json, one decoder, a map of weight names."""
