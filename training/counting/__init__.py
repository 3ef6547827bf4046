"""Counting by marking: the second family of tasks that the engine trains."""
