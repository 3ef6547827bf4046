"""What flows between the stages: the clock, the dialog state, the tables, the shards, the settings."""
