"""The page that `training.report` fills: its skeleton, its style and its scripts."""
