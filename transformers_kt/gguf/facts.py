"""What metadata values mean, whatever the model."""

from __future__ import annotations

NO_TOKEN = (-1, 0xFFFFFFFF)
"""What converters write as the id of a token that does not exist."""
