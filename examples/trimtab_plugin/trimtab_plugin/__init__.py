"""Adds the method `pull`, its operator, the task `next` and the architecture `helium`."""
