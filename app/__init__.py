"""Chat sessions that survive: Redis for the live conversation, PostgreSQL for ever."""

__version__ = "0.1.0"
