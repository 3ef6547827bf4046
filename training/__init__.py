"""From shards to a trained and scored model."""
