"""Measurements of quality and speed; nothing here is imported by the packages."""
