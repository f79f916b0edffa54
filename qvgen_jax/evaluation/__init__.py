"""Judging videos and reporting what was found."""
