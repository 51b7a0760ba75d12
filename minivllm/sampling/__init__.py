"""From logits to a token: ordered features, one file each, costing nothing when unused."""
