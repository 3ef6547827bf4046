"""From annotations and video to label tables and shards of cached features."""
