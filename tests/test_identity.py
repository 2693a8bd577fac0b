"""Whose steering it is: the identity of a model follows its weights, however these change."""

from __future__ import annotations
